"""A search that asks its candidates a task of the harness, from settings to report."""

import dataclasses
from pathlib import Path

import pytest

from flash.errors import InputError
from flash.evaluation.harness import DecoderLM
from flash.evaluation.run import evaluate
from flash.evaluation.settings import EvaluateSettings, SuiteSettings, TaskSettings
from flash.model.checkpoint import load
from flash.model.tokenizer import ModelTokenizer
from flash.paths import Runs
from flash.report.figures import all_figures
from flash.report.page import render
from flash.report.reading import read as read_report
from flash.report.reading import read_study
from flash.search.run import run_search
from flash.search.settings import SearchJobSettings
from flash.search.tasks import SearchTasks
from flash.training.run import train
from flash.training.settings import TrainSettings
from tests.evaluation.conftest import task_folder, write_task  # noqa: F401 - a fixture
from tests.pipeline.conftest import DEVICE, RECIPE, search_settings

KEY = "error_pct:choice"
CHOICE = TaskSettings(name="choice", title="Choice", metric="acc,none")


def asking(common, folder: Path, **changes: object) -> SearchJobSettings:
    settings = search_settings(common)
    settings.suite = SuiteSettings(name="own", tasks=[CHOICE], include=str(folder))
    values = {"study": "asks", "objectives": ["quality", "task:choice", "prefill"], **changes}
    settings.search = dataclasses.replace(settings.search, **values)
    return settings


@pytest.fixture(scope="session")
def asked(common, task_folder):  # noqa: F811
    return run_search(asking(common, task_folder, trials=4, startup_trials=2))


def error_of(common, folder: Path, **values: object) -> float:
    """Return the share of wrong answers by `flash evaluate` [%]."""
    settings = EvaluateSettings(
        **{key: common[key] for key in ("backbone", "trainer", "logger", "runs")},
        device=DEVICE,
        suite=SuiteSettings(name="own", tasks=[CHOICE], include=str(folder)),
        **values,
    )
    return 100 - evaluate(settings).figures[0].value


def test_errors_are_those_that_an_evaluation_finds(common, asked, task_folder):  # noqa: F811
    assert asked["objectives"] == ["loss", KEY, "prefill_ms"]
    backbone = asked["backbone"]["errors"][KEY]
    assert backbone["questions"] == 5
    assert backbone["pct"] == error_of(common, task_folder)
    assert asked["reference"][KEY] == min(100, backbone["pct"] + 15)
    trial = asked["trials"][-1]
    train(TrainSettings(**common, recipe=RECIPE, arch=trial["spec"], name="again"))
    again = error_of(common, task_folder, arch=trial["spec"], model="again")
    assert trial["errors"][KEY]["pct"] == again
    assert all(each["errors"][KEY]["stderr_pct"] > 0 for each in asked["trials"])


def test_a_finished_search_asks_nothing_and_its_report_shows_the_errors(
    common,
    asked,
    task_folder,  # noqa: F811
    monkeypatch,
    capsys,
):
    monkeypatch.setattr("flash.search.tasks.SearchTasks.ask", pytest.fail)
    again = run_search(asking(common, task_folder, trials=4, startup_trials=2))
    assert again["frontier"] == asked["frontier"]
    printed = capsys.readouterr().out
    assert "choice wrong %" in printed
    assert " +- " in printed
    assert max(map(len, printed.splitlines())) <= 80
    runs = Runs(Path(common["runs"]))
    figure = all_figures(read_study(runs, "asks"))["frontier"]
    assert figure.layout.yaxis.title.text == "held-out loss [nats/token]"
    assert figure.layout.xaxis.title.text == "wrong answers to choice [%]"
    assert "choice wrong [%]" in render(read_report(runs, ["asks"]))


def test_the_trials_can_be_judged_by_the_task_alone_or_by_the_loss_alone(
    common,
    asked,
    task_folder,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    monkeypatch.setattr("flash.search.tasks.Tasks.open", pytest.fail)
    again = {"from_study": "asks"}
    task = asking(common, task_folder, study="task", objectives=["task:choice", "size"], **again)
    assert run_search(task)["objectives"] == [KEY, "size_mib"]
    figure = all_figures(read_study(Runs(Path(common["runs"])), "task"))["frontier"]
    assert figure.layout.yaxis.title.text == "wrong answers to choice [%]"
    loss = asking(common, task_folder, study="loss", objectives=["quality", "size"], **again)
    assert [t["loss"] for t in run_search(loss)["trials"]] == [t["loss"] for t in asked["trials"]]
    fewer = dataclasses.replace(task, search=dataclasses.replace(task.search, questions=3))
    with pytest.raises(
        InputError, match=r"from_study=asks: .*these differ: tasks\.choice\.questions"
    ):
        run_search(fewer)


def test_another_baseline_is_asked_when_trials_are_judged_anew(common, asked, task_folder):  # noqa: F811
    first = asked["trials"][0]
    settings = asking(
        common,
        task_folder,
        study="baseline",
        objectives=["task:choice", "size"],
        baseline={key: first["spec"][key] for key in ("layer_types", "model_dim", "ffn_dim")},
        from_study="asks",
    )
    expected = first["errors"][KEY]["pct"] + 15
    assert run_search(settings)["reference"][KEY] == pytest.approx(min(100, expected))


def test_every_model_is_shown_the_same_examples(common, task_folder, backbone_folder):  # noqa: F811
    few = dataclasses.replace(CHOICE, fewshot=2)
    suite = SuiteSettings(name="own", tasks=[few], include=str(task_folder))
    tasks = SearchTasks(suite, None, common["trainer"].precision)
    tokenizer = ModelTokenizer.open(backbone_folder / "tokenizer.json")
    seen = []

    class Remembers(DecoderLM):
        def _score(self, rows):
            seen.append(rows)
            return super()._score(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash.evaluation.harness.DecoderLM", Remembers)
        model = load(backbone_folder)
        found = [tasks.ask(model, tokenizer) for _ in range(2)]
    assert seen[0] == seen[1]
    assert found[0] == found[1]
    assert max(len(row.tokens) for row in seen[0]) > 40  # there are examples


def test_a_task_is_refused_before_any_work(common, task_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("flash.search.run.latencies_of", pytest.fail)
    gone = asking(common, task_folder, study="gone")
    gone.suite = dataclasses.replace(gone.suite, include=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"^suite\.include=.*none: expected a folder"):
        run_search(gone)
    unknown = asking(common, task_folder, study="unknown", objectives=["task:chase", "size"])
    unknown.suite = dataclasses.replace(
        unknown.suite, tasks=[dataclasses.replace(CHOICE, name="chase")]
    )
    with pytest.raises(InputError, match=r"^suite\.tasks: chase: no such task of the harness"):
        run_search(unknown)
    wrong = {"metric": "acc", "aggregation": "mean", "higher_is_better": False}
    write_task(
        tmp_path,
        task="choice",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": str(task_folder / "data.jsonl")}},
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="label",
        doc_to_choice="choices",
        metric_list=[wrong],
    )
    lower = asking(common, tmp_path, study="lower")
    with pytest.raises(
        InputError, match=r"^suite\.tasks: metric of choice=acc,none: .*more is bet"
    ):
        run_search(lower)
    for typo in ("acc", "f1,none"):
        typed = asking(common, task_folder, study="typo")
        typed.suite = dataclasses.replace(
            typed.suite, tasks=[dataclasses.replace(CHOICE, metric=typo)]
        )
        with pytest.raises(
            InputError, match=rf"^suite\.tasks: metric of choice={typo}: .*acc,none"
        ):
            run_search(typed)
