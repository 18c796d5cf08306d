"""The chunked losses against all logits at once, at the paper's vocabulary.

Width 1280, 4096 tokens, vocabulary 202,048, fp32 on the CPU, forward and backward; case `ce` is
cross-entropy, `kd` half of that and half forward KL to a teacher of width 2048. The usual way is
`F.cross_entropy(F.linear(hidden, weight))` and `F.kl_div` of the log-softmaxes.

- `peak_ratio`: memory at its peak above what there was before, each in a fresh process, gradients
  included (the weight's alone takes 987 MiB); `peak_mib` and `peak_mib` of case `.../plain` are its
  two parts.
- `time_ratio`: ours over theirs, in turns in one process.
- `gradient_error`: largest difference of the gradients over their largest value.

`python benchmarks/losses.py smoke` does all of it at a small size and keeps nothing.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from record import Recorder, alternate, in_fresh_process, peak_rss_mib, rss_mib
from torch import Tensor

from flash.model import Operands, linear_losses

SIZES = {"full": (1280, 2048, 4096, 202_048), "smoke": (64, 96, 256, 8192)}
ROUNDS = 5
KD_WEIGHT = {"ce": 0.0, "kd": 0.5}


def inputs(case: str, size: str) -> tuple[Operands, Operands | None, Tensor]:
    """Student, teacher and targets."""
    width, teacher_width, tokens, vocab = SIZES[size]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).requires_grad_()
    student = Operands(hidden, torch.empty(vocab, width).normal_(0, 0.02).requires_grad_())
    teacher = None
    if case == "kd":
        table = torch.empty(vocab, teacher_width).normal_(0, 0.02)
        teacher = Operands(torch.randn(tokens, teacher_width), table)
    return student, teacher, torch.randint(0, vocab, (tokens,))


def chunked(student: Operands, teacher: Operands | None, targets: Tensor, kd: float) -> Tensor:
    """Mean loss, ours."""
    total = linear_losses(student, targets, teacher=teacher, kd_weight=kd).total
    return total / len(targets)


def plain(student: Operands, teacher: Operands | None, targets: Tensor, kd: float) -> Tensor:
    """Mean loss, the usual way."""
    logits = F.linear(*student)
    ce = F.cross_entropy(logits, targets)
    if teacher is None:
        return ce
    with torch.no_grad():
        taught = F.log_softmax(F.linear(*teacher), dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    return (1 - kd) * ce + kd * F.kl_div(log_p, taught, reduction="batchmean", log_target=True)


WAYS = {"chunked": chunked, "plain": plain}


def measure_peak(case: str, size: str, way: str) -> float:
    """Memory above what there was before [MiB]; for a fresh process."""
    student, teacher, targets = inputs(case, size)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forgets the peak so far
    before = rss_mib()
    WAYS[way](student, teacher, targets, KD_WEIGHT[case]).backward()
    return peak_rss_mib() - before


def gradient_error(case: str, size: str) -> float:
    student, teacher, targets = inputs(case, size)
    found = [
        torch.autograd.grad(way(student, teacher, targets, KD_WEIGHT[case]), student)
        for way in WAYS.values()
    ]
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
    return float(max(errors))


def compare(record: Recorder, case: str, size: str) -> None:
    peaks = {way: in_fresh_process(__file__, "peak", case, size, way)["peak_mib"] for way in WAYS}
    record.add(case, "peak_mib", [peaks["chunked"]], "MiB")
    record.add(f"{case}/plain", "peak_mib", [peaks["plain"]], "MiB")
    record.add(case, "peak_ratio", [peaks["chunked"] / peaks["plain"]], "ratio")
    record.add(case, "gradient_error", [gradient_error(case, size)], "relative")
    student, teacher, targets = inputs(case, size)

    def timed(way: str) -> float:
        start = time.perf_counter()
        loss = WAYS[way](student, teacher, targets, KD_WEIGHT[case])
        torch.autograd.grad(loss, student)
        return time.perf_counter() - start

    seconds = alternate({way: lambda way=way: timed(way) for way in WAYS}, ROUNDS)
    pairs = zip(seconds["chunked"], seconds["plain"], strict=True)
    record.add(case, "time_ratio", [a / b for a, b in pairs], "ratio")
    record.add(case, "seconds", seconds["chunked"], "s")


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        case, size, way, path = sys.argv[2:]
        result = {"peak_mib": measure_peak(case, size, way)}
        Path(path).write_text(json.dumps(result), "utf-8")
        return
    size = "smoke" if sys.argv[1:] == ["smoke"] else "full"
    record = Recorder("losses")
    for case in KD_WEIGHT:
        compare(record, case, size)
    if size == "full":
        record.close()


if __name__ == "__main__":
    main()
