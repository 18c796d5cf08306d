"""Shapes of models that ExecuTorch's own decoder builds: published baselines, and our specs.

A model is called stock here if `export_llm`, the exporter that comes with ExecuTorch, lowers it.
The published baselines (LFM2, Gemma 3) have layers that our decoder lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash.arch import ArchSpec, Attention, RopeKind
from flash.errors import InputError, nearest, require


@dataclass(frozen=True, kw_only=True)
class StockModel:
    """Shape of a decoder in the terms of ExecuTorch's `export_llm`.

    Attributes:
        name: Our name of it, for files and tables.
        model_class: The option `base.model_class`; as weights are given, it decides no shape.
        params: Fields of `executorch.examples.models.llama.model_args.ModelArgs`; plain values.
        windows: Number of positions that each layer sees, 0 for all of them; empty if all layers
            see all positions [tokens].
    """

    name: str
    model_class: str
    params: Mapping[str, Any]
    windows: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.params["vocab_size"]

    @property
    def widths(self) -> tuple[int, ...]:
        """Input widths of the matrices: model, FFN, and all query heads."""
        p = self.params
        q_dim = p["n_heads"] * p.get("head_dim", p["dim"] // p["n_heads"])
        return p["dim"], p["hidden_dim"], q_dim

    @property
    def parameters(self) -> int:
        """Number of parameters; the tied head and embedding count once."""
        p = self.params
        dim, heads = p["dim"], p["n_heads"]
        head_dim = p.get("head_dim", dim // heads)
        q_dim, kv_dim = heads * head_dim, p["n_kv_heads"] * head_dim
        attention = dim * (2 * q_dim + 2 * kv_dim)
        attention += 2 * head_dim if p.get("use_qk_norm") else 0
        attention += q_dim + 2 * kv_dim if p.get("attention_qkv_bias") else 0
        # A skipped layer has no norm either.
        mixers = {"conv": 4 * dim**2 + CONV * dim, "skip_attention": -dim}
        kinds = p.get("layer_types", ["full_attention"] * p["n_layers"])
        norms = 4 if p.get("post_attention_norm") else 2
        layers = sum(mixers.get(kind, attention) for kind in kinds)
        layers += p["n_layers"] * (3 * dim * p["hidden_dim"] + norms * dim)
        return p["vocab_size"] * dim + layers + dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "stock": self.name,
            "model_class": self.model_class,
            "params": dict(self.params),
            "windows": list(self.windows),
        }


CONV = 3
"""Kernel width of LFM2's short convolutions [tokens]."""


def stock_model(name: str) -> StockModel:
    """Return the baseline of a name.

    Raises:
        InputError: No baseline has this name.
    """
    if name not in STOCK_MODELS:
        hint = nearest(str(name), STOCK_MODELS)
        raise InputError(f"arch.stock={name}: expected {', '.join(STOCK_MODELS)}; {hint}")
    return STOCK_MODELS[name]


def to_stock_model(spec: ArchSpec) -> StockModel:
    """Express one of our architectures in the terms of ExecuTorch's decoder.

    With QK-norm the rotary embedding pairs channels of the two halves of a head, as in Hugging
    Face's models and ExecuTorch's own Qwen3 and LFM2. Without, it pairs adjacent channels, as in
    ExecuTorch's Llama.

    Raises:
        InputError: `spec` has linear rotary scaling or several FFN widths, which that decoder
            lacks.
    """
    require(
        isinstance(spec.ffn_dim, int),
        "arch.ffn_dim",
        spec.ffn_range,
        "one width for all layers, as ExecuTorch's decoder has",
    )
    params: dict[str, Any] = {
        "dim": spec.model_dim,
        "hidden_dim": spec.ffn_dim,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "layer_types": [kind.value for kind in spec.layer_types],
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "attention_qkv_bias": spec.qkv_bias,
        "use_qk_norm": spec.qk_norm,
        "qk_norm_before_rope": True,
        "use_hf_rope": spec.qk_norm,
    }
    scaling = spec.rope_scaling
    if scaling is not None:
        require(
            scaling.kind is RopeKind.llama3,
            "arch.rope_scaling.kind",
            scaling.kind.value,
            "llama3, the only scaling of ExecuTorch's own decoder",
        )
        params["use_scaled_rope"] = True
        params["rope_scale_factor"] = int(scaling.factor)
        params["high_freq_factor"] = int(scaling.high_freq_factor)
    sliding = Attention.sliding_attention
    windows = tuple(spec.sliding_window if k is sliding else 0 for k in spec.layer_types)
    return StockModel(
        name=f"stock of {spec}",
        # Later classes replace the factor of the rotary scaling by their own.
        model_class="llama3",
        params=params,
        windows=windows if any(windows) else (),
    )


def _lfm2(name: str, dim: int, hidden_dim: int, n_heads: int) -> StockModel:
    """LFM2 as in config.json of LiquidAI/LFM2-350M, -700M and -1.2B (arXiv:2511.23404)."""
    attention = {2, 5, 8, 10, 12, 14}
    params = {
        "dim": dim,
        "hidden_dim": hidden_dim,
        "n_layers": 16,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "vocab_size": 65536,
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(16)],
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "use_qk_norm": True,
        "qk_norm_before_rope": True,
        "use_hf_rope": True,
    }
    return StockModel(name=name, model_class=name, params=params)


def _gemma3(name: str, dim: int, hidden_dim: int, n_layers: int) -> StockModel:
    """Gemma 3 as in config.json of google/gemma-3-270m and -1b-pt (arXiv:2503.19786).

    Every sixth layer sees all tokens, the others 512. Two things differ from the original, and
    neither changes the time: local layers use the rotary frequencies of the global ones, and the
    embedding is not scaled.
    """
    params = {
        "dim": dim,
        "hidden_dim": hidden_dim,
        "n_layers": n_layers,
        "n_heads": 4,
        "n_kv_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "norm_eps": 1e-6,
        "post_attention_norm": True,
        "post_ffn_norm": True,
        "act_fn": "gelu_approx",
        "rope_theta": 1e6,
        "use_qk_norm": True,
        "qk_norm_before_rope": True,
        "use_hf_rope": True,
    }
    windows = tuple(0 if i % 6 == 5 else 512 for i in range(n_layers))
    return StockModel(name=name, model_class="llama3", params=params, windows=windows)


STOCK_MODELS: Mapping[str, StockModel] = {
    model.name: model
    for model in (
        _lfm2("lfm2_350m", 1024, 4608, 16),
        _lfm2("lfm2_700m", 1536, 6912, 24),
        _lfm2("lfm2_1_2b", 2048, 8192, 32),
        _gemma3("gemma3_270m", 640, 2048, 18),
        _gemma3("gemma3_1b", 1152, 6912, 26),
    )
}
"""Baselines by name; the legal values of `arch.stock`."""
