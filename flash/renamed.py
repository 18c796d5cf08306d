"""Former names: of configuration keys, for error messages, and of keys in results of old runs."""

from collections.abc import Collection, Mapping
from typing import Any

KEYS = {
    **{
        f"device.{name}": f"device.lowering.{name}"
        for name in (
            "quantization",
            "group_size",
            "embedding_bits",
            "cache",
            "attention",
            "sliding",
            "max_context",
            "prefill_chunk",
            "rounding",
            "rotate",
        )
    },
    "device.skip_unread": "device.lowering.prefill_last_only",
    **{
        f"device.{name}": f"device.workload.{name}"
        for name in ("prompts", "contexts", "decode_tokens")
    },
    "data.source": "data.kind",
    "data.parts": "data.sources",
    "data.lanes": "data.logical_shards",
    "data.heldout": "data.validation",
    "data.heldout_percent": "data.validation_percent",
    "data.heldout_sequences": "data.validation_sequences",
    "form": "format",
}
"""Present name of each renamed key."""

REMOVED = {
    "device.backend": "programs are lowered to XNNPACK only; leave it out (see docs/devices.md)",
}
"""Advice for each removed key."""

OPTIONS = {"latency=physical": "latency=analytical"}
"""Present name of each renamed option of a group."""

VALUES = {"latency.predictor=physical": "latency.predictor=analytical"}
"""Present name of each renamed value."""

RESULT_KEYS = {
    "artefact": "program_quality",
    "artefact_loss": "file_loss",
    "pte_loss": "loss",
}
"""Present name of each renamed key of a result file, such as `export.json`."""


def present_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object of a result file with the present names of its keys."""
    return {RESULT_KEYS.get(key, key): value for key, value in values.items()}


def present_name(key: str, roots: Collection[str]) -> str | None:
    """Return a hint for a renamed or removed key; None for any other key.

    Args:
        key: The whole key, as typed.
        roots: Keys at the top of the command's configuration.
    """
    for former, present in KEYS.items():  # also below stages (then.ift.data.heldout)
        start, found, rest = key.partition(former)
        whole = start == "" or (start.endswith(".") and "." in former)
        if found and whole and rest[:1] in {"", ".", "["}:
            now = f"{start}{present}{rest}"
            return f"renamed to {now}" if now.partition(".")[0] in roots else None
    return REMOVED.get(key)
