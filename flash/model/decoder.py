"""The decoder: RMSNorm, RoPE, grouped-query attention with optional QK-norm, SwiGLU.

Parameter names are those of transformers' Llama and Qwen3, so that converting a checkpoint renames
nothing. Unlike those classes, the decoder has layers that skip attention: such a layer has an FFN,
but neither attention nor the norm in front of it (arXiv:2603.15954, Sec. 3.2).

Shapes: b batch, s sequence, h heads, d head size, c channels (d_model).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash.arch import ArchSpec, Attention, RopeKind
from flash.model.attention import Mask, MaskSpec, attend


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_frequencies(spec: ArchSpec) -> Float[Tensor, " half"]:
    """Angle by which one position turns each pair of head channels [radians], in float32.

    The fastest pairs come first. `spec.rope_scaling` is applied, by its factor alone (`linear`,
    arXiv:2306.15595) or by the number of turns over the original context (`llama3`,
    arXiv:2407.21783).
    """
    frequencies = 1 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind is RopeKind.linear:
        return slow
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slow


def rotary_table(
    positions: Int[Tensor, " s"], spec: ArchSpec
) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"]]:
    """Cosines and sines of the rotary embedding at `positions`, float32, both halves the same."""
    frequencies = rotary_frequencies(spec).to(positions.device)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "b h s d"], cos: Float[Tensor, "s d"], sin: Float[Tensor, "s d"]
) -> Float[Tensor, "b h s d"]:
    """`x` with the rotary embedding, in the "rotate half" layout of transformers' checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


@dataclass
class LayerCache:
    """Keys and values of one attention layer so far, `(b, kv_heads, s, d)` each."""

    keys: Tensor
    values: Tensor


class SelfAttention(nn.Module):
    """Causal grouped-query attention, full or within a sliding window."""

    def __init__(self, spec: ArchSpec, kind: Attention) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.window = spec.sliding_window if kind is Attention.sliding_attention else None
        q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.model_dim, q_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.model_dim, kv_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.model_dim, kv_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(q_dim, spec.model_dim, bias=False)
        norm = (lambda: RMSNorm(spec.head_dim, spec.norm_eps)) if spec.qk_norm else nn.Identity
        self.q_norm = norm()
        self.k_norm = norm()

    def forward(
        self,
        x: Float[Tensor, "b s c"],
        rotary: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Tensor, "b s c"], LayerCache | None]:
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, s, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k = torch.cat([cache.keys, k], dim=2)
            v = torch.cat([cache.values, v], dim=2)
            cache = LayerCache(k, v)
        out = attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1)), cache


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, model_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model_dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(model_dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, model_dim, bias=False)

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, unless skipped, and FFN, each behind a norm and added to the residual stream."""

    def __init__(self, spec: ArchSpec, kind: Attention, ffn_dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind is not Attention.skip_attention:
            self.input_layernorm = RMSNorm(spec.model_dim, spec.norm_eps)
            self.self_attn = SelfAttention(spec, kind)
        self.post_attention_layernorm = RMSNorm(spec.model_dim, spec.norm_eps)
        self.mlp = FeedForward(spec.model_dim, ffn_dim)

    def forward(
        self,
        x: Float[Tensor, "b s c"],
        rotary: tuple[Tensor, Tensor],
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "b s c"], LayerCache | None]:
        if self.kind is not Attention.skip_attention:
            out, cache = self.self_attn(self.input_layernorm(x), rotary, mask, cache)
            x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Transformer(nn.Module):
    """Embedding, layers and final norm, without the output head."""

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.model_dim)
        layers = zip(spec.layer_types, spec.ffn_dims, strict=True)
        self.layers = nn.ModuleList(Layer(spec, kind, ffn_dim) for kind, ffn_dim in layers)
        self.norm = RMSNorm(spec.model_dim, spec.norm_eps)


class Decoder(nn.Module):
    """A decoder-only language model of the architecture `spec`.

    PyTorch's context managers for device and default dtype apply, the meta device included. Weights
    are normally distributed with standard deviation 0.02, that of output projections divided by
    `sqrt(2 num_layers)`, until others are loaded.

    Attributes:
        spec: The architecture.
        checkpoint_layers: True keeps only the input of each layer for the backward pass, in which
            the layer then runs again.
    """

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_layers = False
        self.model = Transformer(spec)
        # A tied head gets no memory of its own; with 202,048 tokens that would be a gigabyte.
        device = "meta" if spec.tie_embeddings else None
        self.lm_head = nn.Linear(spec.model_dim, spec.vocab_size, bias=False, device=device)
        if spec.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        residual_std = 0.02 / (2 * self.spec.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)

    def hidden(
        self,
        tokens: Int[Tensor, "b s"],
        cache: list[LayerCache] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s c"]:
        """Output of the final norm at every position.

        Args:
            tokens: Token ids.
            cache: Cache from `empty_cache` or an earlier call; extended in place.
            documents: Document of each position; positions see their own document only. Cannot be
                combined with a cache.
        """
        past = cache[0].keys.shape[2] if cache else 0
        x, rotary, masks = self.layer_inputs(tokens, past, documents)
        layers = cast(Iterable[Layer], self.model.layers)
        slots = iter(range(len(self.spec.attention_layers)))
        for layer, mask in zip(layers, masks, strict=True):
            if cache is not None and layer.kind.attends:
                slot = next(slots)
                x, cache[slot] = layer(x, rotary, mask, cache[slot])
            elif self.checkpoint_layers and torch.is_grad_enabled():
                x, _ = cast(
                    tuple[Tensor, None], checkpoint(layer, x, rotary, mask, use_reentrant=False)
                )
            else:
                x, _ = layer(x, rotary, mask)
        return self.model.norm(x)

    def layer_inputs(
        self, tokens: Int[Tensor, "b s"], past: int = 0, documents: Int[Tensor, "b s"] | None = None
    ) -> tuple[Float[Tensor, "b s c"], tuple[Tensor, Tensor], list[Mask | None]]:
        """Input of the first layer, rotary table of all layers, and mask of each.

        Args:
            tokens: Token ids.
            past: Number of positions in the cache.
            documents: As for `hidden`.
        """
        length = tokens.shape[1]
        positions = torch.arange(past, past + length, device=tokens.device)
        cos, sin = rotary_table(positions, self.spec)
        x = self.model.embed_tokens(tokens)
        mask_spec = MaskSpec(past, length, documents, tokens.device)
        layers = cast(Iterable[Layer], self.model.layers)
        windows = {layer.self_attn.window for layer in layers if layer.kind.attends}
        masks = {window: mask_spec.mask(window) for window in windows}
        of_layers = [
            masks[layer.self_attn.window] if layer.kind.attends else None for layer in layers
        ]
        return x, (cos.to(x.dtype), sin.to(x.dtype)), of_layers

    def forward(
        self, tokens: Int[Tensor, "b s"], cache: list[LayerCache] | None = None
    ) -> Float[Tensor, "b s vocab"]:
        """Next-token logits at every position."""
        return self.lm_head(self.hidden(tokens, cache))

    def empty_cache(self, batch: int = 1) -> list[LayerCache]:
        """An empty KV cache for `batch` sequences, with one entry per layer that has attention."""
        weight = self.model.embed_tokens.weight
        shape = (batch, self.spec.num_kv_heads, 0, self.spec.head_dim)
        return [
            LayerCache(weight.new_zeros(shape), weight.new_zeros(shape))
            for _ in self.spec.attention_layers
        ]
