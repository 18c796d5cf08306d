"""Facts about one model for several devices: costs, limits, objectives and their price."""

import numpy as np
import pytest

from flash.device.settings import DeviceSettings
from flash.errors import InputError
from flash.search.devices import (
    device_table,
    joint_limits,
    limits_by_device,
    over_devices,
    price,
)
from flash.search.objectives import Objective, Problem, high
from flash.search.settings import Across, SearchJobSettings, SearchLimits
from tests.search import toy_search as toy

MEMBERS = toy.make_space().stratified(np.random.default_rng(0), 40)


def board(specs):
    """Costs on a device on which the FFN takes most of the time and attention nearly none."""
    found = toy.costs(specs)
    ms = np.array([spec.model_dim * sum(spec.ffn_dims) / 5000 for spec in specs])
    return {**found, "prefill_ms": ms, "prefill_high_ms": 1.2 * ms}


def both(across=Across.max, **weights):
    costs = {"phone": toy.costs, "board": board}
    return over_devices(costs, toy.BACKBONE, across, weights)


def shares():
    return np.array([
        each(MEMBERS)["prefill_ms"] / each([toy.BACKBONE])["prefill_ms"]
        for each in (toy.costs, board)
    ])


def test_the_figure_over_all_devices_is_the_largest_or_mean_share_in_ms_of_the_first():
    whole = toy.costs([toy.BACKBONE])["prefill_ms"]
    largest = both()(MEMBERS)
    np.testing.assert_allclose(largest["prefill_ms"], shares().max(axis=0) * whole)
    assert set(shares().argmax(axis=0)) == {0, 1}  # each device is the slower one of some
    mean = both(Across.mean, phone=3.0)(MEMBERS)
    np.testing.assert_allclose(mean["prefill_ms"], (3 * shares()[0] + shares()[1]) / 4 * whole)
    for costs in (largest, mean):
        assert (costs["prefill_high_ms"] > costs["prefill_ms"]).all()
        np.testing.assert_array_equal(costs["prefill_ms@board"], board(MEMBERS)["prefill_ms"])
        np.testing.assert_array_equal(
            costs[high("prefill_ms@board")], board(MEMBERS)["prefill_high_ms"]
        )
    assert both()([toy.BACKBONE])["prefill_ms"] == pytest.approx(whole)


def test_costs_of_one_device_are_those_of_a_search_without_others():
    assert over_devices({"phone": toy.costs}, toy.BACKBONE, Across.max, {}) is toy.costs


def test_sizes_are_those_of_the_largest_program():
    def packed(specs):
        return {**board(specs), "size_mib": 2 * toy.costs(specs)["size_mib"]}

    costs = over_devices({"phone": toy.costs, "board": packed}, toy.BACKBONE, Across.mean, {})
    np.testing.assert_array_equal(costs(MEMBERS)["size_mib"], 2 * toy.costs(MEMBERS)["size_mib"])


def test_a_limit_of_a_device_takes_the_place_of_the_one_for_all():
    common = {"prefill_ms": 30.0, "size_mib": 2.0}
    assert limits_by_device(common, {}, ["phone"]) == common
    assert limits_by_device(common, {"prefill@board": 9.0}, ["phone", "board"]) == {
        "prefill_ms@phone": 30.0,
        "prefill_ms@board": 9.0,
        "size_mib@phone": 2.0,
        "size_mib@board": 2.0,
    }


@pytest.mark.parametrize("names", [["quality", "prefill"], ["quality", "prefill@phone",
                                                           "prefill@board"]])  # fmt: skip
def test_a_search_for_two_devices_obeys_the_limits_of_each(tmp_path, names):
    settings = toy.make_settings(trials=16, objectives=names)
    limits = limits_by_device({"prefill_ms": 24.0}, {"prefill@board": 90.0}, ["phone", "board"])
    problem = Problem(
        costs=both(),
        objectives=settings.order(Objective.prefill),
        reference=tuple({"loss": 4.0}.get(o.key, 500.0) for o in settings.order(Objective.prefill)),
        limits=limits,
    )
    trials = toy.run(tmp_path / "study.db", problem=problem, trials=16, objectives=names)
    assert [o.name for o in problem.objectives] == names
    assert len(trials) == 16
    for trial in trials:
        assert trial.costs["prefill_high_ms@phone"] <= 24.0
        assert trial.costs["prefill_high_ms@board"] <= 90.0


def test_costs_have_one_order_in_every_process():
    keys = list(both()(MEMBERS))
    assert keys[:2] == ["prefill_ms", "prefill_high_ms"]
    assert keys.index("size_mib") < keys.index("prefill_ms@phone") < keys.index("prefill_ms@board")


def test_limits_of_all_devices_cap_the_reference_point():
    whole = {key: float(v[0]) for key, v in both()([toy.BACKBONE]).items()}
    phone, board = whole["prefill_ms@phone"], whole["prefill_ms@board"]
    limits = {"prefill_ms@phone": phone / 2, "prefill_ms@board": board / 4, "size_mib@phone": 2.0}
    found = joint_limits(limits, whole, Across.max, {})
    assert found == {**limits, "prefill_ms": pytest.approx(phone / 2)}  # no size on the board
    mean = joint_limits(limits, whole, Across.mean, {"board": 3.0})
    assert mean["prefill_ms"] == pytest.approx((1 / 2 + 3 / 4) / 4 * phone)
    assert joint_limits({"prefill_ms": 3.0}, {"prefill_ms": 9.0}, Across.max, {}) == {
        "prefill_ms": 3.0
    }


