"""Job of a search: its validated settings, opened inputs, objectives and evaluator."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flash.arch import ArchSpec, SearchSpace, SpaceSettings
from flash.device.base import Device
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase
from flash.errors import InputError, shown, under
from flash.latency.cost_model import Values
from flash.latency.fit import LatencyModel
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.paths import Runs
from flash.prune.importance import fingerprint
from flash.records import digest, plain
from flash.search.devices import joint_limits, limits_by_device, over_devices
from flash.search.evaluate import ShortTraining
from flash.search.fingerprint import space_fingerprint
from flash.search.latencies import (
    of_further_device,
    open_devices,
    placed,
    point_of,
    token_lengths,
)
from flash.search.loop import EvaluationError
from flash.search.objectives import Costs, Objective, Problem, high
from flash.search.quality import Quality
from flash.search.settings import Across, SearchJobSettings, SearchStage
from flash.search.study import Study
from flash.search.tasks import SearchTasks, named_tasks, trained_tokenizer
from flash.training.accelerators import check_devices, main_device
from flash.training.memory import out_of_memory_named
from flash.training.teacher import check_top_k
from flash.training.validation import validate
from flash.workspace import Workspace

log = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True)
class SearchJob:
    """Search whose settings were checked and whose inputs are open."""

    settings: SearchJobSettings
    """Settings of `search.py`."""
    space: SearchSpace
    """Architectures that may be proposed."""
    workspace: Workspace
    """Backbone, text, device and folder of results."""
    identity: dict[str, Any]
    """Settings that must agree for results of trials to be comparable."""
    objectives: tuple[Objective, ...]
    """Objectives to minimize."""
    baseline: ArchSpec
    """Architecture from which the reference point is derived."""
    devices: tuple[Device, ...]
    """All devices, that of the workspace first."""
    tasks: SearchTasks | None
    """Tasks that are objectives; None if there are none."""

    @property
    def folder(self) -> Path:
        """Folder of the study's results."""
        return self.workspace.runs.study(self.settings.search.study)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of trials."""
        return self.folder / "trials"

    def storage(self, name: str) -> Path | str:
        """Return the storage of the study of this name: a SQLite file or a database URL."""
        return self.settings.search.storage or self.workspace.runs.study(name) / "study.db"


def open_workspace(settings: SearchJobSettings) -> Workspace:
    """Open the workspace of a search.

    Raises:
        InputError: The backbone cannot be used.
    """
    return Workspace(
        runs=Runs(Path(settings.runs)),
        backbone=Backbone.open(settings.backbone),
        data_settings=settings.data,
        device_settings=settings.device,
        batch_size=settings.recipe.batch_size,
        seed=settings.seed,
    )


def check(settings: SearchJobSettings) -> None:
    """Check what a search needs, as far as possible before any work.

    Raises:
        InputError: Settings, backbone or text cannot be used.
    """
    workspace = open_workspace(settings)
    space = open_space(settings.space, workspace.backbone.spec)
    _check_vocabularies(space, workspace)
    if settings.stage is not SearchStage.latency:
        _check(settings, space, workspace)


def _check(settings: SearchJobSettings, space: SearchSpace, workspace: Workspace) -> None:
    """Check what the trials of a search need.

    Raises:
        InputError: Settings, backbone or text cannot be used.
    """
    backbone = workspace.backbone
    _baseline(settings.search.baseline, space, backbone.spec)
    if backbone.folder is None:
        backbone.load()  # raises: weights are needed
    if settings.trainer.devices * settings.trainer.nodes > 1:
        raise InputError(
            f"trainer.devices={settings.trainer.devices}: expected 1 for the trials of a search; "
            "start more workers instead"
        )
    check_devices(settings.trainer)
    settings.trainer.accumulation(settings.recipe.batch_size)  # raises: it must be a whole number
    check_top_k(settings.recipe, settings.data, space.vocab_sizes[0])
    workspace.check_data()
    _tasks(settings)


def _tasks(settings: SearchJobSettings) -> SearchTasks | None:
    """Return the tasks that are objectives; None if there are none.

    Raises:
        InputError: A file of a task is missing.
    """
    suite, search = settings.suite, settings.search
    if suite is None or not search.tasks:
        return None
    chosen = named_tasks(suite, search.tasks)
    return SearchTasks(chosen, search.questions, settings.trainer.precision)


def _check_vocabularies(space: SearchSpace, workspace: Workspace) -> None:
    """Check that the vocabularies of a space can be made.

    Raises:
        InputError: One cannot, or there is no text to choose its tokens.
    """
    smaller = {*space.vocab_sizes} - {workspace.backbone.spec.vocab_size}
    for size in sorted(smaller):
        workspace.check_vocabulary(size, "space")
    if smaller:
        workspace.check_data()


def open_job(settings: SearchJobSettings) -> SearchJob:
    """Check the settings of a search and open what it needs.

    Raises:
        InputError: Settings, backbone, text or device cannot be used.
    """
    workspace = open_workspace(settings)
    backbone, search = workspace.backbone, settings.search
    space = open_space(settings.space, backbone.spec)
    _check_vocabularies(space, workspace)
    _check(settings, space, workspace)
    baseline = _baseline(search.baseline, space, backbone.spec)
    assert backbone.folder is not None
    tasks = _tasks(settings)
    if tasks is not None and settings.stage is SearchStage.search and not search.from_study:
        _ = tasks.found  # raises before any work
    backbone.fetch()
    devices = open_devices(settings, workspace)
    identity: dict[str, Any] = {
        **space_fingerprint(space),
        "backbone": fingerprint(backbone.folder),
        "data": workspace.data.identity,
        "recipe": settings.recipe.decisive(),
        "trainer": settings.trainer.decisive(),
        **_identity_of(devices[0]),
        "seed": settings.seed,
    }
    if len(devices) > 1:  # studies of one device have none of these keys
        further: dict[str, Any] = {}
        for place, device in placed(settings, devices):
            if place is not None:
                with of_further_device(place):
                    further[device.settings.name] = _identity_of(device)
        identity |= {"devices": further, "across": search.across.value}
        if search.across is Across.mean:
            identity["weights"] = {d: w for d, w in search.weights.items() if w != 1}
    if tasks is not None:  # studies without tasks have no such key
        identity["tasks"] = tasks.identity(trained_tokenizer(workspace))
    objectives = search.order(Objective.parse(settings.latency.objective.value))
    return SearchJob(settings, space, workspace, identity, objectives, baseline, devices, tasks)


def _identity_of(device: Device) -> dict[str, Any]:
    """Return what decides the latencies of a device."""
    settings = device.settings
    return {
        "device": device.identity(),
        "workload": {**plain(settings.workload), "threads": settings.threads},
        "lowering": settings.lowering.identity(),
    }


def open_space(settings: SpaceSettings, backbone: ArchSpec) -> SearchSpace:
    """Open the space of a search.

    Raises:
        InputError: A size exceeds the backbone's, or is so far below that nearly all of the
            backbone would be cut away.
    """
    space = SearchSpace(settings, backbone)
    for key, values in (
        ("num_layers", space.depths),
        ("model_dim", space.model_dims),
        ("ffn_dim", space.ffn_dims),
    ):
        size = max(backbone.ffn_dims) if key == "ffn_dim" else getattr(backbone, key)
        if 2 * values[-1] < size:
            raise InputError(
                f"space.{key}.max={values[-1]}: expected at least half of the backbone's {size}, "
                "so that candidates inherit more than they lose; `flash new space NAME --backbone "
                "FOLDER` proposes a space for a backbone"
            )
    return space


def _baseline(changes: Mapping[str, Any], space: SearchSpace, backbone: ArchSpec) -> ArchSpec:
    """Return the architecture from which the reference point is derived.

    Raises:
        InputError: An illegal architecture, or one outside the space.
    """
    if not changes:
        return backbone
    with under("search.baseline"):
        spec = ArchSpec.from_dict({**space.base.to_dict(), **changes})
    reason = space.violated_rule(spec)
    if reason is not None:
        raise InputError(
            f"search.baseline={shown(dict(changes))}: expected a member of space "
            f"{space.settings.name}: {reason}"
        )
    return spec


def problem_of(job: SearchJob, study: Study, latencies: Mapping[str, LatencyModel]) -> Problem:
    """Build the problem; the quality of the baseline is found once and stored with the study.

    Raises:
        InputError: The baseline cannot be trained.
    """
    settings, backbone = job.settings, job.workspace.backbone
    learned = _baseline_quality(job, study)
    lengths, search = token_lengths(job.space, job.workspace), settings.search
    by_device = {
        device.settings.name: _costs(latencies[device.settings.name], device.settings, lengths)
        for device in job.devices
    }
    costs = over_devices(by_device, backbone.spec, search.across, search.weights)
    limits = limits_by_device(search.limits.given(), search.device_limits, [*by_device])
    baseline, whole = (
        {key: float(v[0]) for key, v in costs([spec]).items()}
        for spec in (job.baseline, backbone.spec)
    )
    return Problem(
        costs=costs,
        objectives=job.objectives,
        reference=search.worst(
            job.objectives,
            {**learned, **baseline},
            joint_limits(limits, whole, search.across, search.weights),
        ),
        limits=limits,
        headline=Objective.parse(settings.latency.objective.value).key,
    )


def _baseline_quality(job: SearchJob, study: Study) -> dict[str, float]:
    """Return the loss and the errors in tasks of the baseline, by key of `Objective`.

    Those of the backbone, as it is, are stored too, as reports show them.

    Raises:
        InputError: The baseline cannot be trained.
    """
    backbone, precision = job.workspace.backbone, job.settings.trainer.precision
    asked, tasks = cache(lambda: _asked(job)), [o.key for o in job.objectives if o.task is not None]
    with out_of_memory_named(job.settings.recipe, job.settings.trainer):
        loss = study.remember(
            "backbone_quality", lambda: plain(validate(_load(job), job.workspace.data, precision))
        )["loss"]
        errors: dict[str, Any] = {
            key: study.remember(f"backbone_{key}", lambda key=key: asked()[key]) for key in tasks
        }
    if job.baseline != backbone.spec:
        trained, name = cache(lambda: _trained_baseline(job)), digest(job.baseline.to_dict())
        loss = study.remember(f"baseline_{name}", lambda: trained().loss)
        errors = {
            key: study.remember(
                f"baseline_{name}_{key}", lambda key=key: plain(trained().errors[key])
            )
            for key in errors
        }
    return {Objective.quality.key: loss, **{key: each["pct"] for key, each in errors.items()}}


def _load(job: SearchJob) -> Decoder:
    """Load the backbone to the device that it is to be evaluated on."""
    return job.workspace.backbone.load().to(main_device(job.settings.trainer))


def _asked(job: SearchJob) -> dict[str, Any]:
    """Return the errors of the backbone in the tasks, as plain JSON values."""
    assert job.tasks is not None
    start = time.perf_counter()
    errors = job.tasks.ask(_load(job), trained_tokenizer(job.workspace))
    for key, error in errors.items():
        log.info("backbone: %s %.1f, %d questions", key, error.pct, error.questions)
    log.info("the questions take the backbone %.0f s", time.perf_counter() - start)
    return plain(errors)


def _trained_baseline(job: SearchJob) -> Quality:
    """Train the baseline as a trial is.

    Raises:
        InputError: The baseline cannot be trained.
    """
    try:
        found = evaluation_of(job, None, [job.baseline.vocab_size])(job.baseline, -1)
        if not math.isfinite(found.loss):
            raise EvaluationError(f"its loss is {found.loss}")
        return found
    except EvaluationError as error:
        raise InputError(
            f"search.baseline={job.baseline}: expected one that can be trained ({error})"
        ) from error


def _costs(latency: LatencyModel, device: DeviceSettings, lengths: Mapping[int, float]) -> Costs:
    """Return the function that computes the known objectives of candidates.

    Latencies are those of a text: of the tokens that the first prompt has in the candidate's
    vocabulary, and of as many decode steps as write what one token of the backbone's does.

    Args:
        latency: Fitted predictors.
        device: Settings of device and program.
        lengths: Tokens of each vocabulary for one of the backbone's.
    """
    lowering, workload = device.lowering, device.workload
    phases = dict.fromkeys(point.phase for point in workload.points)

    def predict(phase: Phase, specs: Sequence[ArchSpec]) -> tuple[Values, Values]:
        others = sorted({spec.vocab_size for spec in specs} - lengths.keys())
        if others:
            raise InputError(
                f"space.vocab_size={[*lengths]}: expected {others}, too, as the trials have them"
            )
        mean, upper = np.empty(len(specs)), np.empty(len(specs))
        for size, length in lengths.items():
            mine = [i for i, spec in enumerate(specs) if spec.vocab_size == size]
            if mine:
                predictor = latency.predictors[point_of(workload, phase, length)]
                interval = predictor.predict([specs[i] for i in mine])
                steps = length if phase is Phase.decode else 1
                mean[mine], upper[mine] = interval.mean * steps, interval.high * steps
        return mean, upper

    def costs(specs: Sequence[ArchSpec]) -> dict[str, np.ndarray]:
        specs = [spec.as_program() for spec in specs]
        size = np.array([lowering.weight_bytes(spec) for spec in specs]) / _MIB
        cache = np.array([lowering.cache_bytes(spec) for spec in specs]) / _MIB
        predicted = {}
        for phase in phases:
            key = Objective.parse(phase.value).key
            predicted[key], predicted[high(key)] = predict(phase, specs)
        return {**predicted, "size_mib": size, "memory_mib": size + cache}

    return costs


def evaluation_of(
    job: SearchJob, folder: Path | None, vocab_sizes: Sequence[int] | None = None
) -> ShortTraining:
    """Return the evaluator of trials, which keeps its checkpoints in `folder`.

    Text and teacher are made for `vocab_sizes`; None makes those of all members of the space.
    """
    settings, workspace = job.settings, job.workspace
    return ShortTraining(
        workspace,
        workspace.importance(settings.recipe.calibration_tokens),
        settings.recipe,
        settings.trainer,
        settings.seed,
        folder,
        vocab_sizes=vocab_sizes or job.space.vocab_sizes,
        tasks=job.tasks,
    )
