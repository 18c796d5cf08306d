"""Training throughput compared with transformers and litgpt on the same shapes.

The models are Llama-like with the vocabulary of SmolLM2 (49,152, tied): 15M, 60M and 150M
parameters, fp32 and bf16 autocast, 1,024 tokens a step. All implementations have the same weights,
batch, fused AdamW and gradient clipping, and their own forward pass and loss, as their users run
it:

- `ours`: our decoder and chunked loss; `compiled`: the same with `trainer.compile=true`.
- `transformers`: LlamaForCausalLM with its own loss from labels, as its Trainer uses it.
- `litgpt`: its GPT and the chunked cross-entropy of its pretraining.

Each case runs in one process, where the implementations alternate. `tokens_per_s_ratio` of `ours`
and `compiled` is relative to the better of transformers and litgpt, round by round. `loss_error` is
the largest relative difference of the first losses (equal numerics). `peak_mib` is the memory above
that of the idle process, in a fresh process for each implementation.

litgpt must be installed without its dependencies (`pip install --no-deps litgpt`), because its pins
conflict with ours. `python benchmarks/training.py [CASE ...]` runs cases such as `15M/fp32`;
without cases it keeps the results. bf16 is skipped, with a message, if the processor has no
instructions for it.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from record import SMOKE, Recorder, alternate, in_fresh_process, peak_rss_mib, rss_mib
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flash.arch import ArchSpec, count_parameters, parse_pattern
from flash.model.decoder import Decoder
from flash.model.families import to_config
from flash.model.losses import Operands, linear_losses
from flash.training.settings import Precision, native_precision

ROUNDS = 7
BATCH, SEQ_LEN, VOCAB = 2, 512, 49_152
SHAPES = {"15M": (256, 672, 4, 4, 2), "60M": (576, 1536, 10, 9, 3), "150M": (640, 1792, 25, 10, 5)}
if SMOKE:
    ROUNDS = 1
    BATCH, SEQ_LEN, VOCAB = 1, 32, 512
    SHAPES = {"smoke": (64, 128, 1, 2, 1)}
WAYS = ("ours", "compiled", "transformers", "litgpt")


def spec_of(size: str) -> ArchSpec:
    width, ffn, layers, heads, kv_heads = SHAPES[size]
    return ArchSpec(
        model_dim=width,
        ffn_dim=ffn,
        layer_types=parse_pattern("F" * layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        vocab_size=VOCAB,
        qk_norm=False,
        rope_theta=10000.0,
        max_context=SEQ_LEN,
    )


def ours(spec: ArchSpec, *, compiled: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = Decoder(spec)
    decode = torch.compile(model.hidden) if compiled else model.hidden

    def loss(batch: Tensor) -> Tensor:
        hidden, targets = decode(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        return linear_losses(Operands(hidden, model.lm_head.weight), targets).total / len(targets)

    return model, loss


def transformers(spec: ArchSpec) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = LlamaForCausalLM(LlamaConfig(**to_config(spec)))
    model.load_state_dict(ours(spec, compiled=False)[0].state_dict())
    return model, lambda batch: model(batch, labels=batch).loss


def litgpt(spec: ArchSpec) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    config = Config(
        name="same",
        block_size=spec.max_context,
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.vocab_size,
        n_layer=spec.num_layers,
        n_head=spec.num_heads,
        n_query_groups=spec.num_kv_heads,
        head_size=spec.head_dim,
        n_embd=spec.model_dim,
        intermediate_size=spec.ffn_dim,
        rotary_percentage=1.0,
        rope_base=int(spec.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=spec.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    state = ours(spec, compiled=False)[0].state_dict()
    with torch.no_grad():
        model.transformer.wte.weight = model.lm_head.weight
        model.lm_head.weight.copy_(state["model.embed_tokens.weight"])
        model.transformer.ln_f.weight.copy_(state["model.norm.weight"])
        for i, block in enumerate(model.transformer.h):
            ours_of = {key: state[f"model.layers.{i}.{key}.weight"] for key in _NAMES}
            qkv = [ours_of[f"self_attn.{name}_proj"] for name in "qkv"]
            block.attn.qkv.weight.copy_(torch.cat(qkv))
            block.attn.proj.weight.copy_(ours_of["self_attn.o_proj"])
            block.mlp.fc_1.weight.copy_(ours_of["mlp.gate_proj"])
            block.mlp.fc_2.weight.copy_(ours_of["mlp.up_proj"])
            block.mlp.proj.weight.copy_(ours_of["mlp.down_proj"])
    return model, lambda batch: chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:])


_NAMES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def stepper(way: str, case: str) -> Callable[[], tuple[float, float]]:
    """Make a function that runs a training step and returns tokens per second and the loss."""
    size, precision = case.split("/")
    spec = spec_of(size)
    match way:
        case "ours" | "compiled":
            model, loss_of = ours(spec, compiled=way == "compiled")
        case "transformers":
            model, loss_of = transformers(spec)
        case _:
            model, loss_of = litgpt(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(1)
    batch = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return BATCH * SEQ_LEN / (time.perf_counter() - start), float(loss.detach())

    return run


def compare(record: Recorder, case: str) -> None:
    steps = {way: stepper(way, case) for way in WAYS}
    losses = {way: step()[1] for way, step in steps.items()}
    for step in steps.values():
        step()  # warms up caches and allocations
    rates = alternate({way: lambda step=step: step()[0] for way, step in steps.items()}, ROUNDS)
    theirs = [max(pair) for pair in zip(rates["transformers"], rates["litgpt"], strict=True)]
    for way, name in (("ours", case), ("compiled", f"{case}/compiled")):
        ratios = [a / b for a, b in zip(rates[way], theirs, strict=True)]
        record.add(name, "tokens_per_s_ratio", ratios, "ratio")
    for way in WAYS:
        record.add(f"{case}/{way}", "tokens_per_s", rates[way], "tokens/s")
        peak = in_fresh_process(__file__, "peak", way, case)["peak_mib"]
        record.add(f"{case}/{way}", "peak_mib", [peak], "MiB")
    errors = [abs(loss / losses["ours"] - 1) for loss in losses.values()]
    record.add(case, "loss_error", [max(errors)], "relative")
    record.add(case, "parameters", [count_parameters(spec_of(case.split("/")[0])).total], "")


def measure_peak(way: str, case: str) -> float:
    """Measure the peak memory of training above that of the idle process [MiB]."""
    before = rss_mib()
    step = stepper(way, case)
    step()
    step()
    return peak_rss_mib() - before


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        way, case, path = sys.argv[2:]
        Path(path).write_text(json.dumps({"peak_mib": measure_peak(way, case)}), "utf-8")
        return
    record = Recorder("training")
    precisions = ["fp32"]
    if native_precision("cpu") is Precision.bf16:
        precisions.append("bf16")
    else:
        print("no bf16 instructions on this processor: bf16 left out", file=sys.stderr)
    cases = [f"{size}/{precision}" for size in SHAPES for precision in precisions]
    for case in sys.argv[1:] or cases:
        compare(record, case)
    if not sys.argv[1:]:
        record.close()


if __name__ == "__main__":
    main()
