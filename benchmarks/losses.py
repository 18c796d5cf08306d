"""Chunked losses compared with losses of all logits at once, at the paper's vocabulary.

The size is width 1280, 4096 tokens and vocabulary 202,048 in fp32 on the CPU, forward and backward.
The case `ce` is cross-entropy; `kd` is half cross-entropy and half forward KL to a teacher of width
2048. The plain implementation is `F.cross_entropy(F.linear(hidden, weight))`, with a teacher
`F.nll_loss` and `F.kl_div` of the log-softmaxes. Fresh processes alternate, one loss each.

- `peak_ratio`: ratio of peak memory above that before the call, gradients included (that of the
  weight alone takes 987 MiB). `peak_mib` of a case and of `<case>/plain` are its two parts.
- `time_ratio`: our time divided by the plain one; `seconds` is ours.
- `gradient_error`: largest difference of the gradients relative to their largest value, on all
  hidden states and every 97th row of the weight.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from record import SMOKE, Recorder, in_fresh_process, peak_rss_mib, rss_mib
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash.model.losses import Operands, linear_losses

WIDTH, TEACHER_WIDTH, TOKENS, VOCAB, ROUNDS = (
    (64, 96, 256, 8192, 1) if SMOKE else (1280, 2048, 4096, 202_048, 3)
)
KD_WEIGHT = {"ce": 0.0, "kd": 0.5}


def inputs(case: str) -> tuple[Operands, Operands | None, Tensor]:
    """Make student, teacher and targets."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    student = Operands(hidden, torch.empty(VOCAB, WIDTH).normal_(0, 0.02).requires_grad_())
    teacher = None
    if case == "kd":
        table = torch.empty(VOCAB, TEACHER_WIDTH).normal_(0, 0.02)
        teacher = Operands(torch.randn(TOKENS, TEACHER_WIDTH), table)
    return student, teacher, torch.randint(0, VOCAB, (TOKENS,))


def chunked(student: Operands, teacher: Operands | None, targets: Tensor, kd: float) -> Tensor:
    """Compute the mean loss with the chunked implementation."""
    total = linear_losses(student, targets, teacher=teacher, kd_weight=kd).total
    return total / len(targets)


def plain(student: Operands, teacher: Operands | None, targets: Tensor, kd: float) -> Tensor:
    """Compute the mean loss with the plain implementation."""
    if teacher is None:
        return F.cross_entropy(F.linear(*student), targets)
    with torch.no_grad():
        taught = F.log_softmax(F.linear(*teacher), dim=-1)
    log_p = F.log_softmax(F.linear(*student), dim=-1)
    kl = F.kl_div(log_p, taught, reduction="batchmean", log_target=True)
    return (1 - kd) * F.nll_loss(log_p, targets) + kd * kl


WAYS = {"chunked": chunked, "plain": plain}


def measure(case: str, way: str, gradients: Path) -> dict[str, float]:
    """Measure seconds and peak memory above that before [MiB]; must run in a fresh process."""
    Path("/proc/self/oom_score_adj").write_text("1000", "ascii")  # the plain `kd` takes 20 GiB
    student, teacher, targets = inputs(case)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets the recorded peak
    before, start = rss_mib(), time.perf_counter()
    WAYS[way](student, teacher, targets, KD_WEIGHT[case]).backward()
    seconds, peak = time.perf_counter() - start, peak_rss_mib() - before
    hidden, weight = student.hidden.grad, student.weight.grad
    assert hidden is not None
    assert weight is not None
    save_file({"hidden": hidden, "weight": weight[::97].clone()}, gradients)
    return {"seconds": seconds, "peak_mib": peak}


def gradient_error(ours: Path, theirs: Path) -> float:
    pairs = zip(load_file(ours).values(), load_file(theirs).values(), strict=True)
    return float(max((a - b).abs().max() / b.abs().max() for a, b in pairs))


def compare(record: Recorder, case: str, folder: Path) -> None:
    files = {way: folder / f"{case}_{way}.safetensors" for way in WAYS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, path in files.items():
            found[way].append(in_fresh_process(__file__, "measure", case, way, str(path)))
    for metric, name, unit in (("peak_mib", "peak", "MiB"), ("seconds", "time", "s")):
        ours, theirs = ([each[metric] for each in found[way]] for way in WAYS)
        record.add(case, metric, ours, unit)
        record.add(f"{case}/plain", metric, theirs, unit)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        record.add(case, f"{name}_ratio", ratios, "ratio")
    record.add(case, "gradient_error", [gradient_error(*files.values())], "relative")


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        case, way, gradients, path = sys.argv[2:]
        result = measure(case, way, Path(gradients))
        Path(path).write_text(json.dumps(result), "utf-8")
        return
    record = Recorder("losses")
    with tempfile.TemporaryDirectory() as folder:
        for case in KD_WEIGHT:
            compare(record, case, Path(folder))
    record.close()


if __name__ == "__main__":
    main()
