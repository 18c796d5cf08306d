"""Files of a backbone's folder: configs, tokenizer, index, weights; and GGUF files."""

import json
import struct
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.fuzz.attempt import Attempt
from tests.fuzz.mutate import byte_changes, json_changes, to_json, write_changed
from tests.fuzz.settings import link_inputs

_TRAIN = ["train", "experiment=small", "trainer.max_steps=1", "name=odd"]
_BYTES = 20
"""Changes of bytes of a JSON file in front of those of its values."""


def attempt_of(
    project: Path,
    file: str,
    what: str,
    content: bytes | None,
    *,
    arguments: list[str] = _TRAIN,
    passes: Callable[[Path, str], bool] = lambda work, output: True,
    more: Callable[[Path], object] = lambda work: None,
) -> Attempt:
    """Return an attempt in which one file of the project is changed.

    Args:
        project: The project.
        file: Path of the file in it.
        what: The change in words.
        content: New content; None is a folder.
        arguments: The command.
        passes: Whether the command may end well.
        more: Called with the folder afterwards, for further changes.
    """

    def prepare(work: Path) -> list[str]:
        link_inputs(project, work, file.partition("/")[0])
        write_changed(work / file, content)
        more(work)
        return arguments

    return Attempt(f"{file}: {what}", prepare, passes, timeout_s=120.0)


def json_attempts(
    project: Path, random: Random, file: str, values: Any, **options: Any
) -> Iterator[Attempt]:
    """Attempts with changed bytes of a JSON file, then with each of its values changed."""
    text = to_json(values)
    for what, content in islice(byte_changes(text, random), _BYTES):
        yield attempt_of(project, file, what, content, **options)
    for what, changed in json_changes(values, random):
        yield attempt_of(project, file, what, to_json(changed), **options)


def _shuffled(streams: list[Iterator[Attempt]], random: Random) -> Iterator[Attempt]:
    while streams:
        stream = random.choice(streams)
        try:
            yield next(stream)
        except StopIteration:
            streams.remove(stream)


_FURTHER = {
    "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
    "eos_token_id": [0, 1],
    "auto_map": {"AutoModel": "modeling.X"},
}  # fmt: skip
"""Keys that checkpoints of others have besides ours."""
_TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "bos_token": "<|endoftext|>",
    "eos_token": {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"},
    "pad_token": None,
    "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
    "additional_special_tokens": ["<|endoftext|>"],
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "model_max_length": 2048,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}


def attempts_configs(random: Random, project: Path) -> Iterator[Attempt]:
    """JSON files of a backbone's folder; the model is loaded, trained and saved with its files."""
    config = json.loads((project / "hf" / "config.json").read_text("utf-8"))
    weights = load_file(project / "hf" / "model.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"),
    }

    def split(work: Path) -> None:
        (work / "hf" / "model.safetensors").rename(work / "hf" / "model-00001-of-00001.safetensors")

    generation = {"eos_token_id": 0, "bos_token_id": 0, "max_length": 20, "do_sample": True}
    yield from _shuffled(
        [
            json_attempts(project, random, "hf/config.json", config),
            json_attempts(project, random, "hf/config.json", {**config, **_FURTHER}),
            json_attempts(project, random, "hf/tokenizer_config.json", _TOKENIZER_CONFIG),
            json_attempts(project, random, "hf/generation_config.json", generation),
            json_attempts(project, random, "hf/model.safetensors.index.json", index, more=split),
        ],
        random,
    )


