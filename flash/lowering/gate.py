"""The parity gate: comparisons of a program with the float decoder, from rounding to the .pte file.

`flash.lowering.rounding_check` compares the rounded decoder with the float one on a longer text,
before the lowering. Here the same text goes through the decoder that is lowered and three versions
of its program: the module with a KV cache in eager mode, the exported program, and the .pte in
ExecuTorch's runtime. They are fed as on a device, a prefill in two chunks and then one token at a
time, and each is compared with the one before it. A gate that fails names the first step that
changed the logits too much.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from flash import progress
from flash.arch import CacheFormat, Quantization
from flash.log_filters import quiet
from flash.lowering.lower import METHOD, export_module, quantized_module, serialize
from flash.lowering.modules import load_custom_ops
from flash.lowering.parity_metrics import ParityLimits, max_relative_error, mean_kl
from flash.lowering.rounding_check import RoundingCheck
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.decoder import Decoder
from flash.terminal import table

Step = Callable[[Tensor, Tensor], Tensor]
"""`(tokens [1, s], input_pos [1]) -> logits [1, vocab]`."""


class ParityStage(Enum):
    """A step of the lowering that the gate compares with the step before it."""

    cached = "cached"
    """The module with a KV cache in eager mode against the decoder without one."""
    exported = "exported"
    """The exported program against that module."""
    runtime = "runtime"
    """The .pte in ExecuTorch against the exported program."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Comparison of one stage with the stage before it."""

    stage: ParityStage
    """The stage that was compared."""
    error: float
    """Largest difference of a logit, divided by the largest logit."""
    kl: float
    """Mean KL divergence from the stage before [nats]."""
    agreement: float
    """Share of positions whose likeliest token stayed the same."""
    passed: bool
    """True if the stage is within its limits."""
    rule: str
    """The limits in words."""


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """Results of one run of the gate."""

    stages: list[StageResult]
    """Every stage that ran, in order."""
    rounding: RoundingCheck | None = None
    """Comparison of the rounded decoder with the float one; None for fp32."""
    where: str | None = None
    """Part of the model that `locate_failure` found after a failed gate; None before."""

    @property
    def first_failure(self) -> ParityStage | None:
        """The first stage beyond its limits; None if all passed."""
        return next((result.stage for result in self.stages if not result.passed), None)

    @property
    def passed(self) -> bool:
        """True if the rounding and every stage that ran are within their limits."""
        rounding = self.rounding is None or self.rounding.passed
        return rounding and self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [{**asdict(result), "stage": result.stage.value} for result in self.stages]
        failure = self.first_failure
        return {
            "passed": self.passed,
            "first_failure": failure.value if failure else None,
            "where": self.where,
            "rounding": self.rounding.to_dict() if self.rounding else None,
            "stages": stages,
        }

    def __str__(self) -> str:
        rows = [
            [r.stage.value, "ok" if r.passed else "FAIL", f"{r.error:.1e}", f"{r.kl:.1e}"]
            + [f"{r.agreement:.2f}", r.rule]
            for r in self.stages
        ]
        return table([["stage", "result", "error", "kl", "agreement", "limits"], *rows])


