#!/usr/bin/env python3
"""Make a multiple-choice task, "which sentence comes next", of the held-out part of texts.

    scripts/make_cloze.py TEXTS.jsonl... FOLDER
    scripts/make_cloze.py --stdlib FOLDER

writes `next_sentence.jsonl`, or with --stdlib `next_line.jsonl` of Python's standard library, and
the task's file for lm-evaluation-harness, so that

    flash evaluate suite=smollm2 suite.include=FOLDER
    flash evaluate suite=next_line suite.include=FOLDER

ask it. Only documents are used that `data.validation_percent` keeps out of training. Each question
has two to four sentences of a document (four to eight lines of code), the one that follows, and
three others of the same document, of similar length, that stand at least ten away.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.data.encoders import in_validation_split
from flash.data.files import read_documents
from flash.data.settings import DataSettings

PERCENT = 5
"""Share of the validation split, as `validation_percent` of conf/data/debian.yaml [%]."""
PER_DOCUMENT = 40
"""Most questions of a document, so that long ones do not decide the score."""
APART = 10
"""Least distance of a wrong piece from the right one [pieces]."""
TASK = """\
# Made by scripts/make_cloze.py.
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: {between}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
num_fewshot: 0
metadata: {{version: 1}}
"""


def sentences(text: str) -> list[str]:
    """Cut the running text of a document into sentences, without lists, code and headings."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if re.match(r"[A-Z\"'(]", line) and line[-1:] in ".!?":
            found += re.split(r"(?<=[.!?]) (?=[A-Z])", line)
    return found


def code_lines(text: str) -> list[str]:
    """Cut a source file into its lines, without empty ones."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Kind:
    """Kind of question: pieces of a document, of which one is asked for."""

    name: str
    cut: Callable[[str], list[str]]
    """Function from a document to its pieces."""
    between: str
    """Text between two pieces."""
    lengths: tuple[int, int]
    """Shortest and longest piece that is asked for [characters]."""
    before: tuple[int, int]
    """Fewest and most pieces that stand in front of it."""


SENTENCES = Kind("next_sentence", sentences, " ", (40, 240), (2, 4))
LINES = Kind("next_line", code_lines, "\n", (20, 100), (4, 8))


def questions(text: str, kind: Kind, order: random.Random) -> Iterator[dict[str, Any]]:
    """Make the questions of one document."""
    known = kind.cut(text)
    (shortest, longest), (fewest, most) = kind.lengths, kind.before
    fits = [i for i, each in enumerate(known) if shortest <= len(each) <= longest]
    right = [i for i in fits if i >= fewest]
    for i in order.sample(right, min(len(right), PER_DOCUMENT)):
        size = len(known[i])
        wrong = [
            known[j]
            for j in fits
            if abs(j - i) >= APART and 0.7 * size <= len(known[j]) <= 1.4 * size
        ]
        if len(wrong) < 3:
            continue
        answer = order.randrange(4)
        choices = order.sample(wrong, 3)
        choices.insert(answer, known[i])
        context = kind.between.join(known[max(0, i - order.randint(fewest, most)) : i])
        if len({*choices}) == 4:  # not where the document repeats a piece
            yield {"context": context, "choices": choices, "answer": answer}


def held_out(paths: list[Path]) -> Iterator[str]:
    """Read the held-out documents of JSON lines, or without any those of data=stdlib."""
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            text = json.loads(line)["text"]
            if in_validation_split(text, PERCENT):
                yield text
    if not paths:
        for document, text in read_documents(DataSettings(name="stdlib")):
            if document.in_validation_split(PERCENT):
                yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", type=Path, nargs="*", help="JSON lines with `text`")
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--stdlib", action="store_true", help="lines of the standard library")
    arguments = parser.parse_args()
    if arguments.stdlib == bool(arguments.texts):
        parser.error("expected either TEXTS.jsonl or --stdlib")
    kind = LINES if arguments.stdlib else SENTENCES
    order = random.Random(0)
    rows = [row for text in held_out(arguments.texts) for row in questions(text, kind, order)]
    if not rows:
        parser.error("the held-out documents have no running text")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = (arguments.folder / f"{kind.name}.jsonl").resolve()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = TASK.format(name=kind.name, path=json.dumps(str(path)), between=json.dumps(kind.between))
    (arguments.folder / f"{kind.name}.yaml").write_text(task, "utf-8")
    print(f"{len(rows)} questions")


if __name__ == "__main__":
    main()
