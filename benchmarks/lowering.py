"""Seconds of lowering a layer: our path, and the stock passes on the same model.

Alternated in one process after a warm-up. Lowering a whole model costs a fixed part and a part a
layer; the latter is the difference of a deep and a shallow model over the difference of depths.
"""

import time

import torch
from record import Recorder

from flash.arch import ArchSpec, parse_pattern
from flash.lowering import LoweringSettings, lower
from flash.model import Decoder

ROUNDS = 3
SHALLOW, DEEP = 2, 6


def _seconds(layers: int, fast: bool) -> float:
    spec = ArchSpec(
        model_dim=256,
        ffn_dim=576,
        layer_types=parse_pattern("F" * layers),
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=2048,
    )
    torch.manual_seed(0)
    model = Decoder(spec)
    start = time.perf_counter()
    lower(model, LoweringSettings(max_context=1024), fast=fast)
    return time.perf_counter() - start


def main() -> None:
    record = Recorder("lowering")
    _seconds(1, fast=True)
    per_layer: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for fast in per_layer:
            shallow, deep = _seconds(SHALLOW, fast), _seconds(DEEP, fast)
            per_layer[fast].append((deep - shallow) / (DEEP - SHALLOW))
    record.add("8da4w/fast", "lower_s_per_layer", per_layer[True], "s")
    record.add("8da4w/stock_passes", "lower_s_per_layer", per_layer[False], "s")
    ratios = [a / b for a, b in zip(per_layer[True], per_layer[False], strict=True)]
    record.add("8da4w", "time_ratio_vs_stock_passes", ratios, "ratio")
    record.close()


if __name__ == "__main__":
    main()