def attempts_tokenizers(random: Random, project: Path) -> Iterator[Attempt]:
    """tokenizer.json of the backbone."""
    values = json.loads((project / "hf" / "tokenizer.json").read_text("utf-8"))
    vocab = values["model"]["vocab"]
    huge = [10**6, 10**9, 2**31, 2**32 - 1, 2**32, 2**63, -1]
    for number in huge:
        changed = {**values, "model": {**values["model"], "vocab": {**vocab, "huge": number}}}
        yield attempt_of(project, "hf/tokenizer.json", f"an id of {number}", to_json(changed))
        added = [
            *values["added_tokens"],
            {**values["added_tokens"][0], "id": number, "content": "h"},
        ]
        changed = {**values, "added_tokens": added}
        yield attempt_of(project, "hf/tokenizer.json", f"an added {number}", to_json(changed))
    short = {**values, "model": {**values["model"], "vocab": dict(list(vocab.items())[:3])}}
    yield attempt_of(project, "hf/tokenizer.json", "three tokens", to_json(short))
    slim = {**values, "model": {**values["model"], "merges": values["model"]["merges"][:3]}}
    yield from json_attempts(project, random, "hf/tokenizer.json", slim)


def _weights(project: Path) -> dict[str, torch.Tensor]:
    return load_file(project / "hf" / "model.safetensors")


def attempts_weights(random: Random, project: Path) -> Iterator[Attempt]:
    """Files of weights: other types, shapes and values, then damaged headers and bytes."""
    file, content = "hf/model.safetensors", (project / "hf" / "model.safetensors").read_bytes()
    tensors = _weights(project)
    names = sorted(tensors)

    def changed(what: str, name: str, tensor: torch.Tensor | None, may: bool) -> Attempt:
        new = {k: v for k, v in tensors.items() if k != name}
        if tensor is not None:
            new[name] = tensor
        return attempt_of(
            project, file, f"{name}: {what}", save(new, {"format": "pt"}),
            passes=lambda work, output: may,
        )  # fmt: skip

    def changes(name: str) -> Iterator[Attempt]:
        old = tensors[name]
        for kind in ("int8", "uint8", "int32", "int64", "bool", "complex64", "float8_e4m3fn"):
            yield changed(kind, name, old.to(getattr(torch, kind)), may=False)
        for kind in ("float16", "float32", "float64"):
            yield changed(kind, name, old.to(getattr(torch, kind)), may=True)
        for value in (float("nan"), float("inf"), float("-inf")):
            yield changed(f"all {value}", name, torch.full_like(old, value), may=False)
            one = old.clone()
            one.view(-1)[random.randrange(old.numel())] = value
            yield changed(f"one {value}", name, one, may=False)
        yield changed("missing", name, None, may=False)
        yield changed("flat", name, old.reshape(-1), may=old.ndim == 1)
        yield changed("short", name, old[:-1].clone(), may=False)
        yield changed("empty", name, old[:0].clone(), may=False)
        yield changed("of 4 dimensions", name, old[None, None], may=False)

    streams: list[Iterator[Attempt]] = [changes(name) for name in names]
    yield from islice(_shuffled(streams, random), 4 * len(names))
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_header(text: bytes, size: int | None = None) -> bytes:
        return struct.pack("<Q", (len(text) if size is None else size) % 2**64) + text + data

    text = to_json(header)
    for size in (0, 1, 2**20, 2**31, 2**40, 2**63, -1):
        yield attempt_of(project, file, f"a header of {size}", with_header(text, size))
    values = json_changes(header, random)
    damaged = byte_changes(content, random)
    headers: Iterator[Attempt] = (
        attempt_of(project, file, what, with_header(to_json(new))) for what, new in values
    )
    contents: Iterator[Attempt] = (
        attempt_of(project, file, what, new) for what, new in islice(damaged, 2000)
    )
    yield from _shuffled([headers, contents], random)


def attempts_gguf(random: Random, project: Path) -> Iterator[Attempt]:
    """GGUF files that are converted."""
    content = (project / "model.gguf").read_bytes()
    head = content[:12_000]  # names, values and shapes
    yield from (
        attempt_of(project, "model.gguf", what, new, arguments=["convert", "model.gguf", "made"])
        for what, new in chain(
            islice(byte_changes(content, random), 40),
            (
                (what, None if new is None else new + content[len(head) :])
                for what, new in byte_changes(head, random)
            ),
        )
    )


KINDS = {
    "configs": attempts_configs,
    "tokenizers": attempts_tokenizers,
    "weights": attempts_weights,
    "gguf": attempts_gguf,
}
