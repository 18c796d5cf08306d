"""GGUF files for llama.cpp, in architectures that its released versions can build.

- `llama`: full attention only, with or without biases.
- `qwen3`: QK-norm. All its layers attend, so a skipped layer gets an attention of zeros.
- `deci`: skipped layers without QK-norm. A head count of zero marks such a layer, and nothing is
  stored or computed for it; only llama.cpp without flash attention gives it an unused cache of
  values. llama.cpp takes the size of all heads from the first layer. If that one is skipped, it
  gets an attention of zeros.

None of them can mix layers with and without a sliding window.
Source: the loaders of llama.cpp, src/llama-model.cpp and src/models/.
"""

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from jaxtyping import Float, Int
from torch import Tensor

from flash.arch import ArchSpec, Attention, RopeKind
from flash.errors import CheckFailed, InputError, require
from flash.interop.gguf_tokenizer import Vocabulary, read_vocabulary
from flash.interop.hf_folder import zero_filled_state
from flash.interop.settings import GgufFormat
from flash.lowering.bisect_layers import first_failing_layer
from flash.lowering.parity_metrics import FormatCheck, ParityLimits, compare, require_text
from flash.model.decoder import Decoder, rotary_frequencies
from flash.model.tokenizer import ModelTokenizer
from flash.records import replacing

_CHILD = Path(__file__).with_name("llama_cpp_child.py")
"""Script of the process that runs llama.cpp."""
_FILE_TYPES = {
    GgufFormat.f32: LlamaFileType.ALL_F32,
    GgufFormat.f16: LlamaFileType.MOSTLY_F16,
    GgufFormat.q8_0: LlamaFileType.MOSTLY_Q8_0,
    GgufFormat.q4_0: LlamaFileType.MOSTLY_Q4_0,
}
LIMITS = {
    GgufFormat.f32: ParityLimits(max_error=1e-4),
    GgufFormat.f16: ParityLimits(max_error=2e-3),
    GgufFormat.q8_0: ParityLimits(max_kl=0.01, min_agreement=0.95),
    GgufFormat.q4_0: ParityLimits(max_kl=0.2, min_agreement=0.7),
}
"""Limits of `check_gguf` for each format. `backbones/tiny`, which loses more than a large model,
had an error of 6e-7 (f32) and 2e-4 (f16), and a KL of 2e-4 (q8_0) and 2e-2 (q4_0)."""


def _storage_type(weight_format: GgufFormat) -> GGMLQuantizationType:
    """Translate a format to llama.cpp's own type."""
    return GGMLQuantizationType[weight_format.name.upper()]


@dataclass(frozen=True)
class _LlamaCppModel:
    """A model as llama.cpp builds it.

    Attributes:
        architecture: Architecture of llama.cpp.
        spec: Our architecture with attention wherever that of llama.cpp attends, and with one FFN
            width if it has no more.
    """

    architecture: gguf.MODEL_ARCH
    spec: ArchSpec

    @property
    def interleaves_rotary(self) -> bool:
        """True if rotary pairs are adjacent channels of a head; ours are in its two halves."""
        return self.architecture is not gguf.MODEL_ARCH.QWEN3


def _llama_cpp_model(spec: ArchSpec) -> _LlamaCppModel:
    """Choose the architecture of llama.cpp that can express `spec`.

    Raises:
        InputError: None of them can.
    """
    require(
        not (spec.qk_norm and spec.qkv_bias),
        "arch.qkv_bias",
        spec.qkv_bias,
        "false with arch.qk_norm=true, which no architecture of llama.cpp has; export as pte",
    )
    kinds = list(spec.layer_types)
    if Attention.sliding_attention in kinds:
        require(
            spec.sliding_window >= spec.max_context,
            "arch.sliding_window",
            spec.sliding_window,
            f"at least arch.max_context={spec.max_context}, since llama.cpp has no layers with and "
            "without a window in its llama, qwen3 and deci models; export as pte or hf",
        )
        full = Attention.full_attention
        kinds = [kind if kind is not Attention.sliding_attention else full for kind in kinds]
    by_layer = not all(kind.attends for kind in kinds) or isinstance(spec.ffn_dim, tuple)
    if spec.qk_norm:
        llama3 = spec.rope_scaling is not None and spec.rope_scaling.kind is RopeKind.llama3
        require(
            not llama3,
            "arch.rope_scaling.kind",
            "llama3",
            "linear or none with arch.qk_norm=true, since llama.cpp's qwen3 takes no factors of "
            "rotary frequencies; export as pte or hf",
        )
        kinds, architecture = [Attention.full_attention] * len(kinds), gguf.MODEL_ARCH.QWEN3
        spec = spec.replace(ffn_dim=max(spec.ffn_dims))
    elif by_layer:
        kinds[0], architecture = Attention.full_attention, gguf.MODEL_ARCH.DECI
    else:
        architecture = gguf.MODEL_ARCH.LLAMA
    return _LlamaCppModel(architecture, spec.replace(layer_types=tuple(kinds)))


