"""Modules of a `Decoder` that can be exported: ExecuTorch's own operators, shared weights.

The modules mirror those of the decoder (flash/model/decoder.py) and share its tensors. They differ
where a device needs it: a KV cache is updated in place at `input_pos`, `llama::custom_sdpa` attends
to it (query heads share a key head without copies of it), and the output head runs on the last
position only. A layer is split into an attention half and an FFN half, which are the units of
latency.

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
from flash.lowering.kv_cache import make_attention
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder, FeedForward, Layer, RMSNorm, SelfAttention


def load_custom_ops() -> None:
    """Register the operators `llama::*` and the quantised embedding's kernels with torch."""
    with quiet():
        register_operators()


def _share(weight: Tensor) -> nn.Parameter:
    """A new parameter on the same memory: replacing it does not change the decoder."""
    return nn.Parameter(weight.detach(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _share(weight)
    if bias is not None:
        linear.bias = _share(bias)
    return linear


class Norm(nn.Module):
    """RMSNorm from operators that ExecuTorch has fast kernels for.

    The square is `x * x`. `F.rms_norm` and `vector_norm` would become `pow`: an FFN half of width
    256 took 1.57 ms for 256 tokens this way, 2.17 ms with either of those (one thread, x86). The
    mean is a matrix product with a row of 1/c. XNNPACK does not take `mean`, so a norm with it
    would split the graph that XNNPACK runs as a whole.
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
    """Attention half of a layer: norm, projections, rotary embedding, cache, attention, residual.

    With `last_token_only` it stores the keys and values of all tokens and computes everything else
    for the last token: `[1, s, c] -> [1, 1, c]`. That is for the last attention half of a model:
    no later layer reads the other tokens, and the logits depend on the last one only.
    """

    def __init__(
        self,
        norm: RMSNorm,
        attention: SelfAttention,
        spec: ArchSpec,
        lowering: LoweringSettings,
        *,
        last_token_only: bool = False,
    ) -> None:
        super().__init__()
        self.last_token_only = last_token_only
        self.norm = Norm(norm)
        self.q_proj = _linear(attention.q_proj.weight, attention.q_proj.bias)
        self.k_proj = _linear(attention.k_proj.weight, attention.k_proj.bias)
        self.v_proj = _linear(attention.v_proj.weight, attention.v_proj.bias)
        self.o_proj = _linear(attention.o_proj.weight)
        self.q_norm = _head_norm(attention.q_norm)
        self.k_norm = _head_norm(attention.k_norm)
        self.q_shape = (spec.num_heads, spec.head_dim)
        self.kv_shape = (spec.num_kv_heads, spec.head_dim)
        sliding = attention.window is not None
        self.cache, self.attend = make_attention(spec, lowering, sliding)

    def forward(self, x: Tensor, call: CallRange) -> Tensor:
        length = x.shape[1]
        y = self.norm(x)
        k = self.k_norm(self.k_proj(y).view(1, length, *self.kv_shape))
        v = self.v_proj(y).view(1, length, *self.kv_shape)
        k = _rotate(k, call.cos, call.sin)
        cos, sin = call.cos, call.sin
        if self.last_token_only:
            x, y, cos, sin, length = x[:, -1:], y[:, -1:], cos[-1:], sin[-1:], 1
        q = self.q_norm(self.q_proj(y).view(1, length, *self.q_shape))
        out = self.attend(self.cache, _rotate(q, cos, sin), k, v, call)
        return x + self.o_proj(out)


class FfnHalf(nn.Module):
    """FFN half of a layer: norm, SwiGLU, residual."""

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
    """Output head: last position, final norm, output projection; `[1, s, c] -> [1, vocab]`."""

    def __init__(self, norm: RMSNorm, weight: Tensor) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.lm_head = _linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x[:, -1, :]))


class ExportableDecoder(nn.Module):
    """The whole decoder: `forward(tokens [1, s], input_pos [1]) -> logits [1, vocab]`.

    Logits are those of the last position. The KV caches are buffers: calls with rising `input_pos`
    continue one sequence, and a call at position 0 starts a new one.
    """

    def __init__(self, model: Decoder, lowering: LoweringSettings) -> None:
        super().__init__()
        load_custom_ops()
        spec = model.spec
        self.embedding = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach())
        kinds = spec.layer_types
        self.call_plan = (
            CallPlan(spec, lowering, Attention.sliding_attention in kinds)
            if spec.attention_layers
            else None
        )
        attending = [i for i, kind in enumerate(kinds) if kind.attends]
        last_attending = attending[-1] if attending and lowering.prefill_last_only else None
        self.embeds_all_tokens = bool(attending) or not lowering.prefill_last_only
        self.halves = nn.ModuleList()
        for i, layer in enumerate(cast(Iterable[Layer], model.model.layers)):
            if layer.kind is not Attention.skip_attention:
                norm, attention = layer.input_layernorm, layer.self_attn
                only = i == last_attending
                half = AttentionHalf(norm, attention, spec, lowering, last_token_only=only)
                self.halves.append(half)
            self.halves.append(FfnHalf(layer.post_attention_layernorm, layer.mlp))
        self.head = Head(model.model.norm, model.lm_head.weight)
        self.eval()

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embedding(tokens if self.embeds_all_tokens else tokens[:, -1:])
        call = self.call_plan(input_pos, tokens.shape[1]) if self.call_plan is not None else None
        for half in self.halves:
            x = half(x, call) if isinstance(half, AttentionHalf) else half(x)
        return self.head(x)
