"""Printed result of a search: its frontier as a table, and the names of its winners."""

from typing import Any

from flash.arch import ArchSpec, count_parameters
from flash.outcome import note
from flash.records import write_text
from flash.search.devices import device_table, key_on, share_on, slowest_device
from flash.search.job import SearchJob
from flash.search.latencies import headline, token_lengths
from flash.search.objectives import Objective
from flash.terminal import table, wrap

_INTERVAL = ("mean_ms", "low_ms", "high_ms")


def print_frontier(job: SearchJob, report: dict[str, Any]) -> None:
    """Print the frontier, and write the file `winners`."""
    by_number = {trial["number"]: trial for trial in report["trials"]}
    failed = sum(trial["state"] == "fail" for trial in report["trials"])
    objective = report["objective"]
    times = _times_by_device if report["devices"] else _interval
    names = [f"{name} ms" for name in report["devices"]] or [f"{objective} ms [90 %]"]
    tasks = [key for key in report["objectives"] if Objective.of_key(key).task is not None]
    errors = [f"{Objective.of_key(key).task} wrong %" for key in tasks]
    rows = [["arch", "loss", *errors, *names, "params", "pattern"]]
    for number in report["frontier"]:
        spec = ArchSpec.from_dict(by_number[number]["spec"])
        rows.append([
            f"{report['names'][str(number)]}{'*' if number in report['winners'] else ''}",
            f"{by_number[number]['loss']:.3f}",
            *(_error_text(by_number[number]["errors"][key]) for key in tasks),
            *times(job, report, by_number[number], spec),
            f"{count_parameters(spec).total / 1e6:.2f}M",
            job.space.describe(spec),
        ])
    if report["devices"]:
        print(
            wrap(
                f"\n{objective} on each device in ms, and as a share of the backbone's; < marks "
                "the device on which a model is the slowest against the backbone"
            )
        )
    print(f"\nfrontier of {len(by_number)} trials ({failed} failed), fastest first; * = winner\n")
    print(table(rows))
    _print_prices(report)
    winners = winner_names(report)
    note(
        f"{len(by_number)} trials ({failed} failed), {len(report['frontier'])} on the frontier, "
        f"{len(winners)} winners"
    )
    write_text(job.folder / "winners", ",".join(winners) + "\n")
    if not winners:
        print(
            wrap(
                "\nno winner: no trial is better than the reference point in every objective; "
                f"raise search.trials, or {_reference_keys(report)}"
            )
        )


def _reference_keys(report: dict[str, Any]) -> str:
    """Name the settings that the reference point follows from."""
    found = [Objective.of_key(key) for key in report["objectives"]]
    keys = ["max_loss_increase"] if Objective.quality in found else []
    keys += ["max_error_increase"] if any(each.task is not None for each in found) else []
    return "search." + " or ".join([*keys, "max_cost_ratio"])


def _error_text(error: dict[str, Any]) -> str:
    """Write the error in a task with its standard error."""
    stderr = error["stderr_pct"]
    return f"{error['pct']:.1f}" + ("" if stderr is None else f" +- {stderr:.1f}")


def _print_prices(report: dict[str, Any]) -> None:
    """Print what one model for several devices costs on each of them."""
    columns, lines = device_table(report)
    if not lines:
        return
    places = [i for i, column in enumerate(columns) if column.endswith("price [nats]")]
    rows = [["winner", *(columns[i].removesuffix(" price [nats]") for i in places)]]
    rows += [[line[0], *(f"{line[i]:.3f}" for i in places)] for line in lines[1:]]
    print(
        wrap(
            "\nprice of one model for all, in nats: the loss above that of the best trial that is "
            "no slower on the device\n"
        )
    )
    print(table(rows))


def _interval(
    job: SearchJob, report: dict[str, Any], trial: dict[str, Any], spec: ArchSpec
) -> list[str]:
    """Return the headline latency of a member of the frontier, with its interval."""
    length = token_lengths(job.space, job.workspace)[spec.vocab_size]
    point = headline(job.settings, length)
    target = report["predicted"][str(trial["number"])][point]
    steps = length if point.startswith("decode") else 1
    return ["{:.1f} [{:.1f}, {:.1f}]".format(*(steps * target[key] for key in _INTERVAL))]


def _times_by_device(
    job: SearchJob, report: dict[str, Any], trial: dict[str, Any], spec: ArchSpec
) -> list[str]:
    """Return the headline latency of a member of the frontier on each device."""
    key = Objective.parse(job.settings.latency.objective.value).key
    costs, whole = trial["costs"], report["backbone"]["costs"]
    slowest = slowest_device(costs, whole, key)
    cells = []
    for device in report["devices"]:
        ms, share = costs[key_on(key, device)], share_on(costs, whole, key, device)
        cells.append(f"{ms:.1f} ({share:.0%}){'<' if device == slowest else ''}")
    return cells


def winner_names(report: dict[str, Any]) -> list[str]:
    """Names of the winners in the content of `frontier.json`, in the order of their trials."""
    return [report["names"][str(number)] for number in sorted(report["winners"])]
