import json
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from flash.arch import Attention, parse_pattern
from flash.paths import Runs
from flash.report.figures import all_figures
from flash.report.outliers import spread
from flash.report.page import CAPTIONS, render
from flash.report.pattern_figures import kind_shares, mixed_neighbor_share
from flash.report.reading import read, read_study
from flash.search.objectives import Objective
from flash.search.settings import Sampler
from tests.report.toy_study import with_curves, write_promotion, write_study
from tests.search import toy_search as toy

STOPPED = {9, 14}
FOUR = (Objective.quality, Objective.prefill, Objective.decode, Objective.size)


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("study") / "study.db", sampler=Sampler.random)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def figures_of(runs):
    return all_figures(read_study(runs, "toy"))


def shares(*patterns, places):
    specs = [toy.BACKBONE.replace(layer_types=parse_pattern(pattern)) for pattern in patterns]
    return kind_shares(specs, places)


def test_shares_of_kinds_add_up_to_one_at_every_place():
    by_kind = shares("FF-S", "F-F-F-", "SSFFFF--F", "-", places=9)
    assert all(len(values) == 9 for values in by_kind.values())
    assert [sum(column) for column in zip(*by_kind.values(), strict=True)] == [pytest.approx(1)] * 9


def test_the_first_and_the_last_layers_of_all_depths_lie_on_each_other():
    skipped = shares("-FF-", "-FFFFFF-", "-F-", places=8)[Attention.skip_attention]
    assert skipped[0] == skipped[-1] == 1
    assert skipped[3] == skipped[4] == 0


def test_a_pattern_of_full_depth_is_not_stretched():
    skipped = shares("F-F--F", places=6)[Attention.skip_attention]
    assert skipped == [0, 1, 0, 1, 1, 0]


def test_interleaving_is_the_share_of_unlike_neighbors():
    specs = [toy.BACKBONE.replace(layer_types=parse_pattern(p)) for p in ("F-F-", "FF--")]
    assert mixed_neighbor_share(specs) == pytest.approx(4 / 6)


def test_a_plain_study_has_the_figures_of_the_search_only(runs, trials):
    write_study(runs, trials)
    assert list(figures_of(runs)) == [
        "frontier",
        "hypervolume",
        "parallel_coordinates",
        "patterns",
        "kinds",
        "predicted_against_measured",
    ]


def test_every_figure_has_a_caption_and_is_on_the_page(runs, trials):
    report = write_study(runs, with_curves(trials, STOPPED))
    write_promotion(runs, report, 3)
    page = render(read(runs))
    names = figures_of(runs)
    assert {"learning_curves", "promotion"} <= names.keys() <= CAPTIONS.keys()
    for name in names:
        assert f'id="{name}"' in page
        assert CAPTIONS[name][0] in page


def test_the_page_needs_no_network(runs, trials):
    write_promotion(runs, write_study(runs, with_curves(trials, STOPPED)), 3)
    head, body = render(read(runs)).split("</head>")
    assert "http://" not in body
    assert "https://" not in body
    assert "src=" not in head.partition("<script>")[0]  # the script is in the page


def test_the_frontier_is_what_parallel_coordinates_select(runs, trials):
    report = write_study(runs, trials)
    dimensions = {d.label: d for d in figures_of(runs)["parallel_coordinates"].data[0].dimensions}
    low, high = dimensions["frontier"].constraintrange
    selected = [i for i, value in enumerate(dimensions["frontier"].values) if low <= value <= high]
    assert sorted(report["frontier"]) == selected
    assert list(dimensions["loss [nats]"].values) == [trial.loss for trial in trials]
    layers = [dimensions[kind].values for kind in ("full", "sliding", "skipped")]
    assert [sum(n) for n in zip(*layers, strict=True)] == list(dimensions["depth"].values)


def test_axes_on_which_all_trials_agree_are_left_out(runs, tmp_path):
    trials = toy.run(tmp_path / "study.db", toy.make_space(min_depth=8), trials=8)
    write_study(runs, trials)
    dimensions = figures_of(runs)["parallel_coordinates"].data[0].dimensions
    assert "depth" not in [dimension.label for dimension in dimensions]


def test_each_cost_has_its_panel_with_all_trials(runs, trials):
    report = write_study(runs, trials, FOUR)
    figure = figures_of(runs)["frontier"]
    titles = [axis.title.text for axis in figure.select_xaxes()]
    assert titles == [
        "predicted TTFT at 64 tokens [ms]",
        "predicted decode step at 64 tokens [ms]",
        "weights [MiB]",
    ]
    front = [trace for trace in figure.data if trace.name == "frontier"]
    assert [len(trace.x) for trace in front] == [len(report["frontier"])] * 3
    assert {trace.mode for trace in front} == {"markers"}  # steps are for two objectives
    assert sum(trace.showlegend for trace in front) == 1


