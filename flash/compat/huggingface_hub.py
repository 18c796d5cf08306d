"""Hugging Face's hub: errors of its HTTP client.

`huggingface_hub.errors` imports `HTTPError` from the client that the library is built on (httpx2 in
2.4) without exporting it. The library raises its own subclass for answers of the server and this
one for a connection that cannot be made, so that a handler for both needs it; a direct import of
the client would fail when the library changes to another.
"""

from huggingface_hub.errors import (
    HTTPError as HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)
