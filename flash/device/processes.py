"""Child processes that cannot hang and whose output cannot fill the memory."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from flash.errors import DeviceError, InputError, printable, short

LARGEST_OUTPUT = 256 << 20
"""Most bytes that a process may print; the largest honest answers are results with logits."""
_LOOK_S = 0.2
"""Time between two looks at a running process [s]."""
_LONGEST_TEXT = 300
"""Most characters of foreign text that an error repeats."""


class TooMuchOutput(DeviceError):
    """A process was killed, since it had printed more than `LARGEST_OUTPUT`."""


@dataclass(frozen=True)
class Output:
    """Result of a finished command.

    Attributes:
        code: Exit code; minus the number of the signal that has killed it.
        out: Text on stdout.
        err: Text on stderr, of a remote command also from the client program.
    """

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line that is not blank, as an error may repeat it."""
        lines = [line for line in (self.out + "\n" + self.err).splitlines() if line.strip()]
        return brief(lines[-1].strip()) if lines else "no message"


def brief(text: str) -> str:
    """Return foreign text as a short printable line."""
    return short(printable(text), _LONGEST_TEXT)


def run_bounded(
    command: Sequence[str],
    timeout_s: float,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Output:
    """Run a process to its end; it is killed when it is late, prints too much, or we are stopped.

    Args:
        command: Program and arguments.
        timeout_s: Time after which it is killed [s].
        stdin: Its input. `subprocess.PIPE` is a pipe that stays open and empty, so that the other
            end sees end-of-file only when this process or the connection dies.
        environment: Its environment; None is our own.

    Raises:
        InputError: This machine has no such program, or cannot run it.
        TooMuchOutput: It printed more than `LARGEST_OUTPUT`.
        subprocess.TimeoutExpired: It took longer than `timeout_s`.
    """
    # Files instead of pipes: ssh and adb leave helpers behind that would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=err, env=environment)
        except FileNotFoundError:
            raise InputError(
                f"{command[0]}: no such program on this machine; install it (Debian's "
                "openssh-client for ssh, adb for phones)"
            ) from None
        except OSError as error:
            raise InputError(f"{command[0]}: cannot be run ({error.strerror})") from None
        watch = _Watch(child, (out, err), timeout_s)
        try:
            code = child.wait()
        except BaseException:  # Ctrl-C included: leave no process behind
            child.kill()
            child.wait()
            raise
        finally:
            watch.end()
            if child.stdin is not None:
                child.stdin.close()
        if watch.late:
            raise subprocess.TimeoutExpired(command, timeout_s)
        if watch.size() > LARGEST_OUTPUT:
            raise TooMuchOutput(
                f"{command[0]} was ended, as it printed over {LARGEST_OUTPUT >> 20} MiB"
            )
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Output(code, *texts)


class _Watch:
    """Thread that kills a process which is late or prints too much.

    `Popen.wait` with a time-out looks only every 50 ms, longer than most commands take.
    """

    def __init__(
        self, child: subprocess.Popen[bytes], files: Sequence[IO[bytes]], timeout_s: float
    ) -> None:
        self.late = False
        self._child, self._files = child, files
        self._deadline = time.monotonic() + timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def size(self) -> int:
        """Bytes that the process has printed."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files)

    def end(self) -> None:
        """Stop watching, after the process has ended."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(min(_LOOK_S, max(0.0, self._deadline - time.monotonic()))):
            self.late = time.monotonic() >= self._deadline
            if self.late or self.size() > LARGEST_OUTPUT:
                self._child.kill()
                return
