"""Contract test of huggingface_hub for flash.compat.huggingface_hub."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests.compat.contract import contract


def test_one_error_class_covers_responses_and_failed_connections():
    with contract(
        "huggingface_hub.errors.HTTPError",
        "flash.compat.huggingface_hub.HTTPError",
        "explain that the hub cannot be reached",
    ):
        from flash.compat.huggingface_hub import HTTPError

        assert issubclass(HfHubHTTPError, HTTPError)
        with pytest.raises(HTTPError):
            HfApi(endpoint="http://127.0.0.1:9").dataset_info("a/b", timeout=5)
