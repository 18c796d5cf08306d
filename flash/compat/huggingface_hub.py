"""Hugging Face's hub: errors of its HTTP client, and work without a network.

`huggingface_hub.errors` imports `HTTPError` from its HTTP client (httpx2 in version 2.4) without
exporting it. The library raises a subclass of it for error responses of the server, and `HTTPError`
itself if no connection can be made, so a handler for both needs this class. A direct import from
the client would fail as soon as the library uses another client.

`constants.HF_HUB_OFFLINE` and `datasets.config.HF_HUB_OFFLINE` hold the variable of this name as it
was when the libraries were imported; they are read with each request.
"""

import os
import sys
from functools import cache

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    HTTPError as HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)

_TIMEOUT_S = 5.0


@cache
def is_reachable() -> bool:
    """True if the hub answers; if not, the hub's libraries use their caches from now on.

    They would otherwise try each file six times, which takes half a minute a file.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except HTTPError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True