def check_gguf_support(spec: ArchSpec, tokenizer: ModelTokenizer | None) -> None:
    """Check that a file can be written and compared; this takes no noticeable time.

    Raises:
        InputError: llama.cpp cannot express the architecture or the tokenizer, or is not installed.
    """
    _llama_cpp_model(spec)
    if tokenizer is not None:
        read_vocabulary(tokenizer, spec.vocab_size)
    _check_llama_cpp()


def write_gguf(
    path: Path,
    model: Decoder,
    *,
    tokenizer: ModelTokenizer | None,
    weight_format: GgufFormat,
) -> None:
    """Write one file for llama.cpp, completely or not at all.

    Args:
        path: File to write; its stem becomes the model's name.
        model: The decoder.
        tokenizer: Its tokenizer; None writes a file that works on token ids only.
        weight_format: Storage format of matrices.

    Raises:
        InputError: llama.cpp cannot express the architecture or the tokenizer.
    """
    target = _llama_cpp_model(model.spec)
    vocabulary = None
    if tokenizer is not None:
        vocabulary = read_vocabulary(tokenizer, model.spec.vocab_size)
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[target.architecture])
    _add_metadata(writer, path.stem, model.spec, weight_format)
    _add_shape(writer, target)
    _add_tokenizer(writer, vocabulary)
    matrix_type = _storage_type(weight_format)
    tensors = [
        (name, tensor, matrix_type if tensor.dim() == 2 else GGMLQuantizationType.F32)
        for name, tensor in _tensors(model, target)
    ]
    _write(path, writer, tensors)


def _write(
    path: Path, writer: GGUFWriter, tensors: Sequence[tuple[str, Tensor, GGMLQuantizationType]]
) -> None:
    """Write the file. Tensors are converted to their storage type one after the other."""
    for name, tensor, stored in tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = tensor.numel() // block * block_bytes
        # The type of the values that the shape counts, not of the stored bytes.
        writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, size, raw_dtype=stored)
    with replacing(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor, stored in tensors:
                writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), stored))
        finally:
            writer.close()


def _add_metadata(writer: GGUFWriter, name: str, spec: ArchSpec, weight_format: GgufFormat) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[weight_format])
    if weight_format in (GgufFormat.q8_0, GgufFormat.q4_0):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("flash.version", version("mobilellm-flash"))
    writer.add_string("flash.arch", spec.to_json())


def _add_shape(writer: GGUFWriter, target: _LlamaCppModel) -> None:
    spec = target.spec
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.model_dim)
    writer.add_block_count(spec.num_layers)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    if target.architecture is gguf.MODEL_ARCH.DECI:  # per layer
        attends = [kind.attends for kind in spec.layer_types]
        writer.add_head_count([spec.num_heads if there else 0 for there in attends])
        writer.add_head_count_kv([spec.num_kv_heads if there else 0 for there in attends])
        writer.add_feed_forward_length(spec.ffn_dims)
    else:
        writer.add_head_count(spec.num_heads)
        writer.add_head_count_kv(spec.num_kv_heads)
        writer.add_feed_forward_length(max(spec.ffn_dims))
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    if spec.rope_scaling is not None and spec.rope_scaling.kind is RopeKind.linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(spec.rope_scaling.factor)


