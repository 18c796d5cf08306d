"""Text and chat data that users bring, and chat templates."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.attempt import Attempt
from tests.fuzz.mutate import byte_changes, write_changed
from tests.fuzz.settings import link_inputs

_PREPARE = ["prepare", "data=small", "data.name=small", "backbone.weights=hf", "out=made"]
STREAM = ["train", "experiment=small", "data.kind=datasets", "data.path=null", "name=odd"]
STREAM += ["trainer.max_steps=1", "data.validation_percent=20"]
"""Command that trains on a source; further settings complete it."""
_COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def _quoted(word: str) -> str:
    """A value of Hydra, quoted."""
    return "'" + word.replace("'", "\\'") + "'"


def _lines(rows: list[Any]) -> bytes:
    """JSON lines of rows; bytes are a line as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def _reading(
    project: Path,
    what: str,
    name: str,
    content: bytes | None,
    *,
    skip: bool,
    may: bool = True,
    must: bool = False,
    stream: bool = False,
    workers: int = 0,
    column: str = "text",
) -> Attempt:
    """Return an attempt of reading one file of a source."""
    source = f"data.sources=[{{path: odd/{name}, column: {_quoted(column)}}}]"
    command = [*STREAM, f"data.workers={workers}"] if stream else _PREPARE

    def prepare(work: Path) -> list[str]:
        link_inputs(project, work, "odd")
        write_changed(work / "odd" / name, content)
        return [*command, source, f"data.skip_damaged={str(skip).lower()}"]

    way = f"{name}{' skip' if skip else ''}{' stream' if stream else ''}"
    passes = lambda work, output: may  # noqa: E731
    return Attempt(f"{way}: {what}", prepare, passes, timeout_s=120.0, must_pass=must)


def _odd_rows(text: str) -> Iterator[tuple[str, Any, bool]]:
    """Rows in words, as JSON or bytes, and whether they are text."""
    for value in (5, 0.5, True, [], [text], {}, {"text": text}, float("nan"), 10**400):
        yield repr(value)[:20], {"text": value}, False
    for value in (None, "", " ", "\0", f"{text}\0", "\ufeff", "\x1b[31m", "<|endoftext|>", "ü" * 9):
        yield repr(value)[:20], {"text": value}, True
    for value in ("x" * 10**6, "ab " * 10**6, "\n" * 10**6, "\U0001f600" * 10**5):
        yield f"{len(value)} characters", {"text": value}, True
    for value in (None, 5, text, [], [text], {}, {"other": text}, {"Text": text}):
        yield f"a row {str(value)[:20]}", value, False
    for value in ("\ud83d", f"{text}\udc00"):
        yield "half a pair", {"text": value}, False
    for line in (
        *(b"{", b"nothing", b'{"text": "a', b'{"text": "a\tb"}', b'{"text": "\xff"}', b"\x00" * 99),
        *(b"[" * 99_999, b'{"text": ' + b"[" * 99_999, b'{"a": 1}{"text": "b"}', b'{"text": 01}'),
        *(b"5" * 5000, b'{"text": ' + b"5" * 5000 + b"}", b"\xef\xbb\xbf{}", b'"text"'),
    ):
        yield f"a line {line[:20]!r}", line, False
    yield "twice a key", b'{"text": 5, "text": "def f(x):"}', True
    yield "other keys", {"text": text, "x" * 10**6: [[]]}, True


