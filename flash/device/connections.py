"""Connections to devices over ssh or adb: the settings `device.ssh` and `device.android`."""

import re
from dataclasses import dataclass

from flash.errors import require

# No leading dash: ssh and adb would take the word for an option.
_NAME = re.compile(r"[A-Za-z0-9_\[:][A-Za-z0-9_.:%\[\]-]*")


@dataclass(kw_only=True)
class SshSettings:
    """A board with Python and ExecuTorch's wheel, behind OpenSSH's client.

    What is null here is left to ssh and its own configuration, so an alias of `~/.ssh/config` is
    enough. Host keys are always checked and passwords never asked for.
    """

    host: str = ""
    """Name, address, or alias of ssh's configuration."""
    user: str | None = None
    """Name to log in as; null is left to ssh."""
    port: int | None = None
    """TCP port; null is left to ssh."""
    identity: str | None = None
    """File of the private key; null is left to ssh."""
    known_hosts: str | None = None
    """File with the host's public key; no other file is then believed; null is left to ssh."""
    python: str = "python3"
    """Python on the board, of an environment with executorch; a name or a path there."""
    folder: str = ".cache/flash"
    """Folder for files on the board; relative to the home folder."""
    connect_timeout_s: int = 10
    """Allowed for one connection to be made [s]."""
    push_timeout_s: float = 600.0
    """Allowed for one file to be copied [s]."""
    retries: int = 4
    """Further tries after the connection failed."""
    backoff_s: float = 1.0
    """Wait before the first of them; doubles each time, at most 30 s [s]."""
    keep_mib: int = 4096
    """Programs kept on the board; beyond it the ones unused for longest are removed [MiB]."""

    def __post_init__(self) -> None:
        if self.host:
            _check_name("host", self.host)
        if self.user is not None:
            _check_name("user", self.user)
        if self.port is not None:
            require(0 < self.port < 65536, "port", self.port, "1 to 65535")
        _check_word("python", self.python)
        for name in ("python", "folder"):
            value = getattr(self, name)
            meant = "a path from the home folder, without ~, or from /"
            require(not value.startswith("~"), name, repr(value), meant)
        timeout = self.connect_timeout_s
        require(timeout >= 1, "connect_timeout_s", timeout, "1 or more")
        _check_common(self)

    def check(self) -> None:
        """Raise an InputError if a value that only the user knows is missing."""
        _check_name("device.ssh.host", self.host)


@dataclass(kw_only=True)
class AndroidSettings:
    """A phone behind adb, on which ExecuTorch's `llama_main` runs programs."""

    serial: str | None = None
    """Serial number of the phone, as `adb devices` lists it; null means the only one."""
    adb: str = "adb"
    """The adb client."""
    server_port: int | None = None
    """Port of the adb server; null means adb's own default."""
    runner: str = ""
    """llama_main built for the phone, see scripts/build_llama_main.sh."""
    tokenizer: str = ""
    """tokenizer.json with the programs' vocabulary; prompts of exact lengths are made with it."""
    folder: str = "/data/local/tmp/flash"
    """Folder for files on the phone."""
    cool_below_c: float | None = 38.0
    """A process starts only below this temperature; null does not wait [degrees C]."""
    cool_timeout_s: float = 600.0
    """Allowed for the phone to cool down [s]."""
    hot_above_c: float | None = 45.0
    """A process that leaves the phone hotter is thrown away; null keeps all [degrees C]."""
    allow_capped: bool = False
    """Accept clocks that the system holds below the hardware's, for a phone that always does."""
    throttled_retries: int = 5
    """Throttled processes in a row before the phone is given up."""
    push_timeout_s: float = 600.0
    """Allowed for one file to be copied [s]."""
    reconnect_timeout_s: float = 60.0
    """Allowed for a phone that vanished to come back, before each further try [s]."""
    retries: int = 4
    """Further tries after the connection failed."""
    backoff_s: float = 1.0
    """Wait before the first of them; doubles each time, at most 30 s [s]."""
    keep_mib: int = 4096
    """Programs kept on the phone; beyond it the ones unused for longest are removed [MiB]."""

    def __post_init__(self) -> None:
        if self.serial is not None:
            _check_word("serial", self.serial, "a serial number as `adb devices` lists it")
        _check_word("adb", self.adb)
        if self.server_port is not None:
            port = self.server_port
            require(0 < port < 65536, "server_port", port, "1 to 65535")
        require(self.folder.startswith("/"), "folder", self.folder, "an absolute path")
        for name in ("cool_timeout_s", "throttled_retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        timeout = self.reconnect_timeout_s
        require(timeout > 0, "reconnect_timeout_s", timeout, "above 0")
        _check_common(self)

    def check(self) -> None:
        """Raise an InputError that names a value that only the user knows and that is missing."""
        for name, meant in (
            ("runner", "the path of a llama_main; scripts/build_llama_main.sh builds one"),
            ("tokenizer", "the path of the tokenizer.json of the programs' vocabulary"),
        ):
            require(bool(getattr(self, name)), f"device.android.{name}", "", meant)


def _check_common(settings: SshSettings | AndroidSettings) -> None:
    _check_word("folder", settings.folder)
    for name in ("retries", "backoff_s", "keep_mib"):
        value = getattr(settings, name)
        require(value >= 0, name, value, "0 or more")
    timeout = settings.push_timeout_s
    require(timeout > 0, "push_timeout_s", timeout, "above 0")


def _check_name(key: str, value: str) -> None:
    require(_NAME.fullmatch(value) is not None, key, repr(value), "a name or an address")


def _check_word(
    key: str, value: str, meant: str = "a path without a leading dash or control characters"
) -> None:
    legal = value.strip() != "" and value.isprintable() and not value.startswith("-")
    require(legal, key, repr(value), meant)
