"""Backbones by their names on the hub, with a hub on loopback and the real client."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flash.model import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
try:
    backbone = Backbone.open(BackboneSettings(name="b", weights=sys.argv[1]))
    files = sorted(path.name for path in backbone.folder.iterdir())
    backbone.fetch()
    print(files, backbone.spec, sum(1 for _ in backbone.load().parameters()))
except InputError as error:
    print(error)
"""


class Hub(ThreadingHTTPServer):
    """A hub with one model, `team/small`, served from a folder; `log` lists the requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.log = folder, []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/team/small/tree/"):
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in sorted(self.server.folder.iterdir())
            ]
            return self._answer(200, json.dumps(tree).encode())
        if path.startswith("/api/models/team/small"):
            siblings = [{"rfilename": p.name} for p in sorted(self.server.folder.iterdir())]
            about = {"id": "team/small", "sha": COMMIT, "siblings": siblings}
            return self._answer(200, json.dumps(about).encode())
        if path.startswith("/api/models/team/gated"):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        file = self.server.folder / path.rsplit("/", 1)[-1]
        if not path.startswith("/team/small/resolve/") or not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if self.command == "GET":
            self.server.log.append(file.name)
        content = file.read_bytes()
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._answer(200, content, etag)

    do_HEAD = do_GET


@pytest.fixture
def server(backbone_folder) -> Iterator[Hub]:
    server = Hub(backbone_folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(name: str, home: Path, **environment: str) -> str:
    """Lines that SCRIPT prints in a fresh process."""
    fixed = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **fixed, **environment}
    command = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_weights_are_fetched_last_and_the_cache_serves_without_a_network(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    said = ask("team/small", tmp_path, HF_ENDPOINT=endpoint)
    names = "'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json'"
    assert said == f"[{names}] 3L d64 f128 FFF 35"
    assert server.log[-1] == "model.safetensors"
    fetched = len(server.log)
    assert "model.safetensors" in ask("team/small", tmp_path, HF_HUB_OFFLINE="1")
    assert "3L d64 f128" in ask(f"team/small@{COMMIT}", tmp_path, HF_ENDPOINT=endpoint)
    assert len(server.log) == fetched


def test_what_the_hub_refuses_is_one_line_with_the_remedy(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    gated = ask("team/gated", tmp_path, HF_ENDPOINT=endpoint)
    assert gated == (
        "backbone.weights=team/gated: expected access to a gated model; accept its license on the "
        "hub and run `hf auth login`"
    )
    assert "found neither; check the name" in ask("team/none", tmp_path, HF_ENDPOINT=endpoint)
    assert "run `hf download team/small`" in ask("team/small", tmp_path, HF_HUB_OFFLINE="1")


def test_what_is_no_name_on_the_hub():
    assert hub.is_name("Qwen/Qwen3-0.6B-Base")
    assert hub.is_name("team/small@refs/pr/1")
    for other in ("folder", "a/b/c", "/a/b", "../a", "./a", "a/b@", "a b/c"):
        assert not hub.is_name(other), other
