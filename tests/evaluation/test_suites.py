"""Facts about `flash evaluate` on local tasks: results, files, reuse and errors."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest

from flash.device.connections import AndroidSettings
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.evaluation.run import evaluate
from flash.evaluation.settings import EvaluateSettings, ModelFormat, SuiteSettings, TaskSettings
from flash.evaluation.suites import SuiteResult, as_text
from flash.evaluation.tasks import Tasks
from flash.evaluation.tokenization import HarnessTokenizer
from flash.export.found import find_program
from flash.lowering.settings import LoweringSettings
from flash.model.settings import BackboneSettings
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.settings import TrainerSettings
from tests.evaluation.conftest import (
    PROBLEM,
    QUESTIONS,
    rouge_l,
    save_decoder,
    tiny_decoder,
    write_rewrites,
    write_task,
)

CHOICE = TaskSettings(
    name="choice", title="Choice", metric="acc_norm,none", paper={"A": 40.0, "B": 60.0}
)
QUIZ = TaskSettings(name="quiz", title="Quiz", fewshot=2, metric="exact_match,none")


@pytest.fixture
def settings(checkpoint, task_folder, tmp_path) -> EvaluateSettings:
    return EvaluateSettings(
        backbone=BackboneSettings(name="toy", weights=str(checkpoint)),
        device=DeviceSettings(
            name="host",
            threads=1,
            lowering=LoweringSettings(max_context=96),
            workload=Workload(prompts=[20], contexts=[30]),
        ),
        suite=SuiteSettings(name="local", tasks=[CHOICE, QUIZ], include=str(task_folder)),
        trainer=TrainerSettings(),
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        name="toy",
        runs=str(tmp_path / "runs"),
    )


def with_tasks(settings: EvaluateSettings, *tasks: TaskSettings, **changes) -> EvaluateSettings:
    include = settings.suite.include
    settings.suite = SuiteSettings(name="local", tasks=list(tasks), include=include, **changes)
    return settings


def folder_of(settings: EvaluateSettings) -> Path:
    return Path(settings.runs) / "evaluations" / "toy"


def test_a_suite_gives_a_table_files_and_metrics(settings, capsys):
    settings.logger = LoggerSettings(name="csv", kind=LoggerKind.csv)
    result = evaluate(settings)
    choice, quiz = result.figures
    assert (choice.shots, choice.samples, quiz.shots, quiz.samples) == (0, 5, 2, 5)
    assert choice.value in {0, 20, 40, 60, 80, 100}
    assert choice.stderr is not None
    assert result.average == pytest.approx((choice.value + quiz.value) / 2)
    assert SuiteResult.read(folder_of(settings) / "local.decoder.json") == result
    printed = capsys.readouterr().out
    [line] = [line.split() for line in printed.splitlines() if "Choice" in line]
    assert line[:4] == ["Choice", "0", "5", "acc_norm"]
    assert line[-2:] == ["40.00", "60.00"]
    [path] = (Path(settings.runs) / "logs" / "csv").rglob("metrics.csv")
    logged = path.read_text()
    assert {"eval/choice", "eval/quiz", "eval/average"} <= set(logged.splitlines()[0].split(","))


def test_accuracy_is_that_of_the_likelihoods(settings, checkpoint):
    """Compare with counts from log-likelihood sums, with and without division by bytes."""
    from flash.evaluation.harness import DecoderLM
    from flash.model.checkpoint import load

    model = DecoderLM(load(checkpoint), HarnessTokenizer.open(checkpoint))
    right, right_normalised = 0, 0
    for row in QUESTIONS:
        pairs = [
            model._encode_pair(f"Q: {row['question']}\nA:", f" {each}") for each in row["choices"]
        ]
        sums = [value for value, _ in model.score_pairs(pairs)]
        mean = [s / len(each) for s, each in zip(sums, row["choices"], strict=True)]
        right += sums.index(max(sums)) == row["label"]
        right_normalised += mean.index(max(mean)) == row["label"]
    evaluate(with_tasks(settings, CHOICE))
    kept = json.loads((folder_of(settings) / "local.decoder" / "choice.json").read_text())
    assert kept["metrics"]["acc,none"] == pytest.approx(right / 5)
    assert kept["metrics"]["acc_norm,none"] == pytest.approx(right_normalised / 5)


def test_an_exact_answer_counts(settings, checkpoint, tmp_path, task_folder):
    """Solve a task whose reference answers are the model's own outputs."""
    from flash.evaluation.harness import DecoderLM
    from flash.model.checkpoint import load

    tokenizer = HarnessTokenizer.open(checkpoint)
    model = DecoderLM(load(checkpoint), tokenizer)
    questions = ["def add(a, b):", "import os", "x = [1, 2"]
    rows = []
    for question in questions:
        [written] = model._continue([tokenizer.encode(question)], 8, ["\n"])
        rows.append({"question": question, "answer": tokenizer.answer(written, ["\n"])})
    own = tmp_path / "own"
    own.mkdir()
    rows[0]["answer"] += "!"
    (own / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    write_task(
        own,
        task="mirror",
        dataset_path="json",
        dataset_kwargs={
            "data_files": {"test": str(own / "data.jsonl")},
            "cache_dir": str(own / "cache"),
        },
        test_split="test",
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    settings.suite.include = str(own)
    mirror = TaskSettings(name="mirror", title="Mirror", metric="exact_match,none")
    assert evaluate(with_tasks(settings, mirror)).figures[0].value == pytest.approx(200 / 3)


def test_finished_tasks_are_kept_until_what_decides_them_changes(settings, monkeypatch):
    asked = []
    run = Tasks.run
    monkeypatch.setattr(
        Tasks, "run", lambda self, name, *rest: asked.append(name) or run(self, name, *rest)
    )
    first = evaluate(settings)
    assert asked == ["choice", "quiz"]
    assert evaluate(settings) == first
    assert asked == ["choice", "quiz"]
    settings.batch_size = 2
    evaluate(settings)
    assert asked == ["choice", "quiz"]
    settings.limit = 3
    assert [row.samples for row in evaluate(settings).figures] == [3, 3]
    assert asked == ["choice", "quiz"] * 2
    other = TaskSettings(name="quiz", title="Quiz", fewshot=1, metric="exact_match,none")
    evaluate(with_tasks(settings, CHOICE, other))
    assert asked == ["choice", "quiz", "choice", "quiz", "quiz"]


def test_a_killed_evaluation_goes_on_where_it_was(settings, monkeypatch):
    run = Tasks.run

    def killed(self, name, *rest):
        if name == "quiz":
            raise KeyboardInterrupt
        return run(self, name, *rest)

    monkeypatch.setattr(Tasks, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings)
    assert [path.name for path in folder_of(settings).glob("*/*")] == ["choice.json"]
    asked = []
    monkeypatch.setattr(
        Tasks, "run", lambda self, name, *rest: asked.append(name) or run(self, name, *rest)
    )
    assert len(evaluate(settings).figures) == 2
    assert asked == ["quiz"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param(
            {"name": "chioce"},
            "suite.tasks: chioce: no such task of the harness; did you mean",
            marks=pytest.mark.slow,  # all of the harness's tasks are looked through
        ),
        ({"name": "code"}, "code: executes code that the model writes, .* without a sandbox"),
        ({"name": "lost"}, r"lost: dataset json cannot be loaded \(.*nothing\.jsonl.*network"),
        ({"name": "choice", "metric": "acc"}, "metric of choice=acc: expected one of acc,none"),
    ],
)
def test_tasks_that_cannot_run_are_one_line(settings, task_folder, task, message, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(task_folder, own, ignore=shutil.ignore_patterns("cache"))
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "question"}
    common |= {"output_type": "generate_until", "doc_to_target": "answer"}
    missing = {"data_files": {"test": str(own / "nothing.jsonl")}}
    write_task(own, task="code", unsafe_code=True, dataset_kwargs=missing, **common)
    write_task(own, task="lost", dataset_kwargs=missing, **common)
    settings.suite.include = str(own)
    chosen = TaskSettings(**{"title": "x", "metric": "acc,none", **task})
    with pytest.raises(InputError, match=message):
        evaluate(with_tasks(settings, chosen))


def test_models_that_are_not_there_are_one_line(settings, tmp_path):
    settings.format = ModelFormat.program
    with pytest.raises(InputError, match=r"format=program: expected .*model\.pte, found none; run"):
        evaluate(settings, find_program)
    settings.format, settings.arch = ModelFormat.decoder, {"ffn_dim": 64}
    with pytest.raises(InputError, match=r"model=null: expected trained weights in"):
        evaluate(settings)
    settings.model = settings.backbone.weights
    with pytest.raises(InputError, match=r"model=.*: holds arch .*: expected"):
        evaluate(settings)
    damaged = tmp_path / "damaged"
    shutil.copytree(settings.model, damaged)
    values = json.loads((damaged / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 2048, "content": "<more>"})
    (damaged / "tokenizer.json").write_text(json.dumps(values))
    settings.model, settings.arch = str(damaged), {}
    with pytest.raises(InputError, match=r"tokenizer\.json: has 2049 entries: expected at most"):
        evaluate(settings)
    settings.model = None
    with pytest.raises(InputError, match=r"suite\.apply_chat_template=true: expected chat_temp"):
        evaluate(with_tasks(settings, CHOICE, apply_chat_template=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": []}, r"tasks=\[\]: expected at least one task"),
        ({"tasks": [QUIZ, QUIZ]}, "each task once"),
        ({"leave_out": ["quizz"]}, r"leave_out=\[quizz\]: expected some of \[quiz\]"),
        ({"leave_out": ["quiz"]}, "expected at least one task left"),
    ],
)
def test_illegal_suites_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        SuiteSettings(**{"name": "x", "tasks": [QUIZ], **values})


def test_illegal_settings_are_refused(settings):
    suite = dataclasses.replace(settings.suite, include="nowhere")
    nowhere = dataclasses.replace(settings, suite=suite)
    with pytest.raises(InputError, match=r"suite\.include=nowhere: expected a folder"):
        evaluate(nowhere)
    for key, value in (("batch_size", 0), ("limit", -1)):
        with pytest.raises(InputError, match=f"{key}={value}: expected a positive integer"):
            EvaluateSettings(**{**vars(settings), key: value})
    with pytest.raises(InputError, match="^fewshot=-1: expected 0 or more"):
        TaskSettings(name="quiz", title="Quiz", metric="x", fewshot=-1)
    phone = DeviceSettings(name="phone", kind=DeviceKind.android, android=AndroidSettings())
    assert EvaluateSettings(**{**vars(settings), "device": phone}).device is phone
    with pytest.raises(InputError, match="device=phone: expected one whose runtime gives logits"):
        EvaluateSettings(**{**vars(settings), "device": phone, "format": ModelFormat.program})


def test_a_chat_template_is_used_and_ends_answers(settings, checkpoint, tmp_path, monkeypatch):
    from flash.evaluation.harness import DecoderLM

    chat = tmp_path / "chat"
    shutil.copytree(checkpoint, chat)
    values = json.loads((chat / "tokenizer.json").read_text())
    # "ized" becomes the special token that ends a turn.
    values["added_tokens"].append({**values["added_tokens"][0], "id": 2047, "content": "ized"})
    (chat / "tokenizer.json").write_text(json.dumps(values))
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}ized\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen = []
    generate = DecoderLM.generate_until

    def spy(self, requests, **kwargs):
        seen.extend(request.args[0] for request in requests)
        assert self._tokenizer.end_ids == (0, 2047)
        return generate(self, requests, **kwargs)

    monkeypatch.setattr(DecoderLM, "generate_until", spy)
    settings.model = str(chat)
    evaluate(with_tasks(settings, QUIZ, apply_chat_template=True))
    assert len(seen) == 5
    for prompt in seen:
        assert prompt.count("<user>") == 3  # two examples, then the question
        assert prompt.endswith("\nA:ized\n<assistant>")


