"""The exportable form of a `Decoder`: stock ExecuTorch operators, one method, weights shared.

Parts mirror the decoder's (flash/model/decoder.py) and take over its tensors; what differs is what
the device needs: a cache that is updated in place at `input_pos`, `llama::custom_sdpa` over it
(GQA without expanding the keys), and an output head on the last position only.

Shapes: s tokens of this call, l cache slots, h heads, d head size, c channels (d_model).
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash.arch import ArchSpec, Attention
from flash.compat.executorch import register_operators
from flash.log_filters import quiet
from flash.lowering.attention_plan import CallPlan, CallRange
from flash.lowering.kv_cache import attention_of
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder, FeedForward, Layer, RMSNorm, SelfAttention


def load_custom_ops() -> None:
    """Register `llama::*` and the quantised embedding kernels, once."""
    with quiet():
        register_operators()


def _share(weight: Tensor) -> nn.Parameter:
    """A parameter of its own on the same memory: nothing done to it reaches the decoder."""
    return nn.Parameter(weight.detach(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _share(weight)
    if bias is not None:
        linear.bias = _share(bias)
    return linear


class Norm(nn.Module):
    """RMSNorm from operators that ExecuTorch has kernels for.

    `x * x` and not `pow`, which `F.rms_norm` and `vector_norm` become: an FFN half of width 256
    took 1.57 ms for 256 tokens this way, 2.17 ms with either of those (one thread, x86). The mean
    is a product with a row of 1/c: XNNPACK does not take `mean`, and so a norm would part what it
    runs as one.
    """

    mean: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = _share(norm.weight), norm.eps
        width = norm.weight.numel()
        self.register_buffer("mean", torch.full((1, width), 1.0 / width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps) * self.weight


def _head_norm(norm: RMSNorm | nn.Identity) -> nn.Module:
    return Norm(norm) if isinstance(norm, RMSNorm) else nn.Identity()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class AttentionHalf(nn.Module):
    """Norm, projections, rotary embedding, cache, attention, residual.

    The `last` one of a model, whose output only the answer is made of, stores the keys and values
    of all tokens and goes on with the last one: `[1, s, c] -> [1, 1, c]`.
    """

    def __init__(
        self,
        norm: RMSNorm,
        attention: SelfAttention,
        spec: ArchSpec,
        settings: LoweringSettings,
        *,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.norm = Norm(norm)
        self.q_proj = _linear(attention.q_proj.weight, attention.q_proj.bias)
        self.k_proj = _linear(attention.k_proj.weight, attention.k_proj.bias)
        self.v_proj = _linear(attention.v_proj.weight, attention.v_proj.bias)
        self.o_proj = _linear(attention.o_proj.weight)
        self.q_norm = _head_norm(attention.q_norm)
        self.k_norm = _head_norm(attention.k_norm)
        self.q_shape = (spec.num_heads, spec.head_dim)
        self.kv_shape = (spec.num_kv_heads, spec.head_dim)
        self.cache, self.attend = attention_of(spec, settings, attention.window is not None)

    def forward(self, x: Tensor, place: CallRange) -> Tensor:
        length = x.shape[1]
        y = self.norm(x)
        k = self.k_norm(self.k_proj(y).view(1, length, *self.kv_shape))
        v = self.v_proj(y).view(1, length, *self.kv_shape)
        k = _rotate(k, place.cos, place.sin)
        cos, sin = place.cos, place.sin
        if self.last:
            x, y, cos, sin, length = x[:, -1:], y[:, -1:], cos[-1:], sin[-1:], 1
        q = self.q_norm(self.q_proj(y).view(1, length, *self.q_shape))
        out = self.attend(self.cache, _rotate(q, cos, sin), k, v, place)
        return x + self.o_proj(out.reshape(1, length, -1))


class FfnHalf(nn.Module):
    """Norm, SwiGLU, residual."""

    def __init__(self, norm: RMSNorm, mlp: FeedForward) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.gate_proj = _linear(mlp.gate_proj.weight)
        self.up_proj = _linear(mlp.up_proj.weight)
        self.down_proj = _linear(mlp.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Head(nn.Module):
    """Last position, final norm, output projection: `[1, s, c] -> [1, vocab]`."""

    def __init__(self, norm: RMSNorm, weight: Tensor) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.lm_head = _linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x[:, -1, :]))


class ExportableDecoder(nn.Module):
    """`forward(tokens [1, s], input_pos [1]) -> logits [1, vocab]` of the last position.

    Its caches are buffers: calls with rising `input_pos` continue one sequence, and a call at
    position 0 starts a new one.
    """

    def __init__(self, model: Decoder, settings: LoweringSettings) -> None:
        super().__init__()
        load_custom_ops()
        spec = model.spec
        self.embedding = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach())
        kinds = spec.layer_types
        self.position = (
            CallPlan(spec, settings, Attention.sliding_attention in kinds)
            if spec.attention_layers
            else None
        )
        attending = [i for i, kind in enumerate(kinds) if kind.attends]
        last = attending[-1] if attending and settings.skip_unread else None
        self.reads_all = bool(attending) or not settings.skip_unread
        self.halves = nn.ModuleList()
        for i, layer in enumerate(cast(Iterable[Layer], model.model.layers)):
            if layer.kind is not Attention.skip_attention:
                norm, attention = layer.input_layernorm, layer.self_attn
                half = AttentionHalf(norm, attention, spec, settings, last=i == last)
                self.halves.append(half)
            self.halves.append(FfnHalf(layer.post_attention_layernorm, layer.mlp))
        self.head = Head(model.model.norm, model.lm_head.weight)
        self.eval()

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embedding(tokens if self.reads_all else tokens[:, -1:])
        place = self.position(input_pos, tokens.shape[1]) if self.position is not None else None
        for half in self.halves:
            x = half(x, place) if isinstance(half, AttentionHalf) else half(x)
        return self.head(x)
