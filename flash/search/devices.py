"""Several devices in one search: one figure for all of them, from those of each.

Devices differ in speed, so their latencies are compared as shares: a latency over that of the
backbone on the same device. Shares are put together as the largest or as a weighted mean, and given
in ms of the first device, so that a search on one device and one on several have the same units.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.arch import ArchSpec
from flash.device.workload import Point
from flash.search.objectives import Costs, Objective, Quantity, high, limited_value
from flash.search.settings import Across

_LATENCIES = (Quantity.prefill, Quantity.decode)
_SIZES = (Quantity.size, Quantity.memory)


def over_devices(
    costs: Mapping[str, Costs], backbone: ArchSpec, across: Across, weights: Mapping[str, float]
) -> Costs:
    """Return the function that computes the costs over all devices, and those of each.

    Sizes differ where devices have programs in different formats; over all devices they are the
    largest ones.

    Args:
        costs: Costs on each device by its name, the first device first; of one device alone they
            are returned as they are.
        backbone: Architecture that shares refer to.
        across: How shares are put together.
        weights: Weights of the devices in a mean; a device without one has 1.
    """
    first, *others = costs
    if not others:
        return costs[first]
    at_backbone = {device: each([backbone]) for device, each in costs.items()}

    def compute(specs: Sequence[ArchSpec]) -> dict[str, NDArray[np.float64]]:
        by_device = {device: each(specs) for device, each in costs.items()}
        found: dict[str, NDArray[np.float64]] = {}
        for quantity in (each.value for each in _LATENCIES):
            for key in (quantity, high(quantity)):
                if key not in by_device[first]:
                    continue
                shares = {d: by_device[d][key] / at_backbone[d][quantity] for d in costs}
                found[key] = _joined(shares, across, weights) * at_backbone[first][quantity]
        for key in (quantity.value for quantity in _SIZES):
            found[key] = np.max([each[key] for each in by_device.values()], axis=0)
        for device, each in by_device.items():
            found |= {key_on(key, device): values for key, values in each.items()}
        return found

    return compute


def _joined(
    shares: Mapping[str, Any], across: Across, weights: Mapping[str, float]
) -> NDArray[np.float64]:
    """Put the shares on each device together: the largest, or the weighted mean."""
    values = np.array(list(shares.values()))
    if across is Across.max:
        return values.max(axis=0)
    return np.average(values, axis=0, weights=[weights.get(device, 1.0) for device in shares])


def key_on(key: str, device: str) -> str:
    """Return the key of a cost on one of several devices: `prefill_ms` -> `prefill_ms@board`."""
    return f"{key}@{device}"


def devices_in(costs: Mapping[str, object]) -> list[str]:
    """Return the names of the devices whose costs are there; none if there is one device alone."""
    return list(dict.fromkeys(key.partition("@")[2] for key in costs if "@" in key))


def share_on(
    costs: Mapping[str, float], backbone: Mapping[str, float], key: str, device: str
) -> float:
    """Return a latency on one of several devices as a share of the backbone's."""
    return costs[key_on(key, device)] / backbone[key_on(key, device)]


def slowest_device(
    costs: Mapping[str, float], backbone: Mapping[str, float], key: str
) -> str | None:
    """Return the device on which a model is slowest against the backbone; None for one device.

    Args:
        costs: Costs of the model.
        backbone: Costs of the backbone.
        key: Key of a latency.
    """
    shares = {device: share_on(costs, backbone, key, device) for device in devices_in(costs)}
    return max(shares, key=shares.__getitem__) if shares else None


def price(
    key: str, loss: float, costs: Mapping[str, float], others: Iterable[tuple[float, float]]
) -> float:
    """Return what a model loses on a device by being designed for others too [nats a token].

    It is the loss above that of the best candidate that is no slower there: a candidate of the same
    search, so a search for this device alone may find a better one.

    Args:
        key: Key of the latency on the device.
        loss: Loss of the model [nats a token].
        costs: Costs of the model.
        others: Loss and latency on the device of the candidates [nats a token, ms].
    """
    return loss - min([loss, *(other for other, ms in others if ms <= costs[key])])


def device_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows that compare the devices: the backbone, then the winners.

    Of each device there are the headline latency, its share of the backbone's and the `price`.

    Args:
        report: Content of `frontier.json`; without `devices` the table is empty.
    """
    devices, whole = [*report.get("devices", {})], report["backbone"]["costs"]
    if not devices:
        return [], []
    key = f"{Point.parse(report['objective']).phase.value}_ms"
    columns = ["model", "loss"]
    for device in devices:
        columns += [f"{device} [ms]", f"{device} [% of backbone]", f"{device} price [nats]"]
    complete = [trial for trial in report["trials"] if trial["state"] == "complete"]
    by_number = {trial["number"]: trial for trial in complete}
    kept = {
        device: [
            each for each in complete if within_limits(each["costs"], report["limits"], device)
        ]
        for device in devices
    }
    rows: list[list[Any]] = []
    for number in report["winners"]:
        costs, loss = by_number[number]["costs"], by_number[number]["loss"]
        row = [report["names"][str(number)], loss]
        for device in devices:
            here = key_on(key, device)
            others = [(trial["loss"], trial["costs"][here]) for trial in kept[device]]
            share = share_on(costs, whole, key, device)
            row += [costs[here], 100 * share, price(here, loss, costs, others)]
        rows.append([*row, slowest_device(costs, whole, key)])
    about = report["backbone"]
    same = [part for device in devices for part in (whole[key_on(key, device)], 100.0, None)]
    return [*columns, "slowest on"], [[about["name"], about["quality"]["loss"], *same, None], *rows]


def within_limits(costs: Mapping[str, float], limits: Mapping[str, float], device: str) -> bool:
    """Return True if the costs obey the limits of one of several devices."""
    return all(
        limited_value(costs, key) <= limit
        for key, limit in limits.items()
        if key.endswith(f"@{device}")
    )


def joint_limits(
    limits: Mapping[str, float],
    backbone: Mapping[str, float],
    across: Across,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Return what limits of each device mean for the figures over all devices.

    A figure that has no limit on one of the devices has none.

    Args:
        limits: Limits by key of `Costs`, as `limits_by_device` returns them.
        backbone: Costs of the backbone.
        across: How shares are put together.
        weights: Weights of the devices in a mean.
    """
    devices, found = devices_in(backbone), dict(limits)
    for quantity in (*_LATENCIES, *_SIZES):
        keys = {device: key_on(quantity.value, device) for device in devices}
        if not devices or any(key not in limits for key in keys.values()):
            continue
        if quantity in _SIZES:
            found[quantity.value] = max(limits[key] for key in keys.values())
            continue
        shares = {device: limits[key] / backbone[key] for device, key in keys.items()}
        share = float(_joined(shares, across, weights))
        found[quantity.value] = share * backbone[keys[devices[0]]]
    return found


def limits_by_device(
    common: Mapping[str, float], own: Mapping[str, float], devices: Sequence[str]
) -> dict[str, float]:
    """Return the limits of each device by key of `Costs`.

    Args:
        common: Limits that hold on every device, by key of `Objective`.
        own: Limits on one device by name of the objective, which take the place of common ones.
        devices: Names of all devices; with one alone the keys have no device.
    """
    if len(devices) == 1:
        return dict(common)
    every = {key_on(key, device): limit for device in devices for key, limit in common.items()}
    return {**every, **{Objective.parse(name).key: limit for name, limit in own.items()}}