def test_a_begun_answer_is_gone_on_with(checkpoint, tmp_path):
    """Continue an answer whose first words the task gives."""
    chat = tmp_path / "chat"
    shutil.copytree(checkpoint, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = HarnessTokenizer.open(chat)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert tokenizer.render(asked) == "<user>Hello<end><assistant>"
    begun = [*asked, {"role": "assistant", "content": "Here is"}]
    text = tokenizer.render(begun, prompt=False, continued=True)
    assert text == "<user>Hello<end><assistant>Here is"


def test_the_papers_writing_tasks_are_scored_by_rouge_l(
    settings, writing, checkpoint, tmp_path, monkeypatch
):
    from flash.evaluation.harness import DecoderLM

    chat = save_decoder(tiny_decoder("FF", max_context=1024), tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen: dict[str, list] = {}
    generate = DecoderLM.generate_until

    def spy(self, requests, **kwargs):
        answers = generate(self, requests, **kwargs)
        for request, answer in zip(requests, answers, strict=True):
            seen.setdefault(request.task_name, []).append((request.args[0], request.doc, answer))
        return answers

    monkeypatch.setattr(DecoderLM, "generate_until", spy)
    settings.backbone = BackboneSettings(name="toy", weights=str(chat))
    result = evaluate(with_tasks(settings, *writing, apply_chat_template=True))
    assert [(row.shots, row.samples) for row in result.figures] == [(0, 2), (1, 3)]
    for row, column in zip(result.figures, ("target", "summary"), strict=True):
        scores = [rouge_l(answer, doc[column]) for _, doc, answer in seen[row.task]]
        assert row.value == pytest.approx(100 * sum(scores) / len(scores), abs=1e-3)
    # References that begin as the answers do; only this task is asked again.
    answers = [answer for _, _, answer in seen["openrewrite"]]
    path = Path(writing[0].files["test"])
    write_rewrites(path, [" ".join([*answer.split(), "x y z"]) for answer in answers])
    again = evaluate(settings)
    assert 90 < again.figures[0].value < 100
    assert again.figures[1] == result.figures[1]
    for prompt, _, _ in seen["tldr9plus"]:
        assert prompt.count("<assistant>") == 2  # the example's summary, then the answer
        assert "It broke." in prompt
        assert "</s>" not in prompt


def test_data_that_is_not_there_is_one_line_and_may_be_left_out(settings, writing, tmp_path):
    rewrite, tldr = writing
    lost = dataclasses.replace(rewrite, files={"test": str(tmp_path / "nowhere" / "*.csv")})
    message = r"files of openrewrite: test=.*nowhere.*: no such file; .* suite.leave_out=\[openrewr"
    with pytest.raises(InputError, match=message):
        evaluate(with_tasks(settings, lost, CHOICE))
    left = evaluate(with_tasks(settings, lost, CHOICE, leave_out=["openrewrite"]))
    assert [row.task for row in left.figures] == ["choice"]
    assert Path(tldr.files["test"]).parts[-2:] == ("**", "test*.json")


def test_other_data_is_asked_again(settings, task_folder, tmp_path, monkeypatch):
    asked = []
    run = Tasks.run
    monkeypatch.setattr(
        Tasks, "run", lambda self, name, *rest: asked.append(name) or run(self, name, *rest)
    )
    own = tmp_path / "questions.jsonl"
    shutil.copy(task_folder / "data.jsonl", own)
    task = dataclasses.replace(CHOICE, files={"test": str(own)})
    assert evaluate(with_tasks(settings, task)).figures[0].samples == 5
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:4]))
    assert evaluate(with_tasks(settings, task)).figures[0].samples == 4
    assert asked == ["choice", "choice"]


