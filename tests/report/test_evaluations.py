"""Facts about the benchmark tables on the page."""

import html
import json
import re
from dataclasses import replace

import pytest

from flash.errors import InputError
from flash.evaluation.suites import Figure, SuiteResult
from flash.paths import Runs
from flash.report.page import render
from flash.report.reading import read, read_study
from flash.search.settings import Sampler
from tests.report.toy_study import write_study
from tests.search import toy_search as toy


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("study") / "study.db", sampler=Sampler.random)


@pytest.fixture
def runs(tmp_path, trials):
    runs = Runs(tmp_path)
    write_study(runs, trials)
    return runs


RESULT = SuiteResult(
    name="toy",
    spec=toy.BACKBONE,
    suite="base",
    form="decoder",
    limit=None,
    figures=[
        Figure("piqa", "PIQA", "acc,none", 0, 10, 71.25, 1.5, {"Flash-350M": 70.08}),
        Figure("nq_open", "NQ-open", "exact_match,none", 5, 10, 4.0, None, {"Flash-350M": 5.9}),
    ],
    average=37.625,
)


def rows_of(page):
    """Return the texts of the cells of every row of the tables on a page."""
    rows = re.findall(r"<tr role=.row.[^>]*>(.*?)</tr>", page)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def test_benchmarks_are_on_the_page_beside_the_papers(runs):
    folder = runs.evaluation("toy")
    RESULT.write(folder)
    replace(RESULT, form="program", figures=RESULT.figures[:1], average=None).write(folder)
    replace(RESULT, suite="quick", limit=50).write(folder)
    page = render(read(runs))
    rows = rows_of(page)
    cells = ["toy (decoder)", "71.2 +- 1.5", "4.0", "37.6"]
    assert cells in rows
    cells = ["toy (program)", "71.2 +- 1.5", "-", "-"]
    assert cells in rows
    cells = ["Flash-350M, paper", "70.1", "5.9", "38.0"]
    assert cells in rows
    assert "quick, first 50 questions of each task" in page


def test_results_of_another_architecture_or_model_are_left_out(runs):
    assert "Benchmarks" not in render(read(runs))
    other = replace(RESULT, spec=toy.BACKBONE.replace(ffn_dim=toy.BACKBONE.ffn_dim // 2))
    other.write(runs.evaluation("toy"))
    replace(RESULT, name="stranger").write(runs.evaluation("stranger"))
    assert read(runs).evaluations == []


def test_a_damaged_result_is_one_line(runs):
    RESULT.write(runs.evaluation("toy"))
    path = runs.evaluation("toy") / "base.decoder.json"
    path.write_text(path.read_text()[:40])
    (fault,) = read(runs).faults
    assert re.search(r"base\.decoder\.json: damaged .* evaluate again", fault)


@pytest.mark.parametrize("key", ["trials", "names", "backbone", "predicted"])
def test_a_damaged_frontier_is_one_line(runs, key):
    path = runs.study("toy") / "frontier.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    message = rf"frontier\.json: damaged \({key}: missing\); delete it to run flash search again"
    (fault,) = read(runs).faults
    assert re.search(message, fault)
    with pytest.raises(InputError, match=message):
        read_study(runs, "toy")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("objectives",), ["loss", "speed"], "objectives=speed: expected one of"),
        (("trials", 0, "loss"), "low", 'trials.0.loss="low": input should be a valid number'),
        (("trials", 0, "spec", "ffn_dim"), 33, "trials.0.spec.ffn_dim=33: expected a multiple"),
        (("winners",), [99], "winners=99: expected the number of a trial"),
        (("workload", "prompts"), [], "workload.prompts=[]: expected one length or more"),
        (("latency_points",), {}, "latency_points"),
    ],
)
def test_a_wrong_value_in_a_frontier_is_named(runs, place, value, problem):
    path = runs.study("toy") / "frontier.json"
    report = values = json.loads(path.read_text())
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = value
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=rf"frontier\.json: damaged \({re.escape(problem)}"):
        read_study(runs, "toy")


def test_a_damaged_promotion_is_one_line(runs):
    path = runs.study("toy") / "promoted.json"
    path.write_text('{"trials": [{}]}')
    data = read(runs)
    assert re.search(r"promoted\.json: damaged .*stage=promote again", data.faults[0])
    assert data.faults[0] in html.unescape(render(data))
    assert len(data.studies[0].trials) == 20
