"""A scripted phone: the parts of adb's daemon over TCP that the tests need.

It implements the protocol of the real adb server: CNXN and AUTH, streams (OPEN, OKAY, data, CLSE),
`shell,v2` with stdout, stderr and exit codes, and `sync:` with STAT, SEND, RECV and QUIT. Its file
system is a folder: absolute paths of Android in commands are moved into it, and a real `sh` runs
the commands with the phone's own programs (`getprop`, `dumpsys`, `taskset`) before the host's.
"""

import contextlib
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

VERSION = 0x01000001
WRITE = b"WRTE"  # codespell:ignore wrte
MAX_DATA = 1 << 18
STDOUT, STDERR, EXIT = 1, 2, 3
MOVED = ("/data/local/tmp", "/sys/")


class Phone:
    """One phone; `adb connect` finds it at `port`.

    Attributes:
        authorized: Whether it trusts this computer; otherwise it asks for proof forever.
        full: Whether its storage is full.
        cut_push_after: Number of bytes of a file after which the connection is cut once.
        cut_run_of: Text of a command at whose start the connection is cut once.
        shells: Every shell command that it received.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("data/local/tmp", "bin", "sys/devices/system/cpu"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.authorized, self.full = True, False
        self.cut_push_after: int | None = None
        self.cut_run_of: str | None = None
        self.shells: list[str] = []
        self._connections: list[Connection] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.plug()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def plug(self) -> None:
        """Listen for the adb server, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        """Disappear: cut all connections and stop listening."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """End all connections, as a loose cable does."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def path(self, name: str) -> Path:
        """Path of a file of the phone on this machine."""
        return self.root / name.lstrip("/")

    def install(self, name: str, text: str) -> None:
        """Install a shell script as a program on the phone's PATH."""
        path = self.root / "bin" / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    def moved(self, command: str) -> str:
        """Move the absolute paths of a command into the folder of this phone."""
        for prefix in MOVED:
            command = command.replace(prefix, f"{self.root}{prefix}")
        return command

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = Connection(self, listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class Connection:
    """Connection of one adb server."""

    def __init__(self, phone: Phone, link: socket.socket) -> None:
        self.phone, self.link = phone, link
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)
        self.link.close()
        for stream in list(self.streams.values()):
            stream.end()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack(
            "<4s5I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF
        )
        with self.lock, contextlib.suppress(OSError):
            self.link.sendall(header + data)

    def serve(self) -> None:
        """Answer messages until the connection ends."""
        with contextlib.suppress(OSError, EOFError), self.link.makefile("rb") as source:
            while True:
                command, first, second, length, _, _ = struct.unpack("<4s5I", take(source, 24))
                self.handle(command, first, second, take(source, length))
        self.close()

    def handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command in {b"CNXN", b"AUTH"}:
            if self.phone.authorized:
                banner = b"device::ro.product.name=fake;ro.product.model=Fake;features=shell_v2,cmd"
                self.send(b"CNXN", VERSION, MAX_DATA, banner)
            elif first != 3:  # after its public key there is nothing more to ask for
                self.send(b"AUTH", 1, 0, os.urandom(20))
        elif command == b"OPEN":
            stream = Stream(self, len(self.streams) + 1, first)
            self.streams[stream.mine] = stream
            self.send(b"OKAY", stream.mine, first)
            threading.Thread(target=stream.run, args=(data,), daemon=True).start()
        elif second in self.streams:
            stream = self.streams[second]
            if command == b"OKAY":
                stream.ready.release()
            elif command == WRITE:
                os.write(stream.inlet, data)
                self.send(b"OKAY", second, first)
            elif command == b"CLSE":
                stream.end()


class Stream:
    """One service that the adb server opened."""

    def __init__(self, connection: Connection, mine: int, theirs: int) -> None:
        self.connection, self.phone = connection, connection.phone
        self.mine, self.theirs = mine, theirs
        self.ready = threading.Semaphore(1)
        outlet, self.inlet = os.pipe()
        self.source = os.fdopen(outlet, "rb")

    def write(self, data: bytes) -> None:
        """Send data; each message waits until the one before has arrived."""
        for start in range(0, len(data), MAX_DATA):
            self.ready.acquire(timeout=10)
            part = data[start : start + MAX_DATA]
            self.connection.send(WRITE, self.mine, self.theirs, part)

    def end(self) -> None:
        if self.inlet >= 0:
            inlet, self.inlet = self.inlet, -1
            os.close(inlet)
        self.ready.release()

    def run(self, service: bytes) -> None:
        name, _, rest = service.rstrip(b"\0").decode().partition(":")
        with contextlib.suppress(OSError, EOFError):
            if name.startswith("shell"):
                self.shell(rest)
            elif name == "sync":
                self.sync()
        self.connection.send(b"CLSE", self.mine, self.theirs)
        self.source.close()

    def shell(self, command: str) -> None:
        self.phone.shells.append(command)
        child = subprocess.Popen(
            ["sh", "-c", self.phone.moved(command)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": f"{self.phone.root}/bin:{os.environ['PATH']}"},
            cwd=self.phone.root, start_new_session=True,
        )  # fmt: skip
        mark = self.phone.cut_run_of
        if mark is not None and mark in command:
            self.phone.cut_run_of = None
            self.phone.cut()  # the command goes on, as it may on a real phone
        out, err = child.communicate()
        code = child.returncode
        for kind, data in ((STDOUT, out), (STDERR, err), (EXIT, bytes([code & 0xFF]))):
            if data:
                self.write(struct.pack("<BI", kind, len(data)) + data)

    def sync(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", take(self.source, 8))
            name = take(self.source, length).decode()
            if request == b"QUIT":
                return
            if request == b"STAT":
                self.write(b"STAT" + struct.pack("<3I", *self.stat(self.phone.path(name))))
            elif request == b"SEND":
                self.receive(self.phone.path(name.rpartition(",")[0]))
            elif request == b"RECV":
                content = self.phone.path(name).read_bytes()
                self.write(b"DATA" + struct.pack("<I", len(content)) + content)
                self.write(b"DONE" + bytes(4))

    def stat(self, path: Path) -> tuple[int, int, int]:
        if not path.exists():
            return 0, 0, 0
        found = path.stat()
        return found.st_mode, found.st_size, int(found.st_mtime)

    def receive(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        limit = self.phone.cut_push_after
        received = 0
        with path.open("wb") as file:
            while True:
                kind, length = struct.unpack("<4sI", take(self.source, 8))
                if kind == b"DONE":
                    break
                data = take(self.source, length)
                if not self.phone.full:
                    file.write(data)
                    file.flush()
                received += length
                if limit is not None and received >= limit:
                    self.phone.cut_push_after = None
                    self.phone.cut()
                    raise EOFError
        if self.phone.full:
            path.unlink()
            self.write(b"FAIL" + struct.pack("<I", 23) + b"No space left on device")
        else:
            self.write(b"OKAY" + bytes(4))


def take(source, count: int) -> bytes:
    """Read exactly `count` bytes, or raise EOFError."""
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data