def _columns(texts: list[str]) -> Iterator[tuple[str, Any, bool]]:
    """Columns of parquet files in words, and whether they are text."""
    count = len(texts)
    for kind in (pa.int64(), pa.float32(), pa.bool_(), pa.date32(), pa.decimal128(12, 2)):
        yield (
            str(kind),
            pa.array([None] * (count - 1) + [1], pa.int8()).cast(pa.int32()).cast(kind),
            False,
        )
    encoded = [text.encode() for text in texts]
    for kind in (pa.binary(), pa.large_binary()):
        yield str(kind), pa.array(encoded, kind), False
    yield "of fixed size", pa.array([b"abcd"] * count, pa.binary(4)), False
    yield "null", pa.nulls(count), False
    yield "lists", pa.array([[text] for text in texts]), False
    yield "objects", pa.array([{"a": text} for text in texts]), False
    yield (
        "maps",
        pa.array([[("a", text)] for text in texts], pa.map_(pa.string(), pa.string())),
        False,
    )
    yield "dictionary", pa.array(texts).dictionary_encode(), True
    yield "a dictionary of numbers", pa.array([1] * count).dictionary_encode(), False
    for kind in (pa.large_string(), pa.string_view()):
        yield str(kind), pa.array(texts, kind), True
    odd = pa.array([b"\xff\xfe" + text.encode() for text in texts], pa.binary())
    yield "not UTF-8", odd.view(pa.string()), False
    yield "all empty", pa.array([""] * count), False
    yield "all null", pa.array([None] * count, pa.string()), False
    yield "no rows", pa.array([], pa.string()), False


def _parquet(column: Any, name: str = "text", **options: Any) -> bytes:
    file = BytesIO()
    pq.write_table(pa.table({name: column}), file, **options)
    return file.getvalue()


def attempts_texts(random: Random, project: Path) -> Iterator[Attempt]:
    """Files of text: odd rows among good ones, odd columns, then damaged files of all formats."""
    rows = [json.loads(line) for line in (project / "texts" / "a.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    fixed = []
    for what, odd, may in _odd_rows(texts[0]):
        place, skip = random.choice([0, 1, len(rows)]), random.random() < 0.6
        content = _lines([*rows[:place], odd, *rows[place:]])
        stream = random.random() < 0.3
        fixed.append(
            _reading(
                project,
                what,
                "a.jsonl",
                content,
                skip=skip,
                stream=stream,
                may=may or skip or stream,
                must=may or skip,
            )
        )
    for what, column, may in _columns(texts):
        skip = random.random() < 0.5
        content = _parquet(column)
        fixed.append(_reading(project, what, "a.parquet", content, skip=skip, may=may))
    for column in ("", "x", "text.x", "a b", "Text", "TEXT", "../text", "0", "text\0"):
        name = random.choice(["a.jsonl", "a.parquet"])
        content = _parquet(texts) if name == "a.parquet" else _lines(rows)
        fixed.append(
            _reading(
                project, f"column {column!r}", name, content, skip=False, may=False, column=column
            )
        )
    random.shuffle(fixed)
    yield from fixed
    contents = {f"a.jsonl.{name}": zip_(_lines(rows)) for name, zip_ in _COMPRESSED.items()}
    contents["a.jsonl.zst"] = pa.compress(_lines(rows), "zstd", asbytes=True)
    contents |= {"a.jsonl": _lines(rows), "a.json": json.dumps(rows).encode()}
    contents["a.txt"] = "\n\n".join(texts).encode()
    contents["a.parquet"] = _parquet(texts, row_group_size=20)
    for codec in ("zstd", "gzip", "brotli", "lz4", "none"):
        contents[f"{codec}.parquet"] = _parquet(texts, row_group_size=20, compression=codec)
    changes = {name: byte_changes(content, random) for name, content in contents.items()}
    for name in list(contents):  # a footer is small, and decides how all else is read
        if name.endswith(".parquet"):
            tail = contents[name][-900:]
            head = contents[name][:-900]
            changes[f"end of {name}"] = (
                (what, None if new is None else head + new)
                for what, new in byte_changes(tail, random)
            )
    while True:
        name = random.choice(list(changes))
        what, content = next(changes[name])
        file, skip, stream = (
            name.removeprefix("end of "),
            random.random() < 0.5,
            random.random() < 0.3,
        )
        workers = random.choice([0, 0, 2])
        yield _reading(project, what, file, content, skip=skip, stream=stream, workers=workers)


_CHATML = (Path(__file__).parents[2] / "conf" / "data" / "chatml.jinja").read_text("utf-8")
_TWO_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}"
_MARK, _END = "{% generation %}", "{% endgeneration %}"
_TEMPLATES = (
    ("", False),
    (" ", False),
    ("{{ nothing }}", False),
    ("{{ nothing.at.all }}", False),
    ("{{ messages }}", False),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", True),
    ("{% for m in messages %}{{ m.content }}", False),
    ("{% for m in messages %}{{ m.content }}{% endif %}", False),
    ("{{ raise_exception('no') }}", False),
    ("{{ raise_exception(5) }}", False),
    ("{{ raise_exception('a\nb') }}", False),
    ("{{ 1 / 0 }}", False),
    ("{{ 'a' + 1 }}", False),
    ("{{ messages[99].content }}", False),
    ("{{ messages[0]['x']['y'] }}", False),
    ("{{ 'x' | nofilter }}", False),
    ("{% include 'x' %}", False),
    ("{% extends 'x' %}", False),
    ("{% import 'x' as x %}", False),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", False),
    ("{{ [].__class__ }}", False),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", False),
    ("{% for i in range(10000000000) %}x{% endfor %}", False),
    (f"{_TWO_LOOPS}{{% endfor %}}{{% endfor %}}", False),
    (f"{_TWO_LOOPS}xxxxxxxx{{% endfor %}}{{% endfor %}}", False),
    ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", False),
    ("{{ 'x' * 9999999999 }}", False),
    ("{{ 10 ** 10 ** 10 }}", False),
    (
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}"
        "{% endfor %}",
        False,
    ),
    ("{% set x = [] %}{% for m in messages %}{{ x.append(m) }}{% endfor %}", False),
    ("{{ '%*d' % (999999999, 1) }}", False),
    ("{{ 'a'.center(9999999999) }}", False),
    ("{{ lipsum(99999) }}", False),
    ("{% generation %}{{ messages[1].content }}{% endgeneration %}", True),
    ("{% generation %}", False),
    (f"{_MARK}{_MARK}{{{{ messages[1].content }}}}{_END}{_END}", True),
    ("{% break %}", False),
    ("{# ", False),
    ("{{ '", False),
    ("\0", False),
    ("{{ strftime_now(5) }}", False),
    ("{{ strftime_now('%Y' * 99999) }}", False),
    ("{{ messages | tojson }}", False),
    ("{{ messages.pop() }}", False),
    ("{% set messages = [] %}" + _CHATML, False),
    (_CHATML, True),
)  # fmt: skip
"""Chat templates, and whether a model can be trained with them."""


