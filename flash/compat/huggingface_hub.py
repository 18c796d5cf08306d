"""Hugging Face's hub: errors of its HTTP client.

`huggingface_hub.errors` imports `HTTPError` from its HTTP client (httpx2 in version 2.4) without
exporting it. The library raises a subclass of it for error responses of the server, and `HTTPError`
itself if no connection can be made, so a handler for both needs this class. A direct import from
the client would fail as soon as the library uses another client.
"""

from huggingface_hub.errors import (
    HTTPError as HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)
