"""A search that asks its candidates a task of the harness, from settings to report."""

import dataclasses
from pathlib import Path

import pytest

from flash.errors import InputError
from flash.evaluation.run import evaluate
from flash.evaluation.settings import EvaluateSettings, SuiteSettings, TaskSettings
from flash.paths import Runs
from flash.report.figures import all_figures
from flash.report.page import render
from flash.report.reading import read as read_report
from flash.report.reading import read_study
from flash.search.run import run_search
from flash.search.settings import SearchJobSettings
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
    monkeypatch.setattr("flash.search.tasks.SearchTasks.open", pytest.fail)
    again = {"from_study": "asks"}
    task = asking(common, task_folder, study="task", objectives=["task:choice", "size"], **again)
    assert run_search(task)["objectives"] == [KEY, "size_mib"]
    figure = all_figures(read_study(Runs(Path(common["runs"])), "task"))["frontier"]
    assert figure.layout.yaxis.title.text == "wrong answers to choice [%]"
    loss = asking(common, task_folder, study="loss", objectives=["quality", "size"], **again)
    assert [t["loss"] for t in run_search(loss)["trials"]] == [t["loss"] for t in asked["trials"]]
    fewer = dataclasses.replace(task, search=dataclasses.replace(task.search, questions=3))
    with pytest.raises(InputError, match=r"from_study=asks: .*these differ: tasks\.choice"):
        run_search(fewer)


def test_a_task_is_refused_before_any_work(common, task_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("flash.data.corpus.PackedData.__init__", pytest.fail)
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
    with pytest.raises(InputError, match=r"^search\.objectives: task choice: metric=acc,none: exp"):
        run_search(asking(common, tmp_path, study="lower"))
