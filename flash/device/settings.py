"""Config group `device`: a device, the format of its programs, and how they are timed."""

import contextlib
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from flash.device.connections import AndroidSettings, SshSettings
from flash.device.workload import Workload
from flash.errors import check_name, require
from flash.lowering.settings import OF_WEIGHTS, LoweringSettings
from flash.records import plain

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment variable by which glibc asks the kernel for huge pages (`madvise`)."""


class DeviceKind(Enum):
    """Ways to reach a device."""

    host = "host"
    """This machine."""
    ssh = "ssh"
    """A board with Python, see `device.ssh`."""
    android = "android"
    """A phone, see `device.android`."""


@dataclass(kw_only=True)
class DeviceSettings:
    """One device with the program format that suits it and the protocol of its measurements."""

    name: str = ""
    """Name that results and measurements are filed under. Empty is the kind's, `host`, `phone` or
    `board`, with the phone's serial number or the board's host and port, where they are given."""
    kind: DeviceKind = DeviceKind.host
    """Way to reach the device."""
    threads: int = 1
    """Threads of the runtime's pool; at most the device's cores."""
    cpus: list[int] | None = None
    """CPUs that a process is pinned to; null: on the host the last `threads` that we may use,
    elsewhere the system's choice."""
    huge_pages: bool = False
    """Keep weights in huge pages, on Linux with glibc (host and boards): a decode step then takes
    0.86 of its time on a Xeon. Start a runner of your own with
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` for the same; true replaces your own GLIBC_TUNABLES."""
    lowering: LoweringSettings = field(default_factory=LoweringSettings)
    """Formats and lengths of the programs for this device."""
    workload: Workload = field(default_factory=Workload)
    """Latencies to time."""
    processes: int = 3
    """Fresh processes of a measurement: times spread far more between processes than within one."""
    warmups: int = 2
    """Runs of each program, at its shortest prompt and context, before the timed ones."""
    runs: int = 3
    """Timed runs of each program in each process."""
    pause_s: float = 0.0
    """Time between two processes, so that they meet different moments of a shared device [s]."""
    reject_ratio: float = 1.5
    """A process slower than this many times the best is thrown away and tried once more."""
    start_timeout_s: float = 120.0
    """Allowed for a process to start and load one program [s]."""
    run_timeout_s: float = 60.0
    """Allowed for one run of one program [s]."""
    ssh: SshSettings = field(default_factory=SshSettings)
    """Connection to a board; only for `kind: ssh`."""
    android: AndroidSettings = field(default_factory=AndroidSettings)
    """Connection to a phone, and how it is kept cool; only for `kind: android`."""

    def __post_init__(self) -> None:
        self.name = self.name or self._default_name()
        check_name("name", self.name)
        for name in ("prompts", "contexts"):
            lengths = getattr(self.workload, name)
            require(bool(lengths), f"workload.{name}", "[]", "at least one length")
        for name in ("processes", "runs"):
            value = getattr(self, name)
            require(type(value) is int and value > 0, name, value, "1 or more")
        require(self.warmups >= 0, "warmups", self.warmups, "0 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        require(
            not (self.huge_pages and self.kind is DeviceKind.android),
            "huge_pages",
            "true",
            "false with kind=android, whose C library has no such option",
        )
        if self.kind is DeviceKind.host:
            self._check_cores(_own_cpus())
        elif self.cpus is not None:
            self._check_cores(self.cpus)
        require(self.pause_s >= 0, "pause_s", self.pause_s, "0 or more")
        require(self.reject_ratio > 1, "reject_ratio", self.reject_ratio, "a number above 1")
        for name in ("start_timeout_s", "run_timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(
            self.workload.context <= self.lowering.max_context,
            "lowering.max_context",
            self.lowering.max_context,
            f"at least {self.workload.context}, so that prompt and decode steps fit; raise it or "
            "lower workload.prompts, contexts or decode_tokens",
        )

    def _default_name(self) -> str:
        """Name of the device, so that several devices of one kind have different ones."""
        kinds = {DeviceKind.ssh: "board", DeviceKind.android: "phone"}
        parts = {
            DeviceKind.ssh: (self.ssh.host, self.ssh.port),
            DeviceKind.android: (self.android.serial,),
        }
        words = [kinds.get(self.kind, "host"), *map(str, filter(None, parts.get(self.kind, ())))]
        return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-") for word in words)

    def _check_cores(self, usable: list[int]) -> None:
        cpus = usable if self.cpus is None else self.cpus
        require(
            set(cpus) <= set(usable),
            "cpus",
            cpus,
            f"some of the CPUs {usable} that this process may use",
        )
        require(self.threads <= len(cpus), "threads", self.threads, f"1 to the {len(cpus)} cores")

    def identity(self) -> dict[str, Any]:
        """Plain values that decide a latency, by the names that keys of results have always had."""
        values = plain(self)
        lowering, workload = values.pop("lowering"), values.pop("workload")
        lowering["skip_unread"] = lowering.pop("prefill_last_only")
        lowering = {key: value for key, value in lowering.items() if key not in OF_WEIGHTS}
        if not lowering["eight_bit"]:
            del lowering["eight_bit"]
        if not self.huge_pages:
            del values["huge_pages"]
        return {**values, **lowering, **workload, "backend": "xnnpack"}

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the processes that run programs."""
        return {**thread_variables(self.threads), **(HUGE_PAGES if self.huge_pages else {})}

    @property
    def pinned(self) -> list[int] | None:
        """CPUs that a process is pinned to, or None."""
        if self.cpus is None and self.kind is DeviceKind.host:
            return _own_cpus()[-self.threads :]  # interrupts tend to be served by the first
        return self.cpus

    @property
    def chosen_cpus(self) -> list[int] | None:
        """CPUs that belong to the identity: those of `cpus`, or of a mask such as taskset's."""
        if self.cpus is None and self.kind is DeviceKind.host and _own_cpus() != _all_cpus():
            return self.pinned
        return self.cpus


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables for the size of the thread pools of BLAS and OpenMP."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _own_cpus() -> list[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _all_cpus() -> list[int]:
    """CPUs of this machine or container: those that its first process may use."""
    if hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            return sorted(os.sched_getaffinity(1))
    return list(range(os.cpu_count() or 1))