def _conversations(chat: list[dict[str, Any]]) -> Iterator[tuple[str, Any, bool]]:
    """Conversations in words, and whether they are such."""
    ask, answer = chat
    for messages in (5, "text", {}, [5], ["text"], [None], [[]], [{}], [ask, 5], [ask, None]):
        yield str(messages)[:30], messages, False
    for messages in (None, [], [ask], [answer], [answer, ask], [ask, ask], [*chat, *chat] * 50):
        yield f"{str(messages)[:30]} {len(messages or [])}", messages, True
    for value in (5, 0.5, True, [], ["a"], {}, {"a": 1}, [{"type": "text", "text": "a"}], 10**400):
        for place in (0, 1):
            changed = [dict(ask), dict(answer)]
            changed[place]["content"] = value
            yield f"content {str(value)[:20]} of {place}", changed, False
    for value in (None, 5, True, [], {}, ["user"], "", "nobody", "USER", "\ud83d", "x" * 10**4):
        changed = [{**ask, "role": value}, answer]
        yield f"role {str(value)[:20]}", changed, isinstance(value, str) and value != "\ud83d"
    for value in ("", " ", "\0", "\x1b[31m", "{{ 1 / 0 }}", "<|im_end|>", "x" * 10**4, "ü" * 9):
        yield f"content {value[:9]!r}", [{**ask, "content": value}, answer], True
        yield f"answer {value[:9]!r}", [ask, {**answer, "content": value}], True
    yield "half a pair", [ask, {**answer, "content": "\ud83d"}], False
    yield "no content", [{"role": "user"}, answer], False
    yield "from and value", [{"from": "human", "value": "x"}], False
    for calls in (5, "x", [5], [{}], {}, [{"function": {"name": "f", "arguments": {}}}]):
        changed = [ask, {**answer, "tool_calls": calls}]
        yield f"calls {calls}", changed, not calls
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    yield "deep content", [{**ask, "content": deep}, answer], False
    yield "other keys", [{**ask, "x": deep, "name": None}, answer], True


