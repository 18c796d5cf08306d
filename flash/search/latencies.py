"""Stage 1 of a search: the latencies of each of its devices."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from flash.arch import SearchSpace
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError
from flash.latency.fit import LatencyModel, collect
from flash.latency.store import MeasurementStore
from flash.search.settings import SearchJobSettings
from flash.workspace import Workspace


def open_devices(settings: SearchJobSettings, workspace: Workspace) -> tuple[Device, ...]:
    """Open all devices of a search, that of the workspace first.

    Raises:
        InputError: Connection settings that cannot be used.
    """
    devices = [workspace.device]
    for place, device in settings.devices.items():
        with of_further_device(place):
            devices.append(open_device(device))
    return tuple(devices)


def placed(
    settings: SearchJobSettings, devices: Sequence[Device]
) -> Iterator[tuple[str | None, Device]]:
    """Iterate over all devices with their key in `devices`; None for the first one."""
    return zip((None, *settings.devices), devices, strict=True)


@contextmanager
def of_further_device(place: str | None) -> Iterator[None]:
    """Name the key of a further device in errors that name that of the first.

    Args:
        place: Key of the device in `devices`; None is the first one.
    """
    try:
        yield
    except InputError as error:
        text = str(error)
        if place is not None and text.startswith("device."):
            error.args = (f"devices.{place}.{text.removeprefix('device.')}",)
        raise


def latencies_of(
    settings: SearchJobSettings,
    space: SearchSpace,
    workspace: Workspace,
    devices: Sequence[Device],
) -> dict[str, LatencyModel]:
    """Run stage 1: measure latencies that the store lacks and fit the predictors of each device.

    The first prompt is a text: with a choice of vocabularies it is timed with the number of tokens
    that it has in each. The predictors of further devices start from those of the first one.

    Args:
        settings: Settings of the search.
        space: Architectures whose latencies are predicted.
        workspace: Backbone, text and folder of results.
        devices: All devices.

    Returns:
        Predictors by the name of the device, in the order of `devices`.

    Raises:
        InputError: The program's context is too short for the longest prompt.
    """
    runs, lengths = workspace.runs, token_lengths(space, workspace)
    workloads = []
    for place, device in placed(settings, devices):  # all are checked before any work
        with of_further_device(place):
            workloads.append(_workload(device.settings, lengths))
            device.identity()
    models: dict[str, LatencyModel] = {}
    for (place, device), workload in zip(placed(settings, devices), workloads, strict=True):
        with of_further_device(place):
            models[device.settings.name] = collect(
                space=space,
                backbone=workspace.backbone.spec,
                device=device,
                workload=workload,
                lowering=device.settings.lowering,
                settings=settings.latency,
                store=MeasurementStore(runs.measurements),
                cache_dir=runs.lowered,
                seed=settings.seed,
                first=next(iter(models.values()), None),
            )
    return models


def token_lengths(space: SearchSpace, workspace: Workspace) -> dict[int, float]:
    """Tokens of each vocabulary that write what one token of the backbone's does, on held-out text.

    No text is read if there is only the backbone's.
    """
    whole = workspace.backbone.spec.vocab_size
    lengths = {whole: 1.0}
    for size in sorted(set(space.vocab_sizes) - {whole}):
        cut = workspace.for_vocabulary(size, "space")
        lengths[size] = workspace.data.bytes_per_token / cut.data.bytes_per_token
    return lengths


def headline(settings: SearchJobSettings, length: float) -> str:
    """Name of the latency that is minimized, for a vocabulary of this length."""
    return point_of(settings.device.workload, settings.latency.objective, length).name


def point_of(workload: Workload, phase: Phase, length: float) -> Point:
    """First point of a phase; a prompt has as many tokens as its text with this length."""
    if phase is Phase.prefill:
        return Point(phase, round(workload.prompts[0] * length))
    return Point(phase, workload.contexts[0])


def _workload(device: DeviceSettings, lengths: Mapping[int, float]) -> Workload:
    """Workload with the first prompt in each vocabulary; the backbone's comes first.

    Raises:
        InputError: The context is too short for the longest one.
    """
    workload = device.workload
    if not workload.prompts:
        return workload
    prompts = [point_of(workload, Phase.prefill, length).tokens for length in lengths.values()]
    for size, tokens in zip(lengths, prompts, strict=True):
        if tokens > device.lowering.max_context:
            raise InputError(
                f"device.lowering.max_context={device.lowering.max_context}: expected at least "
                f"{tokens}, since the first prompt has so many tokens with "
                f"space.vocab_size={size}"
            )
    return replace(workload, prompts=list(dict.fromkeys([*prompts, *workload.prompts])))
