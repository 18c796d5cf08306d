"""Training steps on a busy machine: threads that spin at barriers against threads that sleep.

Steps of the tiny backbone (4 x 512 tokens, fp32, AdamW) in fresh processes, all cases in turns,
quiet and beside one busy process per core. Cases are the settings of OpenMP: `spinning` is its
default, `sleeping` is `OMP_WAIT_POLICY=passive`, which flash sets for its commands, `one_thread`
trains on one core, and `spins_N` lets a thread look N times before it sleeps (`GOMP_SPINCOUNT`).

- `step_ms`: median of the steps of a process.
- `slowdown_quiet` and `slowdown_busy`: a step relative to the best case of the same turn.

`python benchmarks/busy.py`
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from record import SMOKE, Recorder

import conf
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder

CASES = {
    "spinning": {},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    "spins_1000": {"GOMP_SPINCOUNT": "1000"},
    "spins_10000": {"GOMP_SPINCOUNT": "10000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
TURNS, STEPS = (1, 1) if SMOKE else (5, 6)
WARMUPS = 2
BUSY = "while True: pass"


def steps_ms() -> float:
    """Time training steps in this process [ms]."""
    spec = Backbone.open(conf.TINY).spec
    spec = conf.small_spec(spec) if SMOKE else spec
    torch.manual_seed(0)
    model = Decoder(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    times = []
    for _ in range(WARMUPS + STEPS):
        tokens = torch.randint(spec.vocab_size, (4, 513))
        start = time.perf_counter()
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[WARMUPS:])


def timed(variables: dict[str, str]) -> float:
    """Time steps in a fresh process with further environment variables [ms]."""
    known = {key for case in CASES.values() for key in case}
    kept = {key: value for key, value in os.environ.items() if key not in known}
    command = [sys.executable, __file__, "--steps"]
    done = subprocess.run(
        command, env={**kept, **variables}, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    record = Recorder("busy")
    for state in ("quiet", "busy"):
        turns: list[dict[str, float]] = []
        others = []
        if state == "busy":
            others = [
                subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)
            ]
        try:
            for _ in range(TURNS):
                turns.append({name: timed(variables) for name, variables in CASES.items()})
        finally:
            for other in others:
                other.kill()
        for name in CASES:
            record.add(f"{name}/{state}", "step_ms", [turn[name] for turn in turns], "ms")
            ratios = [turn[name] / min(turn.values()) for turn in turns]
            record.add(name, f"slowdown_{state}", ratios, "ratio")
    record.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--steps"]:
        print(steps_ms())
    else:
        main()
