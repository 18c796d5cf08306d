"""Odd data files, each with the rows that must come out of it or the refusal that it deserves.

`verdicts` tries all of them: text must come back from its tokens as it was written, and a
conversation must have the tokens that transformers' own `apply_chat_template` gives it.
"""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from flash.data.chat import ChatEncoder
from flash.data.encoders import EncodedDocument, TextEncoder
from flash.data.mixture import StreamedSequences
from flash.data.settings import DocumentUnit, TextSourceSettings
from flash.data.sources import TextSource
from flash.data.tokenizer import train_tokenizer
from flash.errors import InputError
from tests.conftest import opened

CHATML = (Path(__file__).parents[2] / "conf" / "data" / "chatml.jinja").read_text("utf-8")
PRINTING = CHATML.replace("content + '<|im_end|>'", "content }}{{ '<|im_end|>'")
TOOLS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}
{% if m.role == 'assistant' %}{% generation %}{% if m.content is string %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{%- endgeneration %}{% elif m.content is string %}{{ m.content }}<|im_end|>
{%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endif %}
{% endfor %}"""
GOOD = [f"good text {i} <{i}>" for i in range(6)]
ASK = {"role": "user", "content": "say good text"}
ANSWER = {"role": "assistant", "content": "good text"}
CALL = {"type": "function", "function": {"name": "say", "arguments": {"text": "good", "n": 2}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@dataclass(frozen=True)
class OddFile:
    """Files of one source.

    Attributes:
        name: Name of the case.
        files: Contents by path below the folder: bytes, or a table for parquet.
        rows: Texts or conversations with something to learn, in order; those that are left with
            `skip_damaged` if the source is refused. None: it is refused in any case.
        refusal: Pattern of the one-line error without `skip_damaged`. None: no error.
        path: Path of the source below the folder; the folder itself by default.
        options: Further settings of the source.
        template: Chat template. None: the rows are texts.
    """

    name: str
    files: dict[str, Any]
    rows: list[Any] | None
    refusal: str | None = None
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def lines(*rows: Any, end: str = "\n") -> bytes:
    """JSON lines of rows; a row that is bytes is a line as it is."""
    parts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return end.encode().join(parts) + end.encode()


def texts(*rows: Any) -> list[dict[str, Any]]:
    """Rows with a `text`."""
    return [{"text": row} for row in rows]


G = texts(*GOOD)


def _among(name: str, row: Any, refusal: str | None, kept: list[str] | None = None) -> OddFile:
    """One odd row among good ones."""
    return OddFile(name, {"a.jsonl": lines(*G[:2], row, *G[2:])}, kept or GOOD, refusal)


def row_cases() -> Iterator[OddFile]:
    """JSON lines with one odd row among good ones."""
    yield _among("an integer", {"text": 5}, r"a\.jsonl, row 3: expected text, found an integer")
    yield _among("a list", {"text": ["a"]}, r"row 3: expected text, found a list")
    yield _among("an object", {"text": {"a": 1}}, r"row 3: expected text, found an object")
    yield _among("true", {"text": True}, r"row 3: expected text, found true or false")
    yield _among("null", {"text": None}, None)
    yield _among("empty", {"text": ""}, None)
    yield _among("no object", "text", r"row 3: is text; expected an object with text")
    yield _among("null row", None, r"row 3: is null; expected an object")
    yield _among("list row", [1], r"row 3: is a list; expected an object")
    yield _among("no JSON", b"nothing", r"row 3: is no JSON \(Expecting value")
    yield _among("two in a line", b'{"text": "a"}{"text": "b"}', r"row 3: is no JSON \(Extra data")
    yield _among("tab in a text", b'{"text": "a\tb"}', r"row 3: is no JSON \(Invalid control")
    yield _among("no column", {"body": "x"}, r"row 3: expected text, found body")
    yield _among("empty object", {}, r"row 3: expected text, found an empty object")
    yield _among("not UTF-8", b'{"text": "caf\xe9"}', r"row 3: is not UTF-8 \(byte 0xe9 at 13\)")
    yield _among("half a pair", b'{"text": "a\\ud83d"}', r"row 3: .*half of a surrogate pair")
    yield _among("too deep", b'{"x": ' + b"[" * 90_000, r"row 3: is no JSON \(.*recursion")
    for name, row in {
        "a pair": "a \U0001f600",
        "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
        "a zero": "a\x00b",
        "newlines": "a\r\nb\n\nc\rd",
        "a mark inside": "a\ufeffb",
        "special tokens": "see <|endoftext|> and <|im_end|><|endoftext|>",
        "quoted JSON": '{"text": "a"}',
        "very long": "word " * 60_000,
    }.items():
        kept = [*GOOD[:2], row, *GOOD[2:]]
        yield _among(name, {"text": row}, None, kept)
    yield _among("NaN elsewhere", b'{"x": NaN, "text": "a"}', None, [*GOOD[:2], "a", *GOOD[2:]])


def json_cases() -> Iterator[OddFile]:
    """Files of JSON lines and lists."""
    first = lines(None, *G)
    yield OddFile("first row null", {"a.jsonl": first}, GOOD, r"a\.jsonl, row 1: is null")
    mixed = [{"x": x, **row} for x, row in zip((1, "a", None, [1], {"b": 2}, 1.5), G, strict=True)]
    yield OddFile("other columns of mixed types", {"a.jsonl": lines(*mixed)}, GOOD)
    parts = {f"{i}.jsonl": lines(row) for i, row in enumerate(mixed)}
    yield OddFile("types that change between files", parts, GOOD)
    blank = b"\n \n".join(lines(row) for row in G) + b"\n\n"
    yield OddFile("blank lines", {"a.jsonl": b"\n" + blank}, GOOD)
    bad = b"\n\n" + lines(*G[:2]) + b"\n" + lines(7, *G[2:])
    yield OddFile("row numbers are lines", {"a.jsonl": bad}, GOOD, r"row 6: is an integer")
    yield OddFile("CRLF", {"a.jsonl": lines(*G, end="\r\n")}, GOOD)
    yield OddFile("no last newline", {"a.jsonl": lines(*G)[:-1]}, GOOD)
    cut = lines(*G)[:-9]
    yield OddFile("cut last line", {"a.jsonl": cut}, GOOD[:-1], r"row 6: is no JSON")
    yield OddFile("byte order mark", {"a.jsonl": b"\xef\xbb\xbf" + lines(*G)}, GOOD)
    utf16 = lines(*G).decode().encode("utf-16")
    yield OddFile("UTF-16", {"a.jsonl": utf16}, None, r"a\.jsonl, row 1: is not UTF-8")
    yield OddFile("a list", {"a.json": json.dumps(G, indent=1).encode()}, GOOD)
    yield OddFile("a list in a line", {"a.jsonl": json.dumps(G).encode()}, GOOD)
    yield OddFile("a list of texts", {"a.json": json.dumps(GOOD).encode()}, GOOD)
    listed = json.dumps([*G[:2], {"text": 5}, *G[2:]]).encode()
    yield OddFile("an odd row of a list", {"a.json": listed}, GOOD, r"row 3: .*an integer")
    unlisted = lines([1], *G)
    yield OddFile("lines that begin with a list", {"a.jsonl": unlisted}, GOOD, r"row 1: is a list")
    cut = json.dumps(G, indent=1).encode()[:-5]
    yield OddFile("a cut list", {"a.json": cut}, None, r"a\.json, row 1: is no JSON")
    yield OddFile("lines named json", {"a.json": lines(*G)}, GOOD)
    yield OddFile("one object", {"a.json": json.dumps(G[0], indent=1).encode()}, GOOD[:1])
    yield OddFile(
        "ndjson and capitals", {"A.NDJSON": lines(*G[:3]), "B.JSONL": lines(*G[3:])}, GOOD
    )
    yield OddFile("no rows", {"a.jsonl": b"\n\n"}, None, r"found none .*0 rows")
    yield OddFile("no text at all", {"a.jsonl": lines(1, 2)}, None, r"row 1: is an integer")
    yield OddFile("no rows in one", {"a.jsonl": b"\n\n", "b.jsonl": lines(*G)}, GOOD)
    yield OddFile("nothing in one", {"a.jsonl": b"", "b.jsonl": lines(*G)}, GOOD)


def folder_cases() -> Iterator[OddFile]:
    """Compressed files, and files that lie about."""
    for suffix, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items():
        yield OddFile(suffix, {f"a.jsonl.{suffix}": compress(lines(*G))}, GOOD)
        two = compress(lines(*G[:3])) + compress(lines(*G[3:]))
        yield OddFile(f"{suffix} in two parts", {f"a.jsonl.{suffix}": two}, GOOD)
        cut = compress(lines(*texts(*(f"{i} {hash((i, 1.5))}" for i in range(3000)))))[:-400]
        damaged = {f"a.jsonl.{suffix}": cut, "b.jsonl": lines(*G)}
        yield OddFile(f"cut {suffix}", damaged, GOOD, r"a\.jsonl\.\w+ is damaged .*")
    zst = pa.compress(lines(*G), "zstd", asbytes=True)
    yield OddFile("zst", {"a.jsonl.zst": zst}, GOOD)
    marked = gzip.compress(b"\xef\xbb\xbf" + lines(*G, end="\r\n"))
    yield OddFile("gz with a mark", {"a.jsonl.gz": marked}, GOOD)
    plain = {"a.jsonl.gz": lines(*G), "b.jsonl": lines(*G)}
    yield OddFile("gz in name only", plain, GOOD, r"a\.jsonl\.gz is damaged \(Not a gzipped")
    for aside in (
        ".ipynb_checkpoints/a.jsonl",
        ".cache/x/a.jsonl",
        "._a.jsonl",
        "__MACOSX/a.jsonl",
    ):
        yield OddFile(f"copy {aside}", {"a.jsonl": lines(*G), aside: lines(*G)}, GOOD)
    for aside in ("dataset_info.json", "data/config.json", "README.md"):
        yield OddFile(f"beside {aside}", {"a.jsonl": lines(*G), aside: b"{}"}, GOOD)
    hidden = {".cache/a.jsonl": lines(*G)}
    yield OddFile("a hidden file that is named", hidden, GOOD, path=".cache/a.jsonl")
    yield OddFile("a hidden folder that is named", hidden, GOOD, path=".cache")


def text_cases() -> Iterator[OddFile]:
    """Plain text."""
    line, paragraph = {"unit": DocumentUnit.line}, {"unit": DocumentUnit.paragraph}

    def case(name: str, content: bytes, rows: Any, refusal: Any = None, **options: Any) -> OddFile:
        return OddFile(name, {"a.txt": content}, rows, refusal, options=options)

    joined = "\n".join(GOOD).encode()
    yield case("lines", joined, GOOD, **line)
    yield case("lines in double space", joined.replace(b"\n", b"\n\n"), GOOD, **line)
    yield case("lines of spaces", joined.replace(b"\n", b"\n \t\n\n"), GOOD, **line)
    yield case("CRLF lines", joined.replace(b"\n", b"\r\n"), GOOD, **line)
    yield case("CR lines", joined.replace(b"\n", b"\r"), GOOD, **line)
    yield case("lines with a mark", b"\xef\xbb\xbf" + joined, GOOD, **line)
    odd = joined.replace(b"\n", b"\ncaf\xe9\n", 1)
    yield case("a line not UTF-8", odd, GOOD, r"a\.txt, row 2: is not UTF-8", **line)
    yield case("separators in a line", "a\u2028b\x85c\n".encode(), ["a\u2028b\x85c"], **line)
    spaced = b"\n\n\n" + joined.replace(b"\n", b"\n\n\n\n") + b"\n\n\n"
    yield case("paragraphs", spaced, GOOD, **paragraph)
    twos = ["a\nb", "c\n  d"]
    yield case("CRLF paragraphs", b"a\r\nb\r\n \r\n\r\nc\r\n  d\r\n", twos, **paragraph)
    yield case("CR paragraphs", b"a\rb\r\rc\r  d", twos, **paragraph)
    broken = b"a\n\nb\xff\nc\n\nd\n"
    yield case("a paragraph not UTF-8", broken, ["a", "d"], r"row 3: is not UTF-8", **paragraph)
    yield case("a document", b"a\r\nb\n\n", ["a\nb\n\n"])
    two = {"a.txt": b"caf\xe9", "b.txt": joined}
    yield OddFile("a document not UTF-8", two, [joined.decode()], r"a\.txt: is not UTF-8 .*0xe9")
    yield OddFile("a blank document", {"a.txt": b" \n", "b.txt": joined}, [joined.decode()])
    yield OddFile("lines in gz", {"a.txt.gz": gzip.compress(joined)}, GOOD, options=line)


def parquet_cases() -> Iterator[OddFile]:
    """Parquet files."""

    def table(rows: Any = GOOD, **columns: Any) -> pa.Table:
        return pa.table({"text": rows, **columns})

    yield OddFile("large_string", {"a.parquet": table(pa.array(GOOD, pa.large_string()))}, GOOD)
    yield OddFile("string_view", {"a.parquet": table(pa.array(GOOD, pa.string_view()))}, GOOD)
    far = pa.array([2**30], pa.date32())
    yield OddFile("dates", {"a.parquet": table(far)}, None, r"a\.parquet is damaged \(days=")
    encoded = pa.array(GOOD * 2).dictionary_encode()
    yield OddFile("dictionary", {"a.parquet": table(encoded)}, GOOD * 2)
    for kind in (pa.binary(), pa.large_binary(), pa.binary(1)):
        blobs = pa.array([b"a", b"b"], kind)
        refusal = r"column=text: expected text or messages in .*a\.parquet, found .*binary"
        yield OddFile(f"{kind}", {"a.parquet": table(blobs)}, None, refusal)
    yield OddFile(
        "integers", {"a.parquet": table([1, 2])}, None, r"row 1: expected text, found an i"
    )
    empty = {"a.parquet": table([]), "b.parquet": table()}
    yield OddFile("an empty part", empty, GOOD)
    bare = {"a.parquet": pa.table({"y": pa.array([], pa.int8())}), "b.parquet": table()}
    yield OddFile("an empty part of other columns", bare, GOOD)
    yield OddFile(
        "empty parts alone", {"a.parquet": table([])}, None, r"has 0 rows that can be read"
    )
    changing = {
        "a.parquet": table(GOOD[:2], x=[1, 2]),
        "b.parquet": table(GOOD[2:4], x=["a", "b"], y=[b"", b"a"]),
        "c.parquet": table(pa.array(GOOD[4:], pa.large_string())),
    }
    yield OddFile("columns that change", changing, GOOD)
    yield OddFile("nulls", {"a.parquet": table([None, *GOOD, None])}, GOOD)
    nothing = {"a.parquet": table(pa.nulls(3)), "b.parquet": table()}
    yield OddFile("nulls alone in a part", nothing, GOOD)
    missing = {"a.parquet": table(), "b.parquet": pa.table({"body": ["x"], "id": [1]})}
    refusal = r"column=text: expected one of body, id, the columns of .*b\.parquet"
    yield OddFile("a part without the column", missing, None, refusal)
    copy = {"a.parquet": table(), ".ipynb_checkpoints/a-checkpoint.parquet": table()}
    yield OddFile("hidden copy", copy, GOOD)
    no_parquet = {"a.parquet": b"PAR1 nothing PAR1", "b.parquet": table()}
    yield OddFile("no parquet", no_parquet, GOOD, r"a\.parquet is damaged")
    odd = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    yield OddFile("not UTF-8", {"a.parquet": table(odd)}, ["a", "b"], r"row 2: is not UTF-8")
    dotted = {"a.parquet": pa.table({"a.text": GOOD, "a": pa.array([{"text": "x"}] * 6)})}
    yield OddFile("a column with a dot", dotted, GOOD, options={"column": "a.text"})


def chat_cases() -> Iterator[OddFile]:
    """Conversations."""
    plain, parts = [ASK, ANSWER], [{"type": "text", "text": "good"}, {"type": "text", "text": "x"}]
    asked = [{"role": "user", "content": parts}, ANSWER]
    called = [ASK, CALLING, {"role": "tool", "name": "say", "content": "good"}, ANSWER]
    without = [ASK, {"role": "assistant", "tool_calls": [CALL]}, ANSWER]

    def case(name: str, row: Any, refusal: Any = None, template: str = CHATML) -> OddFile:
        rows = [plain, row, plain] if refusal is None else [plain, plain]
        files = {"a.jsonl": lines(*({"messages": m} for m in (plain, row, plain)))}
        return OddFile(f"chat: {name}", files, rows, refusal, template=template)

    yield case("two turns", [*plain, *plain])
    yield case("extra keys", [{**ASK, "name": "you", "weight": 0}, {**ANSWER, "id": [1, None]}])
    yield case("null keys", [{**ASK, "name": None}, {**ANSWER, "tool_calls": None}], None, TOOLS)
    yield case("parts as code", asked, r"a\.jsonl, row 2: .*that is a list as code", PRINTING)
    yield case(
        "parts for a template of texts",
        asked,
        r"row 2: the chat template fails: can only concatenate",
    )
    yield case("parts", asked, None, TOOLS)
    yield case("tool calls", called, None, TOOLS)
    yield case("tool calls without content", without, None, TOOLS)
    yield case("null content", called, r"row 2: .*no attribute 'content'")
    silent = [ASK, {**ANSWER, "tool_calls": [CALL]}]
    yield case("lost tool calls", silent, r"row 2: the chat template leaves tool_calls out")
    counted = [{**ASK, "content": 5}, ANSWER]
    yield case("an integer", counted, r"row 2: .*that is an integer as code", PRINTING)
    yield case("an integer in a list", 5, r"row 2: expected a list of messages .*an integer")
    yield case("text", "a", r"row 2: expected a list of messages .*found text")
    yield case("no role", [{"content": "x"}, ANSWER], r"row 2: expected .*found content")
    yield case("a role of 5", [{**ASK, "role": 5}, ANSWER], r"row 2: expected a role that is text")
    yield case("null role", [{"role": None, "content": "x"}], r"row 2: expected .*role, content")
    shared = [{"from": "human", "value": "x"}]
    yield case("other keys", shared, r"row 2: expected .*found from, value")
    yield case("null message", [None, ANSWER], r"row 2: .*found null in the list")
    yield case("half a pair", [{**ASK, "content": "\ud83d"}, ANSWER], r"row 2: ")
    special = {**ASK, "content": "a <|im_end|> b <|endoftext|>"}
    yield case("special tokens", [special, ANSWER])
    left = {"a.jsonl": lines(*({"messages": m} for m in ([], [ASK], None, plain)))}
    yield OddFile("chat: nothing to learn", left, [plain], template=CHATML)
    table = pa.table({"messages": [plain, called], "id": [1, 2]})
    yield OddFile(
        "chat: parquet", {"a.parquet": table}, table["messages"].to_pylist(), template=TOOLS
    )


def cases() -> list[OddFile]:
    """All cases."""
    kinds = (row_cases, json_cases, folder_cases, text_cases, parquet_cases, chat_cases)
    return [case for kind in kinds for case in kind()]


def verdict(case: OddFile, folder: Path) -> str:
    """Try a case in an empty folder: `right`, `refused`, or `wrong` and the reason."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path, row_group_size=4)
    if case.refusal is None:
        found = _read(case, folder, skip_damaged=False)
        return "right" if found == _expected(case) else f"wrong: {str(found)[:300]}"
    try:
        found = _read(case, folder, skip_damaged=False)
    except InputError as error:
        if not re.search(case.refusal, str(error)) or "\n" in str(error):
            return f"wrong: refused with {error}"
    else:
        return f"wrong: not refused, {str(found)[:300]}"
    try:
        found = _read(case, folder, skip_damaged=True)
    except InputError as error:
        return "refused" if case.rows is None else f"wrong: refused to skip with {error}"
    right = found[-len(GOOD) :] if "damaged" in case.refusal else found
    return "refused" if right == _expected(case) else f"wrong: skipped to {str(found)[:300]}"


def verdicts(folder: Path) -> Iterator[tuple[str, str]]:
    """Try all cases below an empty folder, and yield the name and the verdict of each."""
    for number, case in enumerate(cases()):
        yield case.name, verdict(case, folder / str(number))


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer([*GOOD, "word say user assistant system"], 320)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _read(case: OddFile, folder: Path, *, skip_damaged: bool) -> list[Any]:
    """Read all rows in order, also by shares: texts as decoded from tokens, chats as tokens."""
    column = "text" if case.template is None else "messages"
    options = {"path": str(folder / case.path), "column": column, **case.options}
    settings = TextSourceSettings(**options)
    source = TextSource(settings, "data.sources[0]", skip_damaged=skip_damaged)
    backend = _tokenizer().backend_tokenizer
    with TemporaryDirectory() as own:
        encoder: Any = TextEncoder(opened(backend, Path(own)))
    if case.template is not None:
        encoder = ChatEncoder(backend, case.template, {}, max_tokens=100_000)
    sequences = StreamedSequences([source], encoder, 16, 0)
    wholes = []
    for stride in (1, 3):
        found = {}
        for file in range(source.num_files):
            for share in range(stride):
                for row in source.rows(file, share, stride, 0):
                    if sequences.reads(row, source):
                        [document] = encoder.encode([row.value])
                        if isinstance(document, InputError):
                            source.refuse(row, document)
                        found[file, row.number] = document
        kept = [found[key] for key in sorted(found)]
        wholes.append([d.tokens.tolist() for d in kept if isinstance(d, EncodedDocument)])
    assert wholes[0] == wholes[1]
    if case.template is not None:
        return wholes[0]
    return [backend.decode(ids[:-1], skip_special_tokens=False) for ids in wholes[0]]


def _expected(case: OddFile) -> list[Any]:
    if case.template is None or case.rows is None:
        return case.rows or []
    render = _tokenizer().apply_chat_template
    return [
        render(row, chat_template=case.template, return_dict=True)["input_ids"] for row in case.rows
    ]
