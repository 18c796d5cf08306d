"""Summary of a finished export for the terminal."""

from pathlib import Path

from flash.device.workload import Phase, Point
from flash.export.formats import FILES, FormatResult
from flash.export.result import ExportResult
from flash.export.settings import ExportFormat
from flash.terminal import wrap

ENDS = ("mean", "low", "high")
"""Keys of a predicted latency: its mean and the ends of its interval."""
_NOTABLE = 0.01
"""Change of the machine's speed since the search that is said."""


def describe_format(name: str, kind: ExportFormat, result: FormatResult, folder: Path) -> None:
    """Print a published format in a few lines."""
    print(f"\n{name}: {folder / FILES[kind]}, {result.size_bytes / 2**20:.2f} MiB")
    print(wrap(f"  {result.check}", "    "))


def one_line(result: ExportResult) -> str:
    """Time to first token and decode speed at the first point of each, and the program's size."""
    parts: dict[Phase, str] = {}
    for name, latency in result.measurement.latencies.items():
        point = Point.parse(name)
        speed = f"{1e3 / latency.ms:.0f} tokens/s"
        ttft = f"TTFT {latency.ms:.1f} ms for {point.tokens} tokens"
        parts.setdefault(point.phase, ttft if point.phase is Phase.prefill else speed)
    return ", ".join([*parts.values(), f"{result.pte_bytes / 2**20:.2f} MiB"])


def describe(result: ExportResult, folder: Path) -> None:
    """Print a measured program in a few lines."""
    measured = result.measurement

    def row(text: str) -> None:
        print(wrap(f"  {text}", " " * 14))

    print(wrap(f"\n{result.name}: {result.spec}, {result.parameters / 1e6:.2f}M parameters"))
    row(f"program     {folder / 'model.pte'}, {result.pte_bytes / 2**20:.2f} MiB")
    row(
        "parity      passed: "
        + ", ".join(f"{stage['stage']} kl {stage['kl']:.1e}" for stage in result.gate["stages"])
    )
    for name, latency in measured.latencies.items():
        point = Point.parse(name)
        if point.phase is Phase.prefill:
            text = (
                f"TTFT        {latency.ms:.1f} +- {latency.se_ms:.1f} ms for {point.tokens} tokens"
            )
        else:
            text = (
                f"decode      {latency.ms:.3g} ms a token, {1e3 / latency.ms:.0f} tokens/s at "
                f"context {point.tokens}"
            )
        if name in result.speedups:
            text += f", {result.speedups[name]:.2f}x over {result.reference}"
        if result.predicted is not None and name in result.predicted:
            mean, low, high = (result.predicted[name][f"{end}_ms"] for end in ENDS)
            text += f"; predicted {mean:.3g} [{low:.3g}, {high:.3g}] ms"
            slowdown = result.predicted[name].get("slowdown", 1.0)
            if abs(slowdown - 1) > _NOTABLE:
                text += f", as the machine now takes {slowdown:.2f} times as long as in the search"
        row(text)
    quality = result.program_quality
    row(
        f"held-out    {result.quality.loss:.3f} nats a token; as .pte, perplexity "
        f"{quality.change} and {100 * quality.agreement:.0f} % equal choices on "
        f"{quality.change.tokens} tokens"
    )
    row(f"it writes   {result.prompt!r} -> {result.completion!r}")
