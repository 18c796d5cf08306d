"""Greedy continuation by a decoder with its cache, to compare with others'."""

import torch
from jaxtyping import Int
from torch import Tensor

from flash.model.decoder import Decoder


@torch.no_grad()
def generate(model: Decoder, prompt: Int[Tensor, "b s"], new_tokens: int) -> Int[Tensor, "b t"]:
    """The prompt with its `new_tokens` likeliest ones."""
    cache = model.empty_cache(prompt.shape[0])
    tokens = step = prompt
    for _ in range(new_tokens):
        step = model(step, cache)[:, -1].float().argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, step], dim=1)
    return tokens
