"""Contract test of huggingface_hub for flash.compat.huggingface_hub."""

import subprocess
import sys

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


def test_without_a_network_the_libraries_use_their_caches_at_once(monkeypatch):
    """One request instead of six for each file; a process of its own, as its state is changed."""
    check = (
        "import time, datasets\n"
        "from flash.compat.huggingface_hub import is_reachable\n"
        "assert not is_reachable()\n"
        "start = time.perf_counter()\n"
        "try:\n"
        "    datasets.load_dataset('owner/name')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, time.perf_counter() - start < 5)\n"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with contract("HF_HUB_OFFLINE", "flash.compat.huggingface_hub.is_reachable", "fail quickly"):
        command = [sys.executable, "-c", check]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == "True", done
        assert "Retrying" not in done.stderr
