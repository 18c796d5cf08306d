"""Variability of ExecuTorch's native LLM runner (C++) and of our Python runner on the host.

The program is the tiny backbone. Fresh processes of both runners alternate, each with one prompt of
512 tokens and 64 decode steps, without warm-up, on one thread. `ms` is the median over processes,
`cv_pct` their coefficient of variation.
"""

import json
import statistics
import tempfile
from pathlib import Path

from record import SMOKE, Recorder

from flash.device.host import HostDevice
from flash.device.llama_main import STATISTICS, Prompts, parse
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.stock_runner import generate_text
from flash.device.workload import Workload
from flash.lowering.lower import lower
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
from flash.records import atomic_write

BACKBONE = Path(__file__).parent.parent / "backbones" / "tiny"
PROMPT, STEPS, PROCESSES = (32, 4, 2) if SMOKE else (512, 64, 9)
DEVICE = DeviceSettings(
    name="host",
    processes=1,
    warmups=0,
    runs=1,
    workload=Workload(prompts=[PROMPT], contexts=[PROMPT], decode_tokens=STEPS),
)


def main() -> None:
    record = Recorder("runners")
    backbone = Backbone.open(BackboneSettings(name="tiny", weights=str(BACKBONE)))
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pte")
        with atomic_write(path) as file:
            file.write(lower(backbone.load(), DEVICE.lowering, eos_ids=[]))
        program = Program(name="tiny", path=path, vocab_size=backbone.spec.vocab_size)
        device = HostDevice(DEVICE)
        tokenizer = BACKBONE / "tokenizer.json"
        prompt = Prompts(tokenizer).of_length(PROMPT)
        for _ in range(PROCESSES):
            measured = device.measure([program], DEVICE.workload)[0]
            steps = measured.samples[0][f"decode_{PROMPT}"][0]["steps_ms"]
            text, numbers = generate_text(path, tokenizer, prompt, STEPS + 1)
            run = parse(f"{text}\n{STATISTICS}{json.dumps(numbers)}", "")
            assert run is not None
            assert run.prompt_tokens == PROMPT
            for case, value in (
                ("python/prefill", measured.prefill.ms),
                ("python/decode", statistics.fmean(steps)),
                ("native/prefill", run.prefill_ms),
                ("native/decode", run.decode_ms),
            ):
                times.setdefault(case, []).append(value)
    for case, values in times.items():
        record.add(case, "ms", values, "ms")
        scatter = 100 * statistics.stdev(values) / statistics.fmean(values)
        record.add(case, "cv_pct", [scatter], "%")
    record.close()


if __name__ == "__main__":
    main()