def test_a_search_without_latency_shows_its_own_cost(runs, trials):
    write_study(runs, trials, (Objective.quality, Objective.size))
    titles = [axis.title.text for axis in figures_of(runs)["frontier"].select_xaxes()]
    assert titles == ["weights [MiB]"]


def test_curves_of_stopped_trials_end_in_a_mark(runs, trials):
    changed = with_curves(trials, STOPPED)
    write_study(runs, changed)
    traces = {trace.name: trace for trace in figures_of(runs)["learning_curves"].data}
    ends = traces["stopping point"]
    assert set(ends.x) == {1024.0}
    assert all("it is hopeless" in text for text in ends.text)
    drawn = sum(list(t.x).count(None) for t in traces.values() if t.mode == "lines")
    assert drawn == len(trials)
    assert [trial.number for trial in read_study(runs, "toy").stopped] == sorted(STOPPED)
    assert "2 stopped early" in render(read(runs))


def test_a_stopped_trial_is_shown_at_its_predicted_loss(runs, trials):
    write_study(runs, with_curves(trials, STOPPED))
    traces = {trace.name: trace for trace in figures_of(runs)["frontier"].data}
    shown = traces["stopped early (predicted loss)"]
    assert list(shown.y) == [trials[number].loss for number in sorted(STOPPED)]


def test_one_outlier_does_not_stretch_the_axes_and_is_marked(runs, trials):
    trials = [replace(t, loss=97.0) if t.number == 5 else t for t in trials]
    report = write_study(runs, trials, FOUR)
    figure = figures_of(runs)["frontier"]
    low, high = figure.layout.yaxis.range
    ends = [trials[number].loss for number in report["frontier"]]
    assert low < min(ends) <= max(ends) < high < 10
    marks = [trace for trace in figure.data if trace.meta == "beyond"]
    assert [list(mark.y) for mark in marks] == [[high]] * 3  # at the border of each panel
    assert all("loss 97.000" in mark.text[0] for mark in marks)
    assert figure.layout.meta["all"]["yaxis2.range"][1] > 97
    axes = {d.label: d for d in figures_of(runs)["parallel_coordinates"].data[0].dimensions}
    assert axes["loss [nats]"].range[1] < 10


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1000], (1, 9)),
        ([5, 5, 5, 5, 5, 5, 5, 5, 6, 7, 900], (5, 7)),
        ([3.856, 3.854, 3.843, 3.823, 3.334, 3.182], (3.182, 3.856)),  # two of six
        ([1, 2, 50], (1, 50)),
        ([4, 4, 4, 4, 4], (4, 4)),
        ([1, 2, 3, 4, 5, float("nan"), float("inf")], (1, 5)),
    ],
)
def test_the_range_of_most_values(values, ends):
    assert spread(values) == ends


def test_promotion_says_how_many_pairs_turned_and_which(runs, trials):
    report = write_study(runs, trials)
    write_promotion(runs, report, 4)
    promoted = json.loads((runs.study("toy") / "promoted.json").read_text())
    figure = figures_of(runs)["promotion"]
    assert f"{promoted['swapped']} of 6 pairs swapped" in figure.layout.title.text
    assert f"Kendall tau {promoted['kendall_tau']:.2f}" in figure.layout.title.text
    assert len(figure.layout.annotations) == 8  # a label at each end
    crossing = sum(
        (a.y[0] - b.y[0]) * (a.y[1] - b.y[1]) < 0
        for i, a in enumerate(figure.data)
        for b in figure.data[i + 1 :]
    )
    assert crossing == promoted["swapped"] > 0


def test_promotion_of_other_architectures_is_not_shown(runs, trials):
    report = write_study(runs, trials)
    write_promotion(runs, report, 3)
    path = runs.study("toy") / "promoted.json"
    promoted = json.loads(path.read_text())
    for row in promoted["trials"]:
        row["spec"]["ffn_dim"] += 32
    path.write_text(json.dumps(promoted))
    assert "promotion" not in figures_of(runs)


def test_a_study_without_a_complete_trial_still_has_a_page(runs, trials):
    failed = [
        replace(trial, state=TrialState.FAIL, loss=None, extra={"reason": "diverged"})
        for trial in trials
    ]
    write_study(runs, failed)
    assert f"0 trials complete, {len(trials)} failed" in render(read(runs))
