"""Blocks: parts of a model that are lowered and measured alone and whose latencies add up.

An architecture is a multiset of blocks: one attention half for each layer that attends, one FFN
half for each layer, and its two ends (embedding and head). A space of billions of architectures
has few distinct blocks, so each of these is lowered and measured only once.

Attention halves come in three blocks of each kind: one half, a pair, and the last half of a model,
which answers for one token alone. A half of its own contains the plan of a call, such as masks,
which all halves of a model share; the pair shows what one more half takes.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from flash.arch import ArchSpec, Attention, Quantization
from flash.lowering.attention_plan import CallPlan
from flash.lowering.lower import export_module, serialize
from flash.lowering.modules import AttentionHalf, FfnHalf, Head, load_custom_ops
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import FeedForward, RMSNorm, SelfAttention
from flash.rounding.decoder import round_nearest

PAIR, LAST = "_pair", "_last"
"""Ends of the names of blocks with two halves, and with the last half of a model."""
_ATTENTION = {kind.value: kind for kind in Attention if kind.attends}


class BlockKind(Enum):
    """Computation of a block."""

    full_attention = "full_attention"
    """Attention half of a layer with full attention."""
    full_attention_pair = "full_attention_pair"
    """Two of them, one after the other."""
    full_attention_last = "full_attention_last"
    """The last of a model: keys and values of all tokens, the rest of the last token."""
    sliding_attention = "sliding_attention"
    """Attention half of a layer with a sliding window."""
    sliding_attention_pair = "sliding_attention_pair"
    """Two of them, one after the other."""
    sliding_attention_last = "sliding_attention_last"
    """The last of a model: keys and values of all tokens, the rest of the last token."""
    ffn = "ffn"
    """FFN half of a layer."""
    ends = "ends"
    """Embedding of all tokens, then final norm and output head of the last position."""

    @property
    def attention(self) -> Attention | None:
        """Kind of the attention halves; None for a block without any."""
        return _ATTENTION.get(self.value.removesuffix(PAIR).removesuffix(LAST))


@dataclass(frozen=True)
class Block:
    """One block. Equal blocks have the same program, whichever architecture they come from.

    Attributes:
        kind: Its computation.
        spec: An architecture of only this block. `Block.of` makes it and sets everything that the
            program does not depend on to fixed values.
    """

    kind: BlockKind
    spec: ArchSpec

    @classmethod
    def of(cls, kind: BlockKind, spec: ArchSpec) -> "Block":
        """Make the block of this kind that `spec` contains."""
        plain = ArchSpec(
            model_dim=spec.model_dim,
            ffn_dim=32,
            layer_types=(Attention.skip_attention,),
            num_heads=1,
            num_kv_heads=1,
            head_dim=32,
            vocab_size=32,
            sliding_window=1,
            rope_theta=spec.rope_theta,
            norm_eps=spec.norm_eps,
            max_context=spec.max_context,
        )
        match kind:
            case BlockKind.ffn:
                return cls(kind, plain.replace(ffn_dim=spec.ffn_dim))
            case BlockKind.ends:
                return cls(kind, plain.replace(vocab_size=spec.vocab_size))
        assert kind.attention is not None
        sliding = kind.attention is Attention.sliding_attention
        attention = plain.replace(
            layer_types=(kind.attention,) * (2 if kind.value.endswith(PAIR) else 1),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qk_norm=spec.qk_norm,
            qkv_bias=spec.qkv_bias,
            sliding_window=spec.sliding_window if sliding else 1,
        )
        return cls(kind, attention)

    @property
    def takes_tokens(self) -> bool:
        """True if the first input is token ids `[1, s]`, else activations `[1, s, model_dim]`."""
        return self.kind is BlockKind.ends

    def __str__(self) -> str:
        spec = self.spec
        match self.kind:
            case BlockKind.ffn:
                return f"ffn d{spec.model_dim} f{spec.ffn_range}"
            case BlockKind.ends:
                return f"ends d{spec.model_dim} v{spec.vocab_size}"
        sliding = self.kind.attention is Attention.sliding_attention
        window = f" w{spec.sliding_window}" if sliding else ""
        heads = f"h{spec.num_heads}/{spec.num_kv_heads}x{spec.head_dim}"
        return f"{self.kind.value} d{spec.model_dim} {heads}{window}"


def lower_block(block: Block, lowering: LoweringSettings) -> bytes:
    """Lower one block with random weights to the bytes of a .pte file.

    Its method is `forward(x, input_pos [1])`, with x activations `[1, s, model_dim]` in float32, or
    tokens `[1, s]` for the ends; s is dynamic.
    """
    module = block_module(block, lowering)
    if lowering.quantization is not Quantization.fp32:
        round_nearest(module, lowering.weight_format)
    length = min(8, lowering.chunk)
    example = None if block.takes_tokens else torch.randn(1, length, block.spec.model_dim)
    return serialize(export_module(module, lowering, example))


def block_module(block: Block, lowering: LoweringSettings) -> nn.Module:
    """Build the block as a float32 module with the inputs of its program.

    Its random weights are the same each time.
    """
    load_custom_ops()
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        match block.kind:
            case BlockKind.ffn:
                return _Ffn(block.spec).eval()
            case BlockKind.ends:
                return _Ends(block.spec).eval()
            case _:
                last = block.kind.value.endswith(LAST)
                return _Attention(block.spec, lowering, last_token_only=last).eval()
    finally:
        torch.set_rng_state(generator_state)


class _Attention(nn.Module):
    def __init__(
        self, spec: ArchSpec, lowering: LoweringSettings, *, last_token_only: bool
    ) -> None:
        super().__init__()
        kind = spec.layer_types[0]
        self.call_plan = CallPlan(spec, lowering, kind is Attention.sliding_attention)
        self.halves = nn.ModuleList(
            AttentionHalf(
                RMSNorm(spec.model_dim, spec.norm_eps),
                SelfAttention(spec, kind),
                spec,
                lowering,
                last_token_only=last_token_only,
            )
            for _ in spec.layer_types
        )

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        call = self.call_plan(input_pos, x.shape[1])
        for half in self.halves:
            x = half(x, call)
        return x


class _Ffn(nn.Module):
    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.half_layer = FfnHalf(
            RMSNorm(spec.model_dim, spec.norm_eps), FeedForward(spec.model_dim, spec.ffn_dims[0])
        )

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        return self.half_layer(x)


class _Ends(nn.Module):
    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        weight = torch.randn(spec.vocab_size, spec.model_dim) * 0.02
        self.embedding = nn.Embedding.from_pretrained(weight)
        self.head = Head(RMSNorm(spec.model_dim, spec.norm_eps), weight)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))