def report_of(whole, trials, limits):
    """Make the part of `frontier.json` that the table reads; the first trial is the winner."""
    winner = trials[0]["number"]
    return {
        "devices": {"phone": {}, "board": {}},
        "objective": "prefill_64",
        "backbone": {"name": "toy", "quality": {"loss": 2.5}, "costs": whole},
        "winners": [winner],
        "names": {str(winner): f"toy_{winner}"},
        "trials": trials,
        "limits": limits,
    }


def test_the_price_counts_only_trials_within_the_limits_of_the_device():
    costs = {"prefill_ms@phone": 5.0, "prefill_ms@board": 5.0}
    trials = [
        {"number": n, "state": "complete", "loss": loss, "costs": {**costs, "size_mib@board": size}}
        for n, (loss, size) in enumerate([(3.0, 1.0), (2.0, 9.0)])
    ]
    report = report_of(costs, trials, limits={"size_mib@board": 2.0})
    columns, [_, winner] = device_table(report)
    assert winner[columns.index("phone price [nats]")] == 1.0
    assert winner[columns.index("board price [nats]")] == 0.0


def test_price_is_the_loss_above_the_best_candidate_that_is_no_slower_there():
    others = [(2.0, 10.0), (1.5, 20.0), (1.0, 30.0)]
    assert price("prefill_ms@board", 1.75, {"prefill_ms@board": 20.0}, others) == 0.25
    assert price("prefill_ms@board", 1.75, {"prefill_ms@board": 9.0}, others) == 0.0


def test_the_table_has_the_backbone_and_the_winners_on_each_device():
    spec = MEMBERS[3]
    costs = {key: float(v[0]) for key, v in both()([spec]).items()}
    whole = {key: float(v[0]) for key, v in both()([toy.BACKBONE]).items()}
    report = report_of(
        whole, [{"number": 4, "state": "complete", "loss": 3.0, "costs": costs}], limits={}
    )
    columns, [backbone, winner] = device_table(report)
    assert len(columns) == len(backbone) == len(winner) == 9
    assert backbone[:2] == ["toy", 2.5]
    assert winner[columns.index("board [ms]")] == costs["prefill_ms@board"]
    share = 100 * costs["prefill_ms@board"] / whole["prefill_ms@board"]
    assert winner[columns.index("board [% of backbone]")] == pytest.approx(share)
    assert winner[columns.index("phone price [nats]")] == 0.0
    assert winner[-1] == ("phone" if shares()[0][3] > shares()[1][3] else "board")
    assert device_table({**report, "devices": {}}) == ([], [])


def make_job(*names, workload=None, **search):
    devices = [DeviceSettings(name=name) for name in names]
    if workload is not None:
        devices[-1].workload.prompts = workload
    return SearchJobSettings(
        device=devices[0],
        devices={device.name: device for device in devices[1:]},
        search=toy.make_settings(**search),
    )


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"names": ["a", "a"]}, r"^devices\.a\.name=a: expected another name"),
        ({"names": ["a", "b"], "workload": [7]}, r"^devices\.b\.workload\.prompts=\[7\]: "),
        ({"names": ["a", "b"], "weights": {"c": 1.0}}, r"^search\.weights=c: .*: a, b"),
        ({"names": ["a"], "weights": {"a": 1.0}}, r"^search\.weights=a: expected one of several"),
        (
            {"names": ["a", "b"], "objectives": ["quality", "prefill@c"]},
            r"^search\.objectives=prefill@c: expected prefill@ and one of several devices: a, b",
        ),
        (
            {"names": ["a", "b"], "device_limits": {"decode": 1.0}},
            r"^search\.device_limits=decode: expected decode@ and one",
        ),
        ({"names": ["a"], "reference": {"prefill@a": 1.0}}, r"^search\.reference=prefill@a: "),
    ],
)
def test_settings_that_name_no_device_of_the_search_are_refused(job, message):
    job = dict(job)
    with pytest.raises(InputError, match=message):
        make_job(*job.pop("names"), **job)


@pytest.mark.parametrize("name", ["prefil", "prefill@", "quality@a", "@a", "prefill_ms"])
def test_unknown_objectives_are_refused(name):
    with pytest.raises(InputError, match=r"^objectives="):
        toy.make_settings(objectives=["quality", name])


def test_names_of_devices_are_taken_everywhere():
    job = make_job(
        "a",
        "b",
        objectives=["quality", "prefill@b", "size@a"],
        device_limits={"prefill@b": 3.0},
        weights={"b": 2.0},
        limits=SearchLimits(prefill_ms=5.0),
    )
    assert [device.name for device in job.all_devices] == ["a", "b"]
    keys = [objective.key for objective in job.search.order(Objective.prefill)]
    assert keys == ["loss", "prefill_ms@b", "size_mib@a"]
    assert [Objective.of_key(key).name for key in keys] == ["quality", "prefill@b", "size@a"]
