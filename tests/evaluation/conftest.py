"""Tiny model with a real tokenizer, and tasks on a few lines of text, without a network."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from flash.arch import ArchSpec, parse_pattern
from flash.config import CONF
from flash.evaluation.settings import TaskSettings
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer

TOKENIZER = Path(__file__).parents[2] / "backbones" / "tiny" / "tokenizer.json"
CONTEXT = 96


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(int(os.environ.get("FLASH_TEST_THREADS", "1")))


def tiny_decoder(pattern: str, **changes) -> Decoder:
    """Decoder with random weights, large enough to make answers differ."""
    torch.manual_seed(0)
    spec = ArchSpec(
        model_dim=64,
        ffn_dim=96,
        layer_types=parse_pattern(pattern),
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=2048,
        sliding_window=16,
        tie_embeddings=False,
        **{"max_context": CONTEXT, **changes},
    )
    model = Decoder(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def save_decoder(model: Decoder, folder: Path) -> Path:
    """Save the decoder as a checkpoint folder in float32 with the tokenizer."""
    weights = state_to_save(model, torch.float32)
    save(folder, model.spec, weights, tokenizer=ModelTokenizer.open(TOKENIZER))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_decoder(tiny_decoder("FF"), tmp_path_factory.mktemp("model") / "checkpoint")


PROBLEM = {
    "prompt": 'def add(a, b):\n    """Sum of a and b."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}

QUESTIONS = [
    {"question": "What is 1 + 1?", "choices": ["two", "three of them", "4"], "label": 0},
    {"question": "def add(a, b):", "choices": ["return a", "return a + b", "pass"], "label": 1},
    {"question": "import os ", "choices": ["os", "sys", "import sys"], "label": 2},
    {"question": "x = [1, 2, 3]", "choices": ["x", "len(x) == 3", "print(x)"], "label": 1},
    {"question": "for i in range(10):", "choices": ["pass", "continue", "break"], "label": 0},
]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Folder with the tasks `choice`, `quiz` and `write` on five questions."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{**row, "answer": row["choices"][row["label"]]} for row in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    common |= {"doc_to_text": "Q: {{question}}\nA:", "fewshot_split": "test"}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    mean = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        folder,
        task="choice",
        output_type="multiple_choice",
        doc_to_target="label",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        **common,
    )
    generated = {"output_type": "generate_until", "doc_to_target": "answer", "metric_list": exact}
    write_task(
        folder,
        task="quiz",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        **generated,
        **common,
    )
    write_task(
        folder,
        task="write",
        generation_kwargs={"until": ["):"], "max_gen_toks": 24},
        **generated,
        **common,
    )
    return folder


def write_task(folder: Path, **values) -> None:
    """Write a task file of the harness."""
    (folder / f"{values['task']}.yaml").write_text(yaml.safe_dump(values), "utf-8")


def rouge_l(answer: str, reference: str) -> float:
    """Compute ROUGE-L by definition: F-measure of the longest common subsequence of words."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a, 1):
        for j, other in enumerate(b, 1):
            longest[i][j] = (
                longest[i - 1][j - 1] + 1
                if word == other
                else max(longest[i - 1][j], longest[i][j - 1])
            )
    return 2 * longest[-1][-1] / (len(a) + len(b))


def write_rewrites(path: Path, targets: list[str]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["task", "comment", "source", "target"])
        rows.writeheader()
        for source, target in zip(("def add(a, b):", "import os"), targets, strict=True):
            row = {"task": "x", "comment": "Go on", "source": f'{source}, "yes"', "target": target}
            rows.writerow(row)


@pytest.fixture
def writing(tmp_path) -> list[TaskSettings]:
    """Settings of the paper's two tasks without hub data, on rows in their authors' format."""
    data = tmp_path / "data"
    (data / "tldr9plus" / "datasets-m0").mkdir(parents=True)
    write_rewrites(data / "openrewriteeval_aaai24.csv", ["return self.a", "os, self"])
    posts = [
        {
            "id": f"test-{i}",
            "document": f"My {name}.</s><s>It broke.",
            "summary": f"{name} the self",
        }
        for i, name in enumerate(("bike", "car", "boat"))
    ]
    lines = "".join(json.dumps(post) + "\n" for post in posts)
    (data / "tldr9plus" / "datasets-m0" / "test.0.json").write_text(lines)
    config = OmegaConf.create({"suite": OmegaConf.load(CONF / "suite" / "paper_chat.yaml")})
    config.suite.data = str(data)
    tasks = OmegaConf.to_container(config.suite, resolve=True)["tasks"]  # type: ignore[index]
    return [TaskSettings(**task) for task in tasks if task.get("files")]
