"""`RemoteDevice`: shell commands and file copies over ssh or adb, whose connection may fail.

Files are named on the device by the hash of their content, so each is sent once. A file that is
being sent has a temporary name and gets its own only after the device has verified the hash. An
action that fails because of the connection is tried again after a pause; a command that fails is
not.
"""

import functools
import logging
import os
import re
import secrets
import shlex
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TypeVar

from flash.device.base import Device
from flash.device.connections import AndroidSettings, SshSettings
from flash.device.processes import Output, TooMuchOutput, brief
from flash.device.settings import DeviceSettings
from flash.errors import DeviceError, InputError
from flash.records import digest, file_digest

SHELL_TIMEOUT_S = 60.0
"""Time limit of a short shell command [s]."""
LONGEST_WAIT_S = 30.0
"""Longest pause before another try [s]."""
IN_USE_S = 3600
"""Time after its last use for which a file is kept, since another client may need it [s]."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class ConnectionLost(Exception):
    """The connection failed, and not the command that ran over it; another try may succeed."""


class RemoteDevice(Device):
    """A device that is reached through a client program."""

    def __init__(self, settings: DeviceSettings, link: SshSettings | AndroidSettings) -> None:
        super().__init__(settings)
        link.check()
        self._link = link
        self._token = secrets.token_hex(4)  # several of us may use one device at a time

    @property
    @abstractmethod
    def where(self) -> str:
        """Name of the device in messages."""

    @abstractmethod
    def _execute(self, script: str, timeout_s: float, stdin: IO[bytes] | int) -> Output:
        """Run a line of shell on the device.

        Raises:
            subprocess.TimeoutExpired: The line took longer than `timeout_s`.
        """

    @abstractmethod
    def _failure(self, output: Output) -> Exception:
        """The exception for a client that ended before the command did."""

    @abstractmethod
    def _copy(self, path: Path, part: str) -> None:
        """Send a file to the name `part`.

        Raises:
            ConnectionLost: The file may not have arrived completely.
        """

    @abstractmethod
    def _reconnect(self) -> None:
        """Wait until the device can be reached again; called before another try.

        Raises:
            ConnectionLost: The device did not come back in time.
        """

    def _shell(
        self,
        script: str,
        *,
        timeout_s: float = SHELL_TIMEOUT_S,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
    ) -> Output:
        """Run a line of shell on the device, whatever its exit code.

        Raises:
            ConnectionLost: The connection failed.
            InputError: The client refuses, for example because of a wrong name or key.
            DeviceError: It printed too much.
            subprocess.TimeoutExpired: The line took longer than `timeout_s`.
        """
        # A client that lost the device also exits with code 255 or 1, so the code is printed. Only
        # what stands between the marks is ours: login shells print greetings before and after it.
        # The marks are new each time, so that no other command's answer is taken for this one's.
        mark = secrets.token_hex(8)
        marked = (
            f"printf '\\n%s\\n' flash-begin:{mark}; ({script}\n); "
            f"printf '\\n%s%d\\n' flash-exit:{mark}: \"$?\""
        )
        try:
            # `sh`, as the login shell may be another, such as fish.
            output = self._execute(shlex.join(["exec", "sh", "-c", marked]), timeout_s, stdin)
        except TooMuchOutput as error:
            raise DeviceError(f"{self.where}: {error}; see what prints so much there") from None
        text = output.out.replace("\r\n", "\n")  # of terminals, as phones before Android 7 have
        pattern = rf"\nflash-begin:{mark}\n(.*)\nflash-exit:{mark}:(\d{{1,3}})\n"
        found = re.search(pattern, text, re.DOTALL)
        if found is None:
            raise self._failure(output)
        return Output(int(found[2]), found[1], output.err)

    def _ask(self, script: str, stdin: IO[bytes] | int = subprocess.DEVNULL) -> str:
        """Return stdout of a short line of shell, which must succeed.

        Raises:
            ConnectionLost: The connection failed.
            DeviceError: The exit code is not 0.
        """
        try:
            output = self._shell(script, stdin=stdin)
        except subprocess.TimeoutExpired:
            raise ConnectionLost(f"no answer within {SHELL_TIMEOUT_S:.0f} s") from None
        if output.code != 0:
            raise self.refused(output)
        return output.out

    def refused(self, output: Output) -> DeviceError:
        """Make the error for one of our own commands that failed on the device."""
        text = output.out + output.err
        if "No space left" in text:
            return DeviceError(
                f"{self.where}: its storage is full; free some there (our files are in "
                f"{self._link.folder}), or lower device's keep_mib"
            )
        if "Read-only file system" in text or "Permission denied" in text:
            return DeviceError(
                f"{self.where}: the folder {self._link.folder} cannot be written "
                f"({output.last_line}); name another as device.{self.settings.kind.name}.folder"
            )
        return DeviceError(f"{self.where}: exit code {output.code}: {output.last_line}")

    def _retrying(self, action: Callable[[], T]) -> T:
        """Return the value of `action`, which is tried again after each loss of the connection.

        Raises:
            DeviceError: The last allowed try failed.
        """
        wait_s = self._link.backoff_s
        for attempt in range(self._link.retries + 1):
            try:
                if attempt:
                    self._reconnect()
                return action()
            except ConnectionLost as error:
                if attempt == self._link.retries:
                    raise DeviceError(
                        f"{self.where}: {error}; gave up after {attempt + 1} tries; check that it "
                        "is on and connected, then run the same command again"
                    ) from None
                log.warning("%s: %s; trying again in %.1f s", self.where, error, wait_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("the last try returns or raises")

    def _path(self, *parts: str) -> str:
        return "/".join((self._link.folder, *parts))

    def _place(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Send the files that the device lacks, and return the path of each file on the device."""
        names = {path: content_name(path) for path in paths}
        sizes = {name: path.stat().st_size for path, name in names.items()}
        missing = self._retrying(lambda: self._missing(sizes))
        for path, name in names.items():
            if name in missing:
                missing.discard(name)
                self._retrying(functools.partial(self._send, path, name))
                self._retrying(lambda: self._trim(set(names.values())))
        return {path: self._path("files", name) for path, name in names.items()}

    def _missing(self, sizes: Mapping[str, int]) -> set[str]:
        """Names of files that are not on the device; the others count as used now.

        A file of another size has lost its content in a power cut.
        """
        folder = shlex.quote(self._path("files"))
        pairs = shlex.join(f"{size}:{name}" for name, size in sorted(sizes.items()))
        script = (
            f"mkdir -p {folder} && cd {folder} && [ -w . ] || {{ echo 'Permission denied' >&2; "
            f'exit 1; }}; for p in {pairs}; do f="${{p#*:}}"; '
            'if [ "$(stat -c %s "$f" 2>/dev/null)" = "${p%%:*}" ]; then touch "$f"; '
            'else echo "$f"; fi; done'
        )
        return set(self._ask(script).splitlines())

    def _send(self, path: Path, name: str) -> None:
        target = self._path("files", name)
        part = f"{target}.{self._token}.part"
        try:
            self._copy(path, part)
        except DeviceError:  # a full disk: free the space that the part takes
            self._forget(shlex.join(["rm", "-f", part]))
            raise
        quoted, digest = shlex.quote(part), sha256_of(path)
        script = (
            f'sum=$(sha256sum < {quoted}) || exit; if [ "${{sum%% *}}" = {digest} ]; then '
            f"chmod 755 {quoted} && mv {quoted} {shlex.quote(target)}; "
            f"else rm -f {quoted}; echo damaged; fi"
        )
        if self._ask(script).strip():
            raise ConnectionLost(f"{path.name} arrived damaged")

    def _trim(self, needed: set[str]) -> None:
        """Remove the least recently used files until the rest fits into `keep_mib`."""
        folder = shlex.quote(self._path("files"))
        answer = self._ask(
            f"cd {folder} && date +%s && for f in *; do stat -c '%Y %s %n' \"$f\"; done"
        )
        first, *lines = answer.splitlines()
        now = self._number(first)
        found = (re.fullmatch(r"(-?\d{1,18}) (\d{1,18}) (.+)", line) for line in lines)
        files = sorted((int(f[1]), int(f[2]), f[3]) for f in found if f is not None)
        total = sum(size for _, size, _ in files)
        doomed = []
        for used, size, name in files:
            # A time to come is one from before the board's clock was set.
            idle = abs(now - used) > IN_USE_S
            over = total > self._link.keep_mib << 20 or name.endswith(".part")
            if idle and over and name not in needed:
                doomed.append(name)
                total -= size
        if doomed:
            self._ask(f"cd {folder} && {shlex.join(['rm', '-f', '--', *doomed])}")

    def _number(self, text: str) -> int:
        """Convert an answer of the device.

        Raises:
            DeviceError: It is no number.
        """
        found = re.fullmatch(r"\s*(\d{1,18})\s*", text)
        if found is None:
            raise DeviceError(f"{self.where}: expected a number, answers {brief(text)!r}")
        return int(found[1])

    def _forget(self, script: str) -> None:
        """Clean up on the device if it can be reached; a failure is only logged."""
        try:
            self._shell(script, timeout_s=10.0)
        except (ConnectionLost, InputError, DeviceError, subprocess.TimeoutExpired) as error:
            log.debug("%s: could not tidy up: %s", self.where, error)

    def _check_cores(self, cores: int) -> None:
        """Check the threads and CPUs of the settings against the device's number of cores.

        Raises:
            InputError: The settings ask for more than the device has.
        """
        threads, cpus = self.settings.threads, self.settings.cpus
        if cpus is not None and max(cpus, default=-1) >= cores:
            raise InputError(f"device.cpus={cpus}: expected 0 to {cores - 1} on {self.where}")
        if threads > cores:
            raise InputError(
                f"device.threads={threads}: expected 1 to the {cores} cores of {self.where}"
            )


def content_name(path: Path) -> str:
    """Name of a file on devices: the first digits of its SHA-256, and its suffix if it is plain."""
    known = re.fullmatch(r"\.\w+", path.suffix, re.ASCII)  # others would be words of a shell
    return sha256_of(path)[:32] + (path.suffix if known else "")


def unit_of(serial: str) -> str:
    """Name of one piece of hardware in its identity, which may be published: a hash."""
    return digest(serial, 12)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; computed again only if the file has changed."""
    state = os.stat(path)
    return _digest(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    return file_digest(path)
