"""Former names of configuration keys and options, for errors that tell a user the present one."""

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
        )
    },
    "device.prefill_last_only": "device.lowering.prefill_last_only",
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
"""Present key by former key."""

REMOVED = {
    "device.backend": "programs are lowered to XNNPACK only; leave it out (see docs/devices.md)",
}
"""Remedy by former key that has no successor."""

OPTIONS = {"latency=physical": "latency=analytical"}
"""Present option of a group by former option."""


def present_name(key: str) -> str | None:
    """Hint for a key that was renamed or removed, or None for a key that never was."""
    for former, present in KEYS.items():  # also within stages (then.ift.data.heldout) and groups
        start, found, rest = key.partition(former)
        if found and start[-1:] in {"", "."} and rest[:1] in {"", ".", "["}:
            return f"renamed to {start}{present}{rest}"
    return REMOVED.get(key)
