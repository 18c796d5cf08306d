"""Facts about the page as browsers show it, and about its content."""

import html
import json
import re
from dataclasses import replace
from importlib.resources import files

import pytest
from optuna.trial import TrialState

from flash.paths import Runs
from flash.report.page import render
from flash.report.reading import read
from flash.search.settings import Sampler
from tests.report.browser import needs_chromium, run
from tests.report.toy_study import (
    rename_study,
    with_curves,
    write_model,
    write_promotion,
    write_study,
)
from tests.search import toy_search as toy

OUTLIER, FAILED = 12, 7


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Page of two studies with a failed trial, stopped ones, an outlier, and models."""
    folder = tmp_path_factory.mktemp("report")
    trials = with_curves(toy.run(folder / "study.db", sampler=Sampler.random), {9, 14})
    trials[FAILED] = replace(
        trials[FAILED], state=TrialState.FAIL, loss=None, extra={"reason": "the loss is nan"}
    )
    trials[OUTLIER] = replace(trials[OUTLIER], loss=97.0)
    runs = Runs(folder / "runs")
    report = write_study(runs, trials)
    write_promotion(runs, report, 3)
    winner = report["names"][str(report["winners"][0])]
    write_model(runs, winner, trials[report["winners"][0]].spec)
    write_model(runs, "mine", toy.BACKBONE.replace(ffn_dim=320))
    rename_study(runs, "toy_phone", device="phone")
    return render(read(runs, ["toy", "toy_phone"]))


@pytest.fixture(scope="module")
def axe():
    return (files("axe_core_python") / "axe.min.js").read_text("utf-8")


AXE = """
const found = await axe.run();
return {
  violations: found.violations.map((each) => [each.id, each.impact, each.nodes.map((n) => n.html)]),
  rules: found.passes.map((each) => each.id),
  sideways: document.documentElement.scrollWidth - innerWidth,
  wide: [...document.querySelectorAll("main *")].filter((each) => each.scrollWidth > innerWidth)
    .map((each) => each.outerHTML.slice(0, 80)),
};"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(tmp_path, page, axe, width, dark):
    found = run(tmp_path, page, AXE, width=width, dark=dark, library=axe)
    assert found["violations"] == []
    assert {"color-contrast", "label", "button-name", "th-has-data-cells"} <= set(found["rules"])
    assert found["sideways"] <= 0
    if width == 390:  # also no part of the page
        assert found["wide"] == []


USE = """
const rows = () => [...document.querySelectorAll("#trials tbody tr")].filter((row) => !row.hidden);
const headers = [...document.querySelectorAll("#trials th")];
const column = headers.findIndex((header) => header.textContent.startsWith("loss"));
const losses = () => rows().map((row) => row.cells[column].textContent);
headers[column].firstElementChild.click();
const up = losses();
headers[column].firstElementChild.click();
const down = losses();
const filter = document.getElementById("filter");
filter.value = "nan";
filter.dispatchEvent(new Event("input"));
const failed = rows().map((row) => row.textContent);
const plot = document.getElementById("toy-frontier");
const range = plot.layout.yaxis.range;
const beyond = plot.data.filter((trace) => trace.meta === "beyond").length;
const buttons = [...plot.parentElement.querySelectorAll("button")];
buttons.find((button) => button.textContent === "Show outliers").click();
const all = plot.layout.yaxis.range;
plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
return {
  up, down, failed, range, all, beyond,
  sorted: headers[column].getAttribute("aria-sort"),
  count: document.getElementById("count").textContent,
  said: document.getElementById("status").textContent,
  ink: plot.layout.font.color,
  requests: performance.getEntriesByType("resource").map((each) => each.name),
};"""


@needs_chromium
def test_the_table_sorts_and_filters_and_figures_work_by_keyboard(tmp_path, page):
    used = run(tmp_path, page, USE, dark=True)
    numbers = [float(text.split()[0]) for text in used["up"] if text != "-"]
    assert numbers == sorted(numbers)
    assert used["up"][-2:] == used["down"][-2:] == ["-", "-"]  # unknown ones are last
    assert used["down"][0] == "97.000"
    assert used["sorted"] == "descending"
    assert len(used["failed"]) == 2
    assert all("the loss is nan" in text for text in used["failed"])
    assert used["count"] == "2 of 40 trials"
    assert used["range"][1] < 10 < 97 < used["all"][1]
    assert used["beyond"] == 1
    assert "parameters" in used["said"]  # the text of a point
    assert used["ink"] == "#e6eaef"
    assert used["requests"] == []


def test_a_page_of_200_trials_is_below_3_mb(tmp_path):
    trials = with_curves(toy.run(tmp_path / "study.db", sampler=Sampler.random), {9, 14})
    curve = [[1024.0 * i, 4.0 + 1 / (i + 1)] for i in range(32)]
    many = [
        replace(
            trial, number=number, loss=trial.loss and trial.loss + number / 1e4,
            extra={**trial.extra, "curve": [[t, loss + number / 997] for t, loss in curve]},
        )
        for number, trial in enumerate(trials * 10)
    ]  # fmt: skip
    runs = Runs(tmp_path / "runs")
    write_study(runs, many)
    page = render(read(runs))
    assert len(page.encode()) < 3e6
    assert page.count("data-state=") == 200


def test_every_winner_has_its_command_with_the_settings_of_its_search(tmp_path, page):
    runs = Runs(tmp_path)
    report = write_study(runs, toy.run(tmp_path / "study.db", sampler=Sampler.random))
    path = runs.study("toy") / "frontier.json"
    line = "flash search backbone=smollm2_135m 'data.pattern=*.txt' device=host search.study=toy"
    path.write_text(json.dumps({**report, "provenance": {"command": line}}))
    page = html.unescape(render(read(runs)))
    assert f"<code>{line}</code>" in page
    names = [report["names"][str(number)] for number in report["winners"]]
    for name in names:
        command = f"flash train +arch={name} backbone=smollm2_135m 'data.pattern=*.txt'"
        assert f"<code>{command}</code><button" in page


def test_results_name_their_origin_and_files(tmp_path):
    runs = Runs(tmp_path)
    write_model(runs, "mine", toy.BACKBONE)
    page = render(read(runs))
    assert re.search(r"<h1>Models</h1>", page)
    assert str(runs.export("mine") / "model.pte") in page
    for title in ("training of mine", "export of mine"):
        part = page.partition(f"<h3>{title}</h3>")[2].partition("</dl>")[0]
        assert "<dt>date</dt>" in part
        assert "torch" in part
        assert "<dt>machine</dt>" in part


def test_names_from_files_are_text_and_links_are_of_the_web(tmp_path):
    runs = Runs(tmp_path)
    report = write_study(runs, toy.run(tmp_path / "study.db", sampler=Sampler.random))
    path = runs.study("toy") / "frontier.json"
    report["space"]["name"] = "<img src=x>"
    report["device"] = {"device": "</script><script>alert(1)"}
    for link in ("javascript:alert(1)", "https://wandb.ai/me/flash/runs/1"):
        path.write_text(json.dumps(report))
        (runs.study("toy") / "wandb.json").write_text(json.dumps({"url": link}))
        page = render(read(runs))
        assert "<img src=x>" not in page
        assert page.count("<script") == 3
        assert (f'href="{link}"' in page) == link.startswith("https://")