def _chat(
    project: Path, what: str, content: bytes, template: str, *, skip: bool, may: bool, must: bool
) -> Attempt:
    arguments = [*STREAM, "data.kind=chat", "data.chat_template=t.jinja", "data.seq_len=128"]
    source = "data.sources=[{path: chats/a.jsonl, column: messages}]"

    def prepare(work: Path) -> list[str]:
        link_inputs(project, work, "chats")
        (work / "chats" / "a.jsonl").write_bytes(content)
        (work / "t.jinja").write_text(template, "utf-8")
        return [*arguments, source, f"data.skip_damaged={str(skip).lower()}"]

    passes = lambda work, output: may  # noqa: E731
    named = f"{what}{' skip' if skip else ''}"
    return Attempt(named, prepare, passes, timeout_s=120.0, must_pass=must)


def attempts_chats(random: Random, project: Path) -> Iterator[Attempt]:
    """Chat data: odd conversations among good ones, templates, then damaged files."""
    rows = [json.loads(line) for line in (project / "chats" / "a.jsonl").read_text().splitlines()]
    rows = [
        {"messages": [{**m, "content": m["content"][:99]} for m in r["messages"]]} for r in rows
    ]
    fixed = []
    first = list(_conversations(rows[0]["messages"]))
    for what, messages, may in first:
        for skip in (False, True):
            place = random.choice(["first", "last", "everywhere"])
            odd = {"messages": messages}
            content = {
                "first": _lines([odd, *rows]),
                "last": _lines([*rows, odd]),
                "everywhere": _lines([each for row in rows for each in (row, odd)]),
            }[place]
            read = place == "everywhere"  # a step of training does not read all rows
            options = {"skip": skip, "may": may or skip or not read, "must": may or skip}
            fixed.append(_chat(project, f"{place}: {what}", content, _CHATML, **options))
    for what, odd, _ in _odd_rows("x"):
        for skip in (False, True):
            content = _lines([odd, *rows])
            options = {"skip": skip, "may": True, "must": skip}
            fixed.append(_chat(project, f"row 0: {what}", content, _CHATML, **options))
    for template, may in _TEMPLATES:
        for skip in (False, True):
            what = f"template {template[:70]!r}"
            options = {"skip": skip, "may": may, "must": may}
            fixed.append(_chat(project, what, _lines(rows), template, **options))
    for what, messages, _ in first:
        template = random.choice(["{% generation %}{{ messages }}{% endgeneration %}",
            "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"])  # fmt: skip
        content = _lines([{"messages": messages}, *rows])
        options = {"skip": True, "may": True, "must": True}
        fixed.append(_chat(project, f"{template[:20]}: {what}", content, template, **options))
    random.shuffle(fixed)
    yield from fixed
    content = _lines(rows)
    template = _CHATML.encode()
    data, templates = byte_changes(content, random), byte_changes(template, random)
    while True:
        skip = random.random() < 0.5
        what, new = next(data)
        if new is not None:
            yield _chat(project, what, new, _CHATML, skip=skip, may=True, must=False)
        what, new = next(templates)
        if new is not None:
            text = new.decode("utf-8", "replace")
            yield _chat(project, f"template {what}", content, text, skip=skip, may=True, must=False)


KINDS = {"texts": attempts_texts, "chats": attempts_chats}
"""All kinds of attempts, by name."""
