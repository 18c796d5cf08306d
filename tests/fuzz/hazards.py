"""Stops of a command from outside: signals, power cuts, full disks, too little memory, clocks."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from flash import cli

_FAKETIME = Path("/usr/lib")
"""Folder below which Debian installs libfaketime."""
_MAY_MOUNT = 1 << 21
"""Linux's capability `CAP_SYS_ADMIN`."""


@dataclass(frozen=True)
class Cost:
    """Needs of a command that nothing stops.

    Attributes:
        seconds: Time that it takes [s].
        moves: Files and folders that it moves to their places.
        memory: Address space that it adds to what its process has at the start [bytes].
        disk: What its folder grows by at most [bytes].
    """

    seconds: float
    moves: int
    memory: int
    disk: int


@dataclass(frozen=True)
class Hazard:
    """One way in which a command is stopped.

    Attributes:
        what: The way in words.
        signal: Signal that the process gets; None if something else stops it.
        after_s: Time until then [s].
        group: Whether processes that it has started get the signal too.
        main: Code in place of `flash`'s main function.
        disk: Room in the command's folder [bytes]; None if there is enough.
    """

    what: str
    signal: int | None = None
    after_s: float = 0.0
    group: bool = False
    main: Callable[[], int] | None = None
    disk: int | None = None


def _of_signal(number: int) -> Callable[[Random, Cost], Hazard]:
    def hazard(random: Random, cost: Cost) -> Hazard:
        after_s, group = random.uniform(0.0, cost.seconds), random.random() < 0.5
        whom = "all its processes" if group else "it"
        name = signal.Signals(number).name
        return Hazard(f"{name} to {whom} after {after_s:.2f} s", number, after_s, group)

    return hazard


def _power(random: Random, cost: Cost) -> Hazard:
    """The power fails at a move: what was not synchronized before is empty afterwards."""
    number, moved = random.randint(1, max(1, cost.moves)), random.random() < 0.7
    when = "after" if moved else "before"

    def main() -> int:
        count, synced = 0, dict[tuple[int, int], tuple[int, int]]()
        sync = os.fsync

        def fsync(file: Any) -> None:
            sync(file)
            status = os.fstat(file if isinstance(file, int) else file.fileno())
            synced[status.st_dev, status.st_ino] = status.st_size, status.st_mtime_ns

        def lose(path: Path) -> None:
            for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
                status = file.lstat()
                now = status.st_size, status.st_mtime_ns
                if file.is_file() and synced.get((status.st_dev, status.st_ino)) != now:
                    os.truncate(file, 0)

        def cut(move: Callable[..., None]) -> Callable[..., None]:
            def moved_or_cut(source: Any, target: Any, **options: Any) -> None:
                nonlocal count
                count += 1
                if count < number:
                    move(source, target, **options)
                    return
                lose(Path(source))
                if moved:
                    move(source, target, **options)
                os.killpg(0, signal.SIGKILL)

            return moved_or_cut

        os.fsync, os.replace, os.rename = fsync, cut(os.replace), cut(os.rename)
        return cli.main()

    return Hazard(f"power fails {when} move {number}", main=main)


def _memory(random: Random, cost: Cost) -> Hazard:
    """The address space is limited."""
    extra = random.randint(0, cost.memory)

    def main() -> int:
        limit = _address_space("VmSize") + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return cli.main()

    return Hazard(f"{extra >> 20} MiB of memory", main=main)


def _disk(random: Random, cost: Cost) -> Hazard:
    """The disk has little room."""
    room = random.randint(0, cost.disk)
    return Hazard(f"{room >> 10} KiB of disk", disk=room)


HAZARDS: dict[str, Callable[[Random, Cost], Hazard]] = {
    "kill": _of_signal(signal.SIGKILL),
    "term": _of_signal(signal.SIGTERM),
    "int": _of_signal(signal.SIGINT),
    "power": _power,
    "disk": _disk,
    "memory": _memory,
}
"""Ways to stop a command, by name."""


def measured(report: Path) -> Callable[[], int]:
    """Main function of `flash` that writes the moves and the memory of the command to a file."""

    def main() -> int:
        count, began = 0, _address_space("VmSize")

        def counting(move: Callable[..., None]) -> Callable[..., None]:
            def counted(*arguments: Any, **options: Any) -> None:
                nonlocal count
                count += 1
                move(*arguments, **options)

            return counted

        os.replace, os.rename = counting(os.replace), counting(os.rename)
        try:
            return cli.main()
        finally:
            report.write_text(f"{count} {_address_space('VmPeak') - began}", "utf-8")

    return main


def _address_space(name: str) -> int:
    """Read `VmSize` or `VmPeak` of this process [bytes]."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def library_of_clocks() -> Path | None:
    """Return the path of libfaketime; None where it is not installed."""
    return next(iter(sorted(_FAKETIME.glob("*/faketime/libfaketimeMT.so.1"))), None)


def yesterday(library: Path) -> Callable[[], int]:
    """Main function of `flash`, with a clock that is a day late."""

    def main() -> int:
        words = [sys.executable, "-m", "flash", *sys.argv[1:]]
        clock = {"LD_PRELOAD": str(library), "FAKETIME": "-1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        os.execve(sys.executable, words, {**os.environ, **clock})

    return main


def can_mount() -> bool:
    """Tell whether this process may mount file systems, as root in most containers may not."""
    capabilities = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text("utf-8").splitlines()
        if line.startswith("CapEff:")
    )
    return bool(int(capabilities, 16) & _MAY_MOUNT)


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of `room` bytes beyond what `folder` has in it, in its place.

    Yields:
        A function that makes room.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(size: int, flags: int) -> None:
        options = f"size={size}".encode()
        if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, options):
            raise OSError(ctypes.get_errno(), "mount", str(folder))

    remount = 32
    mount(room, 0)
    try:
        yield lambda: mount(2**32, remount)
    finally:
        libc.umount2(bytes(folder), 2)  # lazily, as a process that ends may still be in it
