"""The paper's Table 6 on this machine: TTFT and decoding of Flash and its baselines.

    python benchmarks/table6.py [CONTEXT...]        # 1024 2048

Models have random weights in the true shapes, and run one after the other in their own processes,
cheap ones first. `ttft_s` and `decode_tok_s` are medians over the best times of the processes.
Results of an earlier, stopped run in `runs/shapes` are reused; the kept file grows with every
model.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import yaml
from record import SMOKE, Recorder, in_fresh_process, output

import conf
from flash.arch import ArchSpec
from flash.device.factory import open_device
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.export.random_weights import ShapeResult, measure_shape, shape_of
from flash.export.table6 import table6
from flash.interop.baselines import StockModel
from flash.latency.programs import Shape
from flash.lowering.settings import LoweringSettings
from flash.model.settings import BackboneSettings
from flash.paths import Runs

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "flash_350m",
    "lfm2_350m",
    "gemma3_270m",
    "flash_650m",
    "lfm2_700m",
    "qwen3_0_6b",
    "flash_1_4b",
    "lfm2_1_2b",
    "llama3_2_1b",
    "gemma3_1b",
)
"""Models in order of their cost."""
CONTEXTS = [1024, 2048]
RUNS = Runs(output(ROOT / "runs"))
if SMOKE:
    MODELS, CONTEXTS = ("flash_350m", "lfm2_350m"), [16, 32]
MEASURE = "measure"


def device_settings(contexts: list[int]) -> DeviceSettings:
    """Return settings as in conf/experiment/table6.yaml, with fewer runs and no warm-up."""
    return DeviceSettings(
        name="host",
        processes=2,
        warmups=0,
        runs=1,
        run_timeout_s=600.0,
        lowering=LoweringSettings(max_context=max(contexts) + 32),
        workload=Workload(prompts=contexts, contexts=contexts),
    )


def shape(name: str) -> Shape:
    """Return the shape in conf/arch/NAME.yaml; ours are whole specs."""
    arch = yaml.safe_load((ROOT / "conf" / "arch" / f"{name}.yaml").read_text("utf-8"))
    arch.pop("defaults", None)
    if "stock" in arch:
        found = shape_of(arch, BackboneSettings(name="none"))
        return small_stock(found) if SMOKE else found
    spec = ArchSpec.from_dict(arch)
    return conf.small_spec(spec) if SMOKE else spec


def small_stock(model: Shape) -> Shape:
    """Return a baseline with the kinds of its first three layers, narrow."""
    assert isinstance(model, StockModel)
    changes = {"dim": 128, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}
    layers = {"n_layers": 3, "layer_types": model.params["layer_types"][:3]}
    return dataclasses.replace(model, params={**model.params, **changes, **layers})


def add(record: Recorder, result: ShapeResult) -> None:
    """Record the results of one model, with a value for each process that was kept."""
    samples = [sample for sample in result.measurement.samples if sample["accepted"]]
    for name in result.measurement.latencies:
        point = Point.parse(name)
        case = f"{result.name}/{point.tokens}"
        if point.phase is Phase.prefill:
            times = [min(run["wall_s"] for run in sample[name]) for sample in samples]
            record.add(case, "ttft_s", times, "s")
        else:
            steps = [min(min(run["steps_ms"]) for run in sample[name]) for sample in samples]
            record.add(case, "decode_tok_s", [1e3 / step for step in steps], "tokens/s")


def main(contexts: list[int]) -> None:
    record, done = Recorder("table6"), []
    for name in MODELS:
        result = in_fresh_process(__file__, MEASURE, name, *map(str, contexts))
        done.append(ShapeResult.read(Path(result["path"])))
        add(record, done[-1])
        record.close()
        print(table6(done), file=sys.stderr, flush=True)


def measure(name: str, contexts: list[int], answer: Path) -> None:
    """Measure one model in its own process, whose end frees all memory."""
    settings = device_settings(contexts)
    result = measure_shape(name, shape(name), open_device(settings), RUNS)
    path = result.path(RUNS, settings)
    answer.write_text(json.dumps({"path": str(path)}), "utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if sys.argv[1:2] == [MEASURE]:
        _, _, name, *contexts, answer = sys.argv
        measure(name, list(map(int, contexts)), Path(answer))
    else:
        main(list(map(int, sys.argv[1:])) or CONTEXTS)
