"""Time and peak memory of pruning flash_650m from a backbone file in bf16 with a shape of 1.8B.

- `prune_s`: seconds from the open file to the candidate's tensors in memory, with a warm page
  cache.
- `peak_over_candidate`: growth of the peak resident memory relative to the size of the candidate.

The backbone has random weights and is made in a temporary folder (3.6 GB).
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import SMOKE, Recorder, in_fresh_process, peak_rss_mib, rss_mib
from safetensors.torch import save_file

import conf
from flash.arch import ArchSpec
from flash.model.checkpoint import expected_shapes
from flash.model.families import to_config
from flash.prune.importance import Importance
from flash.prune.pruning import prune

ROUNDS = 1 if SMOKE else 5


def _specs() -> tuple[ArchSpec, ArchSpec]:
    backbone, winner = conf.flash_backbone(), conf.winner("flash_650m")
    if SMOKE:
        backbone = conf.small_spec(backbone)
        winner = backbone.replace(model_dim=64, ffn_dim=64)
    return backbone, winner


def _make_backbone(folder: Path, spec: ArchSpec) -> None:
    torch.manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for name, shape in expected_shapes(spec).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_config(spec)), "utf-8")


def _measure(folder: Path, result: Path) -> None:
    backbone, winner = _specs()
    torch.manual_seed(1)
    importance = Importance(
        ffn=torch.rand(backbone.num_layers, max(backbone.ffn_dims)),
        model=torch.rand(backbone.model_dim),
        layers=torch.rand(backbone.num_layers),
        heads=torch.rand(backbone.num_layers, backbone.num_heads),
        tokens=1,
        backbone="random",
    )
    before = rss_mib()
    start = time.perf_counter()
    weights = prune(folder, importance, winner)
    seconds = time.perf_counter() - start
    peak = peak_rss_mib()
    candidate = sum(w.numel() * w.element_size() for w in weights.values()) / 2**20
    values = {"prune_s": seconds, "ratio": (peak - before) / candidate, "candidate": candidate}
    result.write_text(json.dumps(values), "utf-8")


def main() -> None:
    record = Recorder("prune")
    with tempfile.TemporaryDirectory() as name:
        _make_backbone(Path(name), _specs()[0])
        runs = [in_fresh_process(__file__, "measure", name) for _ in range(ROUNDS)]
    record.add("flash_650m", "prune_s", [run["prune_s"] for run in runs], "s")
    record.add("flash_650m", "peak_over_candidate", [run["ratio"] for run in runs], "ratio")
    record.add("flash_650m", "candidate_mib", [run["candidate"] for run in runs], "MiB")
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        _measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
