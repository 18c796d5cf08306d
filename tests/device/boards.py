"""An sshd of the tests' own, which is a board for `device=ssh`."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flash.device.connections import SshSettings

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")
PATH = os.environ["PATH"]
FOLDER = 'it\'s a "board" $HOME; rm -rf *'


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_key(path):
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True)
    return path


class Board:
    """An sshd of our own on loopback, with keys of its own; logging in needs no password.

    Args:
        folder: An empty folder for its files, seen on the board by the same path.
        server: Words that start sshd.
        user: Name to log in as; None is the caller.
        python: Python on the board.
        path: Folders with the board's programs.
        environment: More of the environment of a login, as words NAME=VALUE.
    """

    def __init__(
        self, folder, server=(SSHD,), user=None, python=sys.executable, path=PATH, environment=""
    ):
        self.folder, self.server, self.user, self.python = folder, server, user, python
        self.port = free_port()
        self.key = make_key(folder / "user key")
        self.host_key = make_key(folder / "host_key")
        self.known_hosts = folder / "known hosts"
        self.know(self.host_key)
        (folder / "authorized_keys").write_text((folder / "user key.pub").read_text())
        (folder / "bin").mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self.config = folder / "sshd_config"
        self.config.write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.host_key}\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv PATH={folder}/bin:{path} HOME={self.home} {environment}\n"
        )
        self.process = None

    def know(self, key):
        public = key.with_name(key.name + ".pub").read_text()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}")

    def start(self):
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # sshd insists on it
        with (self.folder / "log").open("ab") as log:
            command = [*self.server, "-D", "-e", "-f", str(self.config)]
            self.process = subprocess.Popen(command, stderr=log)
        for _ in range(1000):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        pytest.fail((self.folder / "log").read_text())

    def cut(self):
        """End all connections, as when the cable is pulled."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith("sshd"):
                    child.kill()

    def stop(self):
        if self.process is not None:
            self.cut()
            self.process.kill()
            self.process.wait()
            self.process = None

    def tool(self, name, text):
        """Put a program before the system's own on the board's PATH."""
        path = self.folder / "bin" / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    @property
    def files(self):
        return sorted(path.name for path in (self.home / FOLDER / "files").iterdir())

    def settings(self, **changes):
        values = {
            "host": "127.0.0.1",
            "port": self.port,
            "identity": str(self.key),
            "known_hosts": str(self.known_hosts),
            "user": self.user,
            "python": self.python,
            "folder": str(self.home / FOLDER),
            "backoff_s": 0.05,
            "connect_timeout_s": 5,
        }
        return SshSettings(**(values | changes))
