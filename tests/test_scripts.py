"""Scripts that prepare texts, and a task of them."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from flash.data.encoders import in_validation_split

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One\n  two</p><p>three <b>four</b></p>", "One two\nthree four\n"),
        ("<head><title>x</title></head><body>a<script>f()</script><br>b</body>", "a\nb"),
        ("<pre>a\n  b\n\n\n\nc</pre>after", "a\n  b\n\nc\nafter"),
        ("<nav>Home</nav><ul><li>a &lt; b<li>c</ul><p>Next</p>", "a < b\nc\n"),
    ],
)
def test_a_page_becomes_lines_of_text(page, text):
    assert script("fetch_texts").plain_text(page) == text


def document(seed: int) -> str:
    """A text of 60 sentences, each told by its number."""
    order = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    lines = [
        f"Sentence {seed} {i} says {' '.join(order.choices(words, k=8))} in the end."
        for i in range(60)
    ]
    return "\n\n".join(" ".join(lines[i : i + 6]) for i in range(0, 60, 6))


def test_a_question_asks_for_the_next_sentence_of_a_held_out_document(tmp_path, monkeypatch):
    cloze = script("make_cloze")
    texts = [document(seed) for seed in range(80)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    monkeypatch.setattr(sys, "argv", ["make_cloze", str(source), str(tmp_path / "task")])
    cloze.main()
    lines = (tmp_path / "task" / "next_sentence.jsonl").read_text("utf-8").splitlines()
    held_out = [" ".join(t.split()) for t in texts if in_validation_split(t, cloze.PERCENT)]
    assert held_out
    assert len(lines) == cloze.PER_DOCUMENT * len(held_out)
    answers = set()
    for row in map(json.loads, lines):
        right = row["choices"][row["answer"]]
        [whole] = [text for text in held_out if f"{row['context']} {right}" in text]
        assert len(set(row["choices"])) == 4
        assert all(each in whole for each in row["choices"])
        answers.add(row["answer"])
    assert answers == {0, 1, 2, 3}
    task = yaml.safe_load((tmp_path / "task" / "next_sentence.yaml").read_text("utf-8"))
    assert task["doc_to_text"] == "{{context}}"
    path = task["dataset_kwargs"]["data_files"]["test"]
    assert Path(path).read_text("utf-8").splitlines() == lines


def test_headings_lists_and_code_are_no_sentences():
    text = "A heading\n\n- a list.\n\n    x = 1.\n\nOne here. Two there! Three?\n\nfour."
    assert script("make_cloze").sentences(text) == ["One here.", "Two there!", "Three?"]
