"""Tokenizer folders of the kinds that public models have, and their comparison with transformers.

`verdicts` yields the name of each folder and `right`, `refused: ...` or `wrong: ...`.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

from flash.data.tokenizer import token_bytes
from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer

TEXTS = (
    "Köln 東京 café",
    "def f(x):\n    return x + 1\n",
    "a  b\t\tc 🙂 naïve",
    "hello world " * 40,
)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


def byte_level(special: list[str], begin: str | None = None, end: str | None = None) -> Tokenizer:
    """Byte-level BPE; `begin` and `end` are put around a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["hello world, hello again"] * 9, trainer)
    return _around(made, begin, end)


def _around(made: Tokenizer, begin: str | None, end: str | None) -> Tokenizer:
    names = [name for name in (begin, end) if name is not None]
    if names:
        made.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=" ".join([begin or "", "$A", end or ""]).split(),
            special_tokens=[(name, made.token_to_id(name)) for name in names],
        )
    return made


def changed(made: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A tokenizer after a change of its JSON form."""
    values = json.loads(made.to_str())
    change(values)
    return Tokenizer.from_str(json.dumps(values))


def sentencepiece(
    kind: str = "BPE", *, legacy: bool = False, begin: str | None = "<s>"
) -> Tokenizer:
    """BPE or Unigram with metaspaces and tokens for single bytes, as SentencePiece makes them.

    Args:
        kind: Kind of the model.
        legacy: Replace blanks in a normalizer, as older converters do.
        begin: Token that is put in front of a text.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", *"abcdefghiklmnoprstuvwxyKöé", "he", "ll", "hell", "hello", "▁hello", "▁w", "or"]
    pieces += words
    values: dict[str, Any] = json.loads(Tokenizer(models.BPE()).to_str())
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w")]
    model: dict[str, Any] = {"type": kind, "byte_fallback": True}
    if kind == "BPE":
        model |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "fuse_unk": True}
        model |= {"merges": [list(pair) for pair in pairs], "unk_token": "<unk>"}
    else:
        model |= {"vocab": [[piece, -float(i > 2)] for i, piece in enumerate(pieces)], "unk_id": 0}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values |= {
        "model": model,
        "added_tokens": [
            {"id": i, "content": piece, "special": True, **flags}
            for i, piece in enumerate(pieces[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps} if legacy else None,
        "pre_tokenizer": None if legacy else space,
        "decoder": {"type": "Sequence", "decoders": back},
    }
    return _around(Tokenizer.from_str(json.dumps(values)), begin, None)


def wordpiece() -> Tokenizer:
    made = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    return _around(made, "[CLS]", "[SEP]")


def cut_and_padded() -> Tokenizer:
    made = byte_level(["<s>", "</s>", "<pad>"])
    made.enable_truncation(8)
    made.enable_padding(length=64, pad_id=2, pad_token="<pad>")
    return made


def with_holes(values: dict[str, Any]) -> None:
    """Move the last token far behind the others."""
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000


@dataclass(frozen=True)
class Folder:
    """A folder to build.

    Attributes:
        tokenizer: Maker of its tokenizer.json.
        config: config.json, besides what all have.
        tokenizer_config: tokenizer_config.json; None: no such file.
        generation_config: generation_config.json; None: no such file.
        texts: Other files by name.
        end: Token that ends documents; None: it is refused.
        blank: Bytes that the tokenizer puts in front of a text.
    """

    tokenizer: Callable[[], Tokenizer]
    end: str | None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    blank: int = 0

    def write(self, folder: Path) -> None:
        self.tokenizer().save(str(folder / "tokenizer.json"))
        config = {"model_type": "llama", "vocab_size": 100_000, **self.config}
        parts = {
            "config": config,
            "tokenizer_config": self.tokenizer_config,
            "generation_config": self.generation_config,
        }
        for name, values in parts.items():
            if values is not None:
                (folder / f"{name}.json").write_text(json.dumps(values), "utf-8")
        for name, text in self.texts.items():
            (folder / name).write_text(text, "utf-8")


def named(**values: Any) -> dict[str, Any]:
    """A tokenizer_config.json of the generic class."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", **values}


def added(token: str) -> dict[str, Any]:
    """A token in the long form of tokenizer_config.json."""
    return {"__type": "AddedToken", "content": token, "special": True}


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"]  # noqa: RUF001
PLAIN = ["<s>", "</s>", "<e>"]
NAMED = named(bos_token="<s>", eos_token="</s>")


def plain() -> Tokenizer:
    return byte_level(PLAIN)


def begun() -> Tokenizer:
    return byte_level(PLAIN, "<s>")


FOLDERS: dict[str, Folder] = {
    "llama 3 instruct": Folder(
        lambda: byte_level(LLAMA3, LLAMA3[0]),
        LLAMA3[3],
        {"bos_token_id": 0, "eos_token_id": [1, 2, 3]},
        named(bos_token=LLAMA3[0], eos_token=LLAMA3[3], chat_template=CHAT),
        {"bos_token_id": 0, "eos_token_id": [1, 2, 3], "temperature": 0.6, "do_sample": True},
    ),
    "qwen instruct": Folder(
        lambda: byte_level(QWEN),
        "<|im_end|>",
        {"bos_token_id": 0, "eos_token_id": 2},
        named(
            bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False
        ),
        {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0},
        {"chat_template.jinja": CHAT},
    ),
    "gemma names": Folder(
        lambda: byte_level(["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<bos>"),
        "<eos>",
        {"eos_token_id": [1, 3]},
        named(bos_token="<bos>", eos_token="<eos>", pad_token=added("<pad>")),
    ),
    "deepseek bars": Folder(
        lambda: byte_level(DEEPSEEK, DEEPSEEK[0]),
        DEEPSEEK[1],
        {"bos_token_id": 0, "eos_token_id": 1},
        named(bos_token=added(DEEPSEEK[0]), eos_token=added(DEEPSEEK[1])),
    ),
    "sentencepiece bpe": Folder(sentencepiece, "</s>", tokenizer_config=NAMED, blank=1),
    "sentencepiece bpe, legacy": Folder(
        lambda: sentencepiece(legacy=True), "</s>", tokenizer_config=NAMED, blank=1
    ),
    "sentencepiece without begin": Folder(
        lambda: sentencepiece(begin=None), "</s>", {"eos_token_id": 2}, blank=1
    ),
    "unigram": Folder(lambda: sentencepiece("Unigram"), "</s>", tokenizer_config=NAMED, blank=1),
    "wordpiece": Folder(wordpiece, None, {"eos_token_id": 2}),
    "begin and end around": Folder(
        lambda: byte_level(PLAIN, "<s>", "<e>"), "<e>", tokenizer_config=NAMED
    ),
    "roberta's processor": Folder(
        lambda: changed(
            plain(),
            lambda values: values.update(
                post_processor={
                    "type": "RobertaProcessing",
                    "sep": ["</s>", 1],
                    "cls": ["<s>", 0],
                    "trim_offsets": True,
                    "add_prefix_space": False,
                }
            ),
        ),
        "</s>",
        tokenizer_config=NAMED,
    ),
    "template in a sequence": Folder(
        lambda: changed(
            begun(),
            lambda values: values.update(
                post_processor={
                    "type": "Sequence",
                    "processors": [
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "trim_offsets": True,
                            "use_regex": True,
                        },
                        values["post_processor"],
                    ],
                }
            ),
        ),
        "</s>",
        tokenizer_config=NAMED,
    ),
    "truncation and padding": Folder(cut_and_padded, "</s>", tokenizer_config=NAMED),
    "holes": Folder(lambda: changed(plain(), with_holes), "</s>", tokenizer_config=NAMED),
    "padded vocabulary": Folder(plain, "</s>", {"vocab_size": 131_072, "eos_token_id": 1}),
    "null template": Folder(plain, "</s>", tokenizer_config={**NAMED, "chat_template": None}),
    "list of templates": Folder(
        plain,
        "</s>",
        tokenizer_config={
            **NAMED,
            "chat_template": [
                {"name": "default", "template": CHAT},
                {"name": "tool_use", "template": "x"},
            ],
        },
    ),
    "template in both": Folder(
        plain,
        "</s>",
        tokenizer_config={**NAMED, "chat_template": "x"},
        texts={"chat_template.jinja": CHAT},
    ),
    "config only": Folder(plain, "</s>", {"bos_token_id": 0, "eos_token_id": [1, 2]}),
    "generation_config only": Folder(
        plain, "<e>", generation_config={"bos_token_id": 0, "eos_token_id": [2, 1]}
    ),
    "generation_config first": Folder(
        plain,
        "</s>",
        {"bos_token_id": 0, "eos_token_id": 1},
        NAMED,
        {"bos_token_id": 0, "eos_token_id": [2, 1]},
    ),
    "tokenizer_config only": Folder(begun, "</s>", tokenizer_config=NAMED),
    "special_tokens_map only": Folder(
        plain, "</s>", texts={"special_tokens_map.json": json.dumps(NAMED)}
    ),
    "special_tokens_map wins": Folder(
        plain,
        "<e>",
        tokenizer_config=NAMED,
        texts={"special_tokens_map.json": json.dumps({"eos_token": "<e>"})},
    ),
    "special_tokens_map of an older version": Folder(
        plain,
        "</s>",
        tokenizer_config={**NAMED, "added_tokens_decoder": {}},
        texts={"special_tokens_map.json": json.dumps({"eos_token": "<e>"})},
    ),
    "add_bos_token without effect": Folder(
        begun, "</s>", tokenizer_config={**NAMED, "add_bos_token": False}
    ),
    "add_bos_token without a processor": Folder(
        plain, "</s>", tokenizer_config={**NAMED, "add_bos_token": True}
    ),
    "an end token that is not special": Folder(
        lambda: changed(plain(), lambda values: values["added_tokens"].pop(1)),
        "</s>",
        tokenizer_config=NAMED,
    ),
    "ids of no token": Folder(
        plain, "</s>", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, NAMED
    ),
    "a tokenizer of flash": Folder(lambda: byte_level(["<|endoftext|>"]), "<|endoftext|>"),
    "no end at all": Folder(lambda: byte_level(["<s>"]), None),
    "a damaged config": Folder(plain, None, texts={"tokenizer_config.json": "{"}),
    "an id that is none": Folder(plain, None, {"eos_token_id": "</s>"}),
}


def verdicts(names: Iterator[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name and the verdict of each folder."""
    for name in names or FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            yield name, verdict(FOLDERS[name], Path(folder))


def verdict(given: Folder, folder: Path) -> str:
    """Build a folder and compare what flash and transformers read in it."""
    source, written = folder / "source", folder / "written"
    source.mkdir()
    written.mkdir()
    given.write(source)
    try:
        ours = ModelTokenizer.open(source / "tokenizer.json")
    except InputError as error:
        return f"refused: {error}"
    config = json.loads((source / "config.json").read_text("utf-8"))
    ours.write(written)
    (written / "config.json").write_text(json.dumps({**config, **ours.token_ids}), "utf-8")
    again = ModelTokenizer.open(written / "tokenizer.json")
    problems = [
        *_compare(given, ours, source),
        *(f"written: {problem}" for problem in _compare(given, again, written)),
    ]
    for name in ("ends", "begin", "end_of_text", "prefix", "pad", "special", "chat_template"):
        before, after = getattr(ours, name), getattr(again, name)
        if before != after:
            problems.append(f"written: {name}={after}, was {before}")
    return "wrong: " + "; ".join(problems) if problems else "right"


def _compare(given: Folder, ours: ModelTokenizer, folder: Path) -> Iterator[str]:
    """Differences between flash and transformers about one folder."""
    theirs = AutoTokenizer.from_pretrained(folder)
    lengths = token_bytes(ours.backend)
    for text in TEXTS:
        ids, plain = ours.backend.encode(text).ids, ours.encode(text)
        if ids != theirs(text).input_ids:
            yield f"tokens of {text!r}"
        if ids[: len(plain)] != plain:
            yield f"begin of {text!r}"
        size = int(lengths[np.array(plain)].sum())
        if size != len(text.encode()) + given.blank:
            yield f"{text!r}: {size} bytes"
    if given.end is None or ours.end_of_text != ours.backend.token_to_id(given.end):
        yield f"end of text {ours.end_of_text}"
    generation = folder / "generation_config.json"
    file = generation.name if generation.is_file() else "config.json"
    stock = GenerationConfig.from_pretrained(folder, config_file_name=file)
    ends = stock.eos_token_id if isinstance(stock.eos_token_id, list) else [stock.eos_token_id]
    ends = [end for end in ends if end is not None]
    if list(ours.ends[: len(ends)]) != ends:
        yield f"ends {ours.ends}, transformers has {ends}"
    if theirs.eos_token_id is not None and theirs.eos_token_id not in ours.ends:
        yield f"eos_token {theirs.eos_token} ends nothing"
    begin = theirs.bos_token_id if theirs.bos_token_id is not None else stock.bos_token_id
    if begin is not None and ours.begin != begin:
        yield f"begin {ours.begin}, transformers has {begin}"
    template: Any = theirs.chat_template
    template = template["default"] if isinstance(template, dict) else template
    if ours.chat_template != template:
        yield f"template {ours.chat_template!r}"
