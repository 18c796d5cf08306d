"""Conversion of a GGUF file to a Hugging Face folder, by transformers' own reader.

Transformers leaves some things of a file unread, which are restored here: how the pre-tokenizer
splits text, which tokens besides the first end a generation, the size of heads of some families,
and decimal numbers that the file holds in float32.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers

from flash.errors import InputError, require
from flash.interop.gguf_tokenizer import PATTERNS_BY_NAME
from flash.log_filters import quiet
from flash.model.families import from_config
from flash.model.weights import all_finite, read_config
from flash.records import unfinished

_NEEDED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
"""Keys of an architecture that llama.cpp needs; transformers has defaults, of another model."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Tokens that end a generation in llama.cpp."""


def convert(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a new folder, weights in float32.

    Raises:
        InputError: The file is damaged or lacks a key or a tensor, is of an architecture or with a
            pre-tokenizer that is not known, or the folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists; expected the name of a new folder")
    fields = _fields(path)
    splits = _pre_tokenizer(path, fields)
    _check(path, fields)
    with unfinished(folder) as whole:
        whole.mkdir()
        _write_model(path, whole, fields)
        _restore_configs(whole, fields)
        _write_tokenizer(path, whole, splits)
        from_config(read_config(whole), str(path))  # raises if the decoder cannot express the model
        for file in whole.iterdir():
            file.chmod(0o644)
        whole.rename(folder)


def _fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, long arrays left out.

    Raises:
        InputError: It is missing or no GGUF file.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a GGUF file, found none")
    try:
        reader = gguf.GGUFReader(path)
        return {
            name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{path}: damaged, or no GGUF file ({error}); fetch it again") from error


def _check(path: Path, fields: dict[str, Any]) -> None:
    """Check keys that transformers would replace, or that it does not read.

    Raises:
        InputError: One is missing or has an odd value.
    """
    arch = fields.get("general.architecture")
    lacking = ["general.architecture"] if arch is None else [f"{arch}.{key}" for key in _NEEDED]
    for key in lacking:
        if key not in fields:
            raise InputError(f"{path}: expected {key}, found none; fetch it again")
    for key in (*_END_KEYS, "bos_token_id"):
        found = fields.get(f"tokenizer.ggml.{key}", 0)
        is_id = type(found) is int and found >= 0
        require(is_id, f"{path}: tokenizer.ggml.{key}", found, "the id of a token")


def _pre_tokenizer(path: Path, fields: dict[str, Any]) -> pre_tokenizers.PreTokenizer | None:
    """The pre-tokenizer that the file names; None for vocabularies that need none.

    Raises:
        InputError: The name is not known.
    """
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = fields.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(name, str) or name not in PATTERNS_BY_NAME:
        raise InputError(
            f"{path}: tokenizer.ggml.pre={name}: expected one of {', '.join(PATTERNS_BY_NAME)}; "
            "take the model's own Hugging Face folder"
        )
    pattern = PATTERNS_BY_NAME[name]
    if pattern == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == "digits gpt-2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([digits, whole])
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, rest])


def _write_model(path: Path, folder: Path, fields: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # three bars for what takes seconds
    with quiet():
        with _named(path):
            config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            size = fields.get(f"{fields['general.architecture']}.attention.key_length")
            if size is not None:
                config.head_dim = int(size)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, report = loaded
        # The library goes on with random values for weights that are missing or of another shape.
        odd = dict.fromkeys(report["missing_keys"], "none")
        odd |= {name: f"shape {tuple(theirs)}" for name, theirs, _ in report["mismatched_keys"]}
        for name, found in sorted(odd.items()):
            raise InputError(f"{path}: weights of {name}: found {found}; fetch the file again")
        for name, tensor in model.state_dict().items():
            if not all_finite(tensor):
                raise InputError(
                    f"{path}: weights of {name}: found values that are NaN or infinite; fetch the "
                    "file again"
                )
        # The weights are plain by now; the marks of the former format would be saved with them.
        model.is_quantized = False
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise `InputError` in place of the errors that libraries raise for odd files."""
    try:
        yield
    except Exception as error:  # of every kind, as the libraries check nothing
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: transformers cannot read it ({reason})") from error


def _restore_configs(folder: Path, fields: dict[str, Any]) -> None:
    """Put the file's end tokens and decimal numbers into the configs."""
    ends = [fields[key] for name in _END_KEYS if (key := f"tokenizer.ggml.{name}") in fields]
    found: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(map(int, ends)))}
    if "tokenizer.ggml.bos_token_id" in fields:
        found["bos_token_id"] = int(fields["tokenizer.ggml.bos_token_id"])
    if len(found["eos_token_id"]) == 1:
        found["eos_token_id"] = found["eos_token_id"][0]
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        values = _decimal(json.loads(path.read_text("utf-8")))
        values.pop("_model_name_or_path", None)
        values |= {key: value for key, value in found.items() if value != []}
        path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _decimal(value: Any) -> Any:
    """Values with every float32 number as the shortest decimal number that rounds to it."""
    if isinstance(value, dict):
        return {key: _decimal(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return float(str(np.float32(value)))
    return value


def _write_tokenizer(path: Path, folder: Path, splits: pre_tokenizers.PreTokenizer | None) -> None:
    from transformers import AutoTokenizer

    with quiet():
        with _named(path):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    if splits is not None:
        file = folder / "tokenizer.json"
        backend = Tokenizer.from_file(str(file))
        backend.pre_tokenizer = splits
        backend.save(str(file))
