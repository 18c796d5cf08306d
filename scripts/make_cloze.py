#!/usr/bin/env python3
"""Make a multiple-choice task, "which sentence comes next", of the held-out part of texts.

    scripts/make_cloze.py TEXTS.jsonl... FOLDER

writes `next_sentence.jsonl` and the task's file for lm-evaluation-harness, so that

    flash evaluate suite=next_sentence suite.include=FOLDER

asks it. Only documents are used that `data.validation_percent` keeps out of training. Each question
has two to four sentences of a document, the one that follows, and three others of the same
document, of similar length, that stand at least ten sentences away.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flash.data.encoders import in_validation_split

PERCENT = 5
"""Share of the validation split, as `validation_percent` of conf/data/debian.yaml [%]."""
PER_DOCUMENT = 40
"""Most questions of a document, so that long ones do not decide the score."""
LENGTHS = (40, 240)
"""Shortest and longest sentence that is asked for [characters]."""
APART = 10
"""Least distance of a wrong sentence from the right one [sentences]."""
TASK = """\
# Made by scripts/make_cloze.py.
task: next_sentence
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
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


def questions(text: str, order: random.Random) -> Iterator[dict[str, Any]]:
    """Make the questions of one document."""
    known = sentences(text)
    shortest, longest = LENGTHS
    fits = [i for i, each in enumerate(known) if shortest <= len(each) <= longest]
    right = [i for i in fits if i >= 2]
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
        context = " ".join(known[max(0, i - order.randint(2, 4)) : i])
        yield {"context": context, "choices": choices, "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+", help="JSON lines with `text`")
    parser.add_argument("folder", type=Path, help="to write to")
    arguments = parser.parse_args()
    order, rows = random.Random(0), []
    for path in arguments.texts:
        for line in path.read_text("utf-8").splitlines():
            text = json.loads(line)["text"]
            if in_validation_split(text, PERCENT):
                rows += questions(text, order)
    if not rows:
        parser.error("the held-out documents have no running text")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = (arguments.folder / "next_sentence.jsonl").resolve()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = TASK.format(path=json.dumps(str(path)))
    (arguments.folder / "next_sentence.yaml").write_text(task, "utf-8")
    print(f"{len(rows)} questions")


if __name__ == "__main__":
    main()