def _add_tokenizer(writer: GGUFWriter, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.eot_id is not None:
        writer.add_eot_token_id(vocabulary.eot_id)
    if vocabulary.eom_id is not None:
        writer.add_eom_token_id(vocabulary.eom_id)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors(model: Decoder, target: _LlamaCppModel) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 tensors of the file; a tied head is stored once."""
    spec = target.spec
    names = gguf.get_tensor_name_map(target.architecture, spec.num_layers)
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind is RopeKind.llama3:
        # llama.cpp divides the plain frequencies by these factors.
        plain = rotary_frequencies(spec.replace(rope_scaling=None))
        yield "rope_freqs.weight", plain / rotary_frequencies(spec)
    for name, tensor in zero_filled_state(model, spec).items():
        if target.interleaves_rotary and name.split(".")[-2] in ("q_proj", "k_proj"):
            tensor = interleave_rotary_pairs(tensor, spec.head_dim)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        yield gguf_name, tensor


def interleave_rotary_pairs(
    tensor: Float[Tensor, "*shape"], head_dim: int
) -> Float[Tensor, "*shape"]:
    """Reorder rows of a query or key projection: rotary pair (i, i + d / 2) becomes adjacent."""
    heads = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


@torch.no_grad()
def check_gguf(
    path: Path, model: Decoder, text: Int[Tensor, " n"], limits: ParityLimits
) -> FormatCheck:
    """Compare a file, run by llama.cpp, with the decoder that it was made from.

    Args:
        path: Written by `write_gguf`.
        model: The decoder in float32.
        text: Token ids of real text, 2 to `max_context` of them.
        limits: Largest accepted differences; `LIMITS` has them for each format.

    Raises:
        InputError: The text is too short or too long, or llama-cpp-python is not installed.
        CheckFailed: llama.cpp does not load the file, or crashes.
    """
    require_text(text, model.spec.max_context)
    _check_llama_cpp()
    logits = _logits(path, text)
    return compare("gguf", model(text[None].long())[0], logits, text, limits)


def _logits(path: Path, text: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
    """Evaluate a file by llama.cpp in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="flash-") as folder:
        tokens, logits = Path(folder, "tokens.npy"), Path(folder, "logits.npy")
        np.save(tokens, text.numpy())
        # -P: the folder of the script, with modules of our own, is not searched for imports.
        command = [sys.executable, "-P", str(_CHILD), str(path), str(tokens), str(logits)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode == 0:
            return torch.from_numpy(np.load(logits))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CheckFailed(
            f"{path}: llama.cpp crashed ({name}); expected logits to compare. Its builds for "
            "processors with AMX crash on 4-bit files: build it without AMX, by CMAKE_ARGS="
            '"-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" '
            "pip install --force-reinstall --no-cache-dir llama-cpp-python"
        )
    lines = done.stderr.strip().splitlines() or ["it printed nothing"]
    raise CheckFailed(f"{path}: {lines[-1]}")


def locate_gguf_failure(
    model: Decoder,
    text: Int[Tensor, " n"],
    limits: ParityLimits,
    weight_format: GgufFormat,
    folder: Path,
) -> str | None:
    """Name the part of `model` with which its GGUF file begins to fail `check_gguf`.

    llama.cpp shows no values between tokens and logits, so files of the first layers are compared.

    Args:
        model: The decoder in float32.
        text: Token ids of real text, 2 to `max_context` of them.
        limits: Largest accepted differences.
        weight_format: Storage format of matrices.
        folder: Each step writes a temporary file here and removes it.

    Returns:
        The name of the part; None if a new file of the whole model passes.
    """
    path = folder / ".part.gguf"

    def passes(part: Decoder) -> bool:
        write_gguf(path, part, tokenizer=None, weight_format=weight_format)
        return check_gguf(path, part, text, limits).passed

    try:
        return first_failing_layer(model, passes)
    finally:
        path.unlink(missing_ok=True)


def _check_llama_cpp() -> None:
    """Check that llama-cpp-python is installed.

    Raises:
        InputError: It is not.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(
            "llama_cpp: not installed, and a GGUF file is checked in it; "
            "pip install llama-cpp-python (it builds llama.cpp, about 15 minutes)"
        )
