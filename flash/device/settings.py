"""Config group `device`: which device, what runs on it, and how it is timed."""

import os
from dataclasses import dataclass
from enum import Enum

from flash.arch import CacheFormat, Quantization
from flash.device.workload import Workload
from flash.errors import require
from flash.lowering import LoweringSettings


class DeviceKind(Enum):
    """How a device is reached."""

    host = "host"


@dataclass(kw_only=True)
class DeviceSettings:
    """One device with the program format that suits it and the protocol of its measurements."""

    name: str
    """What results are filed under."""
    kind: DeviceKind = DeviceKind.host
    """How the device is reached."""
    threads: int = 1
    """Threads of the runtime's pool; at most the cores that this process may use."""
    quantization: Quantization = Quantization.int8da4w
    """Weight format of the programs."""
    cache: CacheFormat = CacheFormat.fp32
    """KV-cache format; int8 is for phones, on x86 its attention kernel is 5 times slower."""
    max_context: int = 1024
    """Cache slots of the programs [tokens]."""
    prefill_chunk: int | None = None
    """Most tokens of one prefill call; None means max_context, at most 1024 [tokens]."""
    prompt_tokens: int = 512
    """Prompt length of the TTFT [tokens]."""
    decode_context: int = 512
    """Cache position at which decoding is timed [tokens]."""
    decode_tokens: int = 16
    """Timed decode steps of one run."""
    processes: int = 3
    """Fresh processes; the spread between processes is far larger than within one."""
    warmups: int = 2
    """Runs of each program before the timed ones of a process."""
    runs: int = 3
    """Timed runs of each program in each process."""
    reject_ratio: float = 1.5
    """A process slower than this many times the best is thrown away and tried once more."""
    start_timeout_s: float = 120.0
    """Allowed for a process to start and load one program [s]."""
    run_timeout_s: float = 60.0
    """Allowed for one run of one program [s]."""

    def __post_init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        for name in ("processes", "runs"):
            value = getattr(self, name)
            require(type(value) is int and value > 0, f"device.{name}", value, "1 or more")
        require(self.warmups >= 0, "device.warmups", self.warmups, "0 or more")
        require(
            1 <= self.threads <= (cores or 1),
            "device.threads",
            self.threads,
            f"1 to the {cores} cores of this machine",
        )
        require(self.reject_ratio > 1, "device.reject_ratio", self.reject_ratio, "a number above 1")
        for name in ("start_timeout_s", "run_timeout_s"):
            require(getattr(self, name) > 0, f"device.{name}", getattr(self, name), "above 0")
        require(
            self.workload.context <= self.max_context,
            "device.max_context",
            self.max_context,
            f"at least {self.workload.context}, so that prompt and decode steps fit; raise it or "
            "lower device.prompt_tokens, decode_context or decode_tokens",
        )

    @property
    def lowering(self) -> LoweringSettings:
        """How programs for this device are written."""
        return LoweringSettings(
            quantization=self.quantization,
            cache=self.cache,
            max_context=self.max_context,
            prefill_chunk=self.prefill_chunk,
        )

    @property
    def workload(self) -> Workload:
        """What is timed on this device."""
        return Workload(
            prompt_tokens=self.prompt_tokens,
            decode_context=self.decode_context,
            decode_tokens=self.decode_tokens,
            prefill_chunk=self.lowering.chunk,
            threads=self.threads,
        )
