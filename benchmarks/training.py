"""Tokens a second of our training step against transformers' Llama of the same shape.

One process, the two steps in turns, same data, same loss, optimiser (fused AdamW), clipping and
bf16 autocast. `tokens_per_s_ratio` is ours over theirs, pair by pair. `compiled` is our step
through torch.compile against our eager step.
"""

import time
from collections.abc import Callable

import torch
from record import Recorder, alternate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flash.arch import ArchSpec, count_parameters, parse_pattern
from flash.model import Decoder, cross_entropy, to_config

ROUNDS = 8
BATCH, SEQ_LEN = 8, 512


def _shape(model_dim: int, ffn_dim: int, layers: int) -> ArchSpec:
    return ArchSpec(
        model_dim=model_dim,
        ffn_dim=ffn_dim,
        layer_types=parse_pattern("F" * layers),
        num_heads=model_dim // 64,
        num_kv_heads=model_dim // 128,
        head_dim=64,
        vocab_size=2048,
        qk_norm=False,
        rope_theta=10000.0,
    )


def _step(model: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """A timed training step; returns tokens a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(0)
    batch = torch.randint(0, 2048, (BATCH, SEQ_LEN + 1))

    def run() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(batch[:, :-1])
        cross_entropy(logits, batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return BATCH * SEQ_LEN / (time.perf_counter() - start)

    return run


def main() -> None:
    record = Recorder("training")
    for spec in (_shape(256, 576, 8), _shape(384, 1024, 8)):
        ours = Decoder(spec)
        theirs = LlamaForCausalLM(LlamaConfig(**to_config(spec)))
        theirs.load_state_dict(ours.state_dict())
        compiled = Decoder(spec)
        forward = torch.compile(compiled)
        steps = {
            "ours": _step(ours, ours),
            "theirs": _step(theirs, lambda tokens, model=theirs: model(tokens).logits),
            "compiled": _step(compiled, forward),
        }
        for warm_up in (*steps.values(), *steps.values()):
            warm_up()
        rates = alternate(steps, ROUNDS)
        case = f"{count_parameters(spec).total / 1e6:.1f}M"
        pairs = zip(rates["ours"], rates["theirs"], strict=True)
        record.add(case, "tokens_per_s_ratio", [a / b for a, b in pairs], "ratio")
        pairs = zip(rates["compiled"], rates["ours"], strict=True)
        record.add(f"{case}/compiled", "tokens_per_s_ratio", [a / b for a, b in pairs], "ratio")
        record.add(case, "tokens_per_s", rates["ours"], "tokens/s")
    record.close()


if __name__ == "__main__":
    main()