@pytest.mark.parametrize(
    ("row", "problem"), [("null", "is null"), ("5", "is an integer"), ("{", "is no JSON")]
)
def test_a_row_that_is_no_object_is_named(row, problem, settings, task_folder, tmp_path):
    own = tmp_path / "questions.jsonl"
    own.write_text(f"{row}\n" + (task_folder / "data.jsonl").read_text(), "utf-8")
    task = dataclasses.replace(CHOICE, files={"test": str(own)})
    with pytest.raises(InputError, match=rf"choice: .*questions\.jsonl, row 1: {problem}.*mend it"):
        evaluate(with_tasks(settings, task))


def test_files_of_an_unknown_kind_do_not_replace_a_data_set(settings, tmp_path):
    (tmp_path / "problems.xml").write_text("x")
    files = {"test": str(tmp_path / "problems.xml")}
    task = TaskSettings(name="humaneval_sandboxed", title="x", metric="pass@1,none", files=files)
    with pytest.raises(InputError, match=r"problems\.xml: expected a file that ends in \.arrow"):
        evaluate(with_tasks(settings, task))


def test_table_has_the_papers_average_only_if_all_figures_are_there(settings):
    result = evaluate(with_tasks(settings, CHOICE, QUIZ))
    assert as_text(result).splitlines()[-1].split()[-2:] == ["-", "-"]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_problems_of_a_file_are_asked_and_their_answers_run(settings, tmp_path):
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"task_id": "a", **PROBLEM}) + "\n").encode()))
    names = ("humaneval_sandboxed", "humaneval_instruct_sandboxed")
    tasks = [
        TaskSettings(name=name, title=name, metric="pass@1,none", files={"test": str(path)})
        for name in names
    ]
    longer = save_decoder(tiny_decoder("FF", max_context=1024), tmp_path / "longer")
    settings.backbone.weights = str(longer)
    result = evaluate(with_tasks(settings, *tasks))
    assert [(row.samples, row.value) for row in result.figures] == [(1, 0.0), (1, 0.0)]