@torch.no_grad()
def check_parity(
    model: Decoder,
    lowering: LoweringSettings,
    text: Int[Tensor, " n"],
    gate: GateSettings | None = None,
    *,
    program: bytes | None = None,
    last_stage: ParityStage = ParityStage.runtime,
) -> GateReport:
    """Compare the stages of the lowering on real text.

    Args:
        model: The decoder that is lowered: rounded, or in float32 for a program in fp32.
        lowering: Formats and lengths of the program.
        text: Token ids of real text, at least `gate.tokens` of them.
        gate: Lengths and limits; the defaults if None.
        program: The .pte to check; lowered here if None.
        last_stage: The stage to end with. Nothing is exported or lowered for later ones.

    Raises:
        InputError: The text or the program's cache is too short for the gate.
    """
    gate = gate or GateSettings()
    gate.check_fits({"text": len(text), "max_context": lowering.max_context})
    text = text[: gate.tokens].long()
    positions = slice(gate.prefill_tokens - 1, None)
    before = model(text[None])[0, positions].float()
    module = quantized_module(model, lowering)
    steps: dict[ParityStage, Callable[[], Step]] = {ParityStage.cached: lambda: module}
    if last_stage is not ParityStage.cached:
        exported = export_module(module, lowering)
        # Made before the passes, which drop the buffers that no layer uses.
        exported_step = exported.module()
        steps[ParityStage.exported] = lambda: exported_step
        if last_stage is ParityStage.runtime:
            data = serialize(exported) if program is None else program
            steps[ParityStage.runtime] = lambda: load_runtime_step(data)
    progress.stage("comparison of logits")
    with quiet():
        logits = {stage: _run(step(), text, gate, lowering) for stage, step in steps.items()}
    results = []
    for stage, after in logits.items():
        results.append(_compare(stage, before, after, gate, lowering))
        before = after
    return GateReport(stages=results)


def _run(
    step: Step, text: Int[Tensor, " n"], gate: GateSettings, lowering: LoweringSettings
) -> Float[Tensor, "p vocab"]:
    """Last-position logits of the prefill, then those of every decode step."""
    chunk = min(gate.prefill_tokens // 2, lowering.chunk)
    out = None
    for start in range(0, gate.prefill_tokens, chunk):
        stop = min(start + chunk, gate.prefill_tokens)
        out = step(text[None, start:stop], torch.tensor([start]))
    assert out is not None  # a gate prefills at least two tokens
    rows = [out.clone()]
    for position in range(gate.prefill_tokens, gate.tokens):
        row = step(text[None, position : position + 1], torch.tensor([position]))
        rows.append(row.clone())
    return torch.cat(rows).float()


def load_runtime_step(program: bytes) -> Step:
    """Load a .pte into ExecuTorch's runtime, in this process, as a function of its inputs."""
    load_custom_ops()
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program)
    method = loaded.load_method(METHOD)
    assert method is not None

    def step(tokens: Tensor, position: Tensor) -> Tensor:
        # A method does not keep its program alive: without this reference the call crashes.
        assert loaded is not None
        return method.execute((tokens, position))[0]

    return step


def _compare(
    stage: ParityStage,
    before: Tensor,
    after: Tensor,
    gate: GateSettings,
    lowering: LoweringSettings,
) -> StageResult:
    """Judge one stage: by errors where nothing is quantized, else by distributions and choices.

    Quantized activations amplify the order of sums: the smallest difference moves single ones by a
    step, also between two forms in the same library.
    """
    error = max_relative_error(before, after)
    kl, agreement = mean_kl(before, after), _agreement(before, after)
    most_error, most_kl, least = math.inf, math.inf, 0.0
    if lowering.quantization is Quantization.fp32 and lowering.cache is CacheFormat.fp32:
        most_error = gate.max_error_fp32
    elif stage is ParityStage.cached and lowering.cache is CacheFormat.int8:
        most_kl = gate.max_kl_cache
    else:
        most_kl = gate.max_kl_runtime
        least = _least_seen(gate.min_agreement_runtime, len(before))
    limits = ParityLimits(max_error=most_error, max_kl=most_kl, min_agreement=least)
    return StageResult(
        stage=stage,
        error=error,
        kl=kl,
        agreement=agreement,
        passed=limits.accept(error, kl, agreement),
        rule=limits.rule,
    )


def _agreement(before: Tensor, after: Tensor) -> float:
    return float((before.argmax(-1) == after.argmax(-1)).float().mean())


def _least_seen(share: float, positions: int) -> float:
    """Share of so few positions below which a true one of `share` lies by chance in 1 % at most."""
    return float(stats.binom.ppf(0.01, positions, share)) / positions
