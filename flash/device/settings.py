"""Config group `device`: which device, what runs on it, and how it is timed."""

import os
import re
from dataclasses import dataclass, field
from enum import Enum

from flash.arch import GROUP, CacheFormat, Quantization
from flash.device.connections import AndroidSettings, SshSettings
from flash.device.workload import Workload
from flash.errors import require
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm


class DeviceKind(Enum):
    """How a device is reached."""

    host = "host"
    """This machine."""
    ssh = "ssh"
    """A board with Python, see `device.ssh`."""
    android = "android"
    """A phone, see `device.android`."""


class Backend(Enum):
    """What of ExecuTorch runs the large operators of a program."""

    xnnpack = "xnnpack"
    vulkan = "vulkan"
    coreml = "coreml"
    qnn = "qnn"


REFUSED = {
    Backend.vulkan: "its pattern for attention fails on custom_sdpa without a mask",
    Backend.coreml: "its converter takes no cache position that is known only at run time",
    Backend.qnn: "its compiler is in Qualcomm's kit, which ExecuTorch's wheel lacks",
}
"""Why a backend is not offered; all three were tried on our form with ExecuTorch 1.5.1."""


@dataclass(kw_only=True)
class DeviceSettings:
    """One device with the program format that suits it and the protocol of its measurements."""

    name: str
    """What results are filed under."""
    kind: DeviceKind = DeviceKind.host
    """How the device is reached."""
    threads: int = 1
    """Threads of the runtime's pool; at most the device's cores."""
    cpus: list[int] | None = None
    """CPUs that a process is pinned to; None: on the host the last `threads` that we may use,
    elsewhere the system's choice."""
    backend: Backend = Backend.xnnpack
    """What programs are lowered to; only XNNPACK so far."""
    quantization: Quantization = Quantization.int8da4w
    """Weight format of the programs."""
    group_size: int = GROUP
    """Weights that share a scale in the 4-bit format; the paper's is 32."""
    embedding_bits: int = 4
    """Bits of a weight of the embedding: 4, or 8 with a scale a row."""
    cache: CacheFormat = CacheFormat.fp32
    """KV-cache format; int8 is for phones, on x86 its attention kernel is 5 times slower."""
    attention: AttentionForm = AttentionForm.matmul
    """What attends to the cache in prefill: matrix products in XNNPACK, faster on x86 but holding
    the scores of a call, or ExecuTorch's `custom_sdpa`."""
    sliding: SlidingForm = SlidingForm.stock
    """Form of sliding-window layers: the stock ring buffer, or the ring that computes no more than
    the window."""
    skip_unread: bool = True
    """Whether prefill computes, from the last layer with attention on, only keys and values of all
    tokens and the rest of the last one: what nothing reads is left out, and logits are the same."""
    max_context: int = 1024
    """Cache slots of the programs [tokens]."""
    prefill_chunk: int | None = None
    """Most tokens of one prefill call; None means max_context, at most 256 with `attention: matmul`
    and 1024 with `sdpa` [tokens]."""
    prompts: list[int] = field(default_factory=lambda: [512])
    """Prompt lengths whose TTFT is timed; the search works on the first [tokens]."""
    contexts: list[int] = field(default_factory=lambda: [512])
    """Cache positions at which decoding is timed; the search works on the first [tokens]."""
    decode_tokens: int = 16
    """Timed decode steps of one run."""
    processes: int = 3
    """Fresh processes; the spread between processes is far larger than within one."""
    warmups: int = 2
    """Runs of each program, at its shortest prompt and context, before the timed ones."""
    runs: int = 3
    """Timed runs of each program in each process."""
    pause_s: float = 0.0
    """Time between two processes, which spreads them over more of the device's moods [s]."""
    reject_ratio: float = 1.5
    """A process slower than this many times the best is thrown away and tried once more."""
    start_timeout_s: float = 120.0
    """Allowed for a process to start and load one program [s]."""
    run_timeout_s: float = 60.0
    """Allowed for one run of one program [s]."""
    ssh: SshSettings = field(default_factory=SshSettings)
    """How a board is reached; only for kind: ssh."""
    android: AndroidSettings = field(default_factory=AndroidSettings)
    """How a phone is reached and kept cool; only for kind: android."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            "device.name",
            self.name,
            "letters, digits, '_', '-' and '.', as it becomes a folder's name",
        )
        why = REFUSED.get(self.backend)
        require(why is None, "device.backend", self.backend.value, f"xnnpack, since {why}")
        for name in ("prompts", "contexts"):
            require(bool(getattr(self, name)), f"device.{name}", "[]", "at least one length")
        for name in ("processes", "runs"):
            value = getattr(self, name)
            require(type(value) is int and value > 0, f"device.{name}", value, "1 or more")
        require(self.warmups >= 0, "device.warmups", self.warmups, "0 or more")
        require(self.threads >= 1, "device.threads", self.threads, "1 or more")
        if self.kind is DeviceKind.host:
            self._check_cores(_own_cpus())
        elif self.cpus is not None:
            self._check_cores(self.cpus)
        require(self.pause_s >= 0, "device.pause_s", self.pause_s, "0 or more")
        require(self.reject_ratio > 1, "device.reject_ratio", self.reject_ratio, "a number above 1")
        for name in ("start_timeout_s", "run_timeout_s"):
            require(getattr(self, name) > 0, f"device.{name}", getattr(self, name), "above 0")
        require(
            self.workload.context <= self.max_context,
            "device.max_context",
            self.max_context,
            f"at least {self.workload.context}, so that prompt and decode steps fit; raise it or "
            "lower device.prompts, contexts or decode_tokens",
        )

    def _check_cores(self, usable: list[int]) -> None:
        cpus = usable if self.cpus is None else self.cpus
        require(
            set(cpus) <= set(usable),
            "device.cpus",
            cpus,
            f"some of the CPUs {usable} that this process may use",
        )
        require(
            self.threads <= len(cpus), "device.threads", self.threads, f"1 to the {len(cpus)} cores"
        )

    @property
    def pinned(self) -> list[int] | None:
        """CPUs that a process is pinned to, or None."""
        if self.cpus is None and self.kind is DeviceKind.host:
            return _own_cpus()[-self.threads :]  # interrupts tend to be served by the first
        return self.cpus

    @property
    def lowering(self) -> LoweringSettings:
        """How programs for this device are written."""
        return LoweringSettings(
            quantization=self.quantization,
            group_size=self.group_size,
            embedding_bits=self.embedding_bits,
            cache=self.cache,
            attention=self.attention,
            sliding=self.sliding,
            skip_unread=self.skip_unread,
            max_context=self.max_context,
            prefill_chunk=self.prefill_chunk,
        )

    @property
    def workload(self) -> Workload:
        """What is timed on this device."""
        return Workload(
            prompts=tuple(self.prompts),
            contexts=tuple(self.contexts),
            decode_tokens=self.decode_tokens,
            prefill_chunk=self.lowering.chunk,
            threads=self.threads,
        )


def _own_cpus() -> list[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
