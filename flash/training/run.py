"""Entry point of `train.py`: prune the backbone to an architecture, train it, save it."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from flash.arch import ArchSpec, count_parameters
from flash.errors import InputError, under
from flash.model.backbone import Backbone
from flash.model.checkpoint import build, load
from flash.model.decoder import Decoder
from flash.outcome import note
from flash.paths import Runs
from flash.prune.importance import fingerprint
from flash.prune.pruning import prune
from flash.ranks import is_main_process
from flash.records import digest, plain
from flash.rounding.calibration import check_calibration
from flash.rounding.decoder import begin_by_outputs
from flash.rounding.fake import fake_quantize, settle
from flash.tracking.artifacts import Artifact, ArtifactKind, weights_artifact
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.origin import Origin, find_origin
from flash.tracking.settings import LoggerKind
from flash.tracking.tracker import open_tracker
from flash.training.accelerators import check_devices, main_device, wait_for_others
from flash.training.checkpoints import checkpoint_folder, checkpoint_spec
from flash.training.logger import TrackerLogger
from flash.training.result import LAST, TrainResult
from flash.training.settings import RecipeSettings, TrainSettings
from flash.training.teacher import check_top_k, teacher_of
from flash.training.validation import validate
from flash.workspace import Workspace, arch_of, one_at_a_time, result_name

log = logging.getLogger(__name__)


def spec_of(settings: TrainSettings, backbone: Backbone) -> ArchSpec:
    """Return the architecture to train.

    Raises:
        InputError: The backbone cannot be pruned to it, or the checkpoint `start` has another one.
    """
    if settings.start is None:
        return arch_of(settings.arch, backbone)
    found = checkpoint_spec("start", Path(settings.start))
    if settings.arch:
        wanted = arch_of(settings.arch, backbone)
        if found != wanted:
            raise InputError(
                f"start={settings.start}: holds arch {found}: expected {wanted}, as +arch says; "
                "leave +arch out, or start from another checkpoint"
            )
    return found


def initial_model(
    spec: ArchSpec, workspace: Workspace, recipe: RecipeSettings, start: str | None = None
) -> Decoder:
    """Build a decoder of `spec` with the weights before training.

    They come from the folder `start` or, if it is None, from the backbone by pruning. They are
    random if the backbone has no weights, or `recipe.inherit` is false.
    """
    backbone = workspace.backbone
    if start is not None:
        return load(Path(start))
    if backbone.folder is None or not recipe.inherit:
        return Decoder(spec)
    if spec == backbone.spec:
        return backbone.load()
    importance = workspace.importance(recipe.calibration_tokens)
    return build(spec, prune(backbone.folder, importance, spec), str(backbone.folder))


def _key(settings: TrainSettings, spec: ArchSpec, workspace: Workspace) -> str:
    folder = workspace.backbone.folder if settings.recipe.inherit else None
    decisive = {
        "spec": spec.to_dict(),
        "recipe": settings.recipe.decisive(),
        "trainer": settings.trainer.decisive(),
        "data": workspace.data.identity,
        "backbone": fingerprint(folder) if folder else "random",
        "seed": settings.seed,
    }
    if settings.start is not None:
        decisive["start"] = fingerprint(Path(settings.start))
    return digest(decisive)


def check(settings: TrainSettings) -> None:
    """Check all stages as far as possible before any work: no text or weights are read.

    Raises:
        InputError: Settings, backbone or data cannot be used, or a stored result is damaged.
    """
    backbone = Backbone.open(settings.backbone)
    runs, stages = Runs(Path(settings.runs)), _stages(settings)
    spec = spec_of(stages[0], backbone)
    check_devices(settings.trainer)
    for key, stage in zip(["", *settings.then], stages, strict=True):
        with under(f"then.{key}") if key else nullcontext():
            settings.trainer.accumulation(stage.recipe.batch_size)  # checks that it is divisible
            if stage.recipe.qat:
                tokens = stage.recipe.qat_calibration_tokens
                check_calibration("recipe.qat_calibration_tokens", tokens, spec)
            if backbone.folder is not None and stage.recipe.inherit:
                check_top_k(stage.recipe, stage.data, spec.vocab_size)
            workspace = _workspace(stage, backbone)
            workspace.check_vocabulary(spec.vocab_size, inherits=stage.start is None)
            workspace.check_data()
    for stage in stages:
        TrainResult.read(runs.model(result_name(stage)))


def _workspace(settings: TrainSettings, backbone: Backbone) -> Workspace:
    return Workspace(
        runs=Runs(Path(settings.runs)),
        backbone=backbone,
        data_settings=settings.data,
        model_folder=Path(settings.start) if settings.start is not None else None,
        batch_size=settings.recipe.batch_size,
        seed=settings.seed,
    )


def train(settings: TrainSettings) -> TrainResult:
    """Train a model, stage by stage; stages that are finished are not repeated.

    Returns:
        The result of the last stage.

    Raises:
        InputError: Settings, backbone or data cannot be used.
    """
    check(settings)
    stages = _stages(settings)
    return [_train_stage(stage, stages[i + 1 :]) for i, stage in enumerate(stages)][-1]


def _stages(settings: TrainSettings) -> list[TrainSettings]:
    """Return the settings of each stage: first `settings` itself, then those of `then`."""

    def scaled(recipe: RecipeSettings) -> RecipeSettings:
        counts = {
            name: max(1, round(getattr(recipe, name) * settings.scale))
            for name in ("tokens", "calibration_tokens")
        }
        return dataclasses.replace(recipe, **counts)

    runs, start = Runs(Path(settings.runs)), settings.start
    if start is not None:
        start = str(checkpoint_folder("start", start, runs))
    recipe = scaled(settings.recipe)
    first = dataclasses.replace(settings, recipe=recipe, start=start, then={}, scale=1.0)
    stages = [first]
    for key, stage in settings.then.items():
        before = result_name(stages[-1])
        stages.append(
            dataclasses.replace(
                first,
                recipe=scaled(stage.recipe),
                data=stage.data,
                arch={},
                start=str(runs.model(before) / "checkpoint"),
                name=f"{before}_{key}",
            )
        )
    return stages


def _train_stage(settings: TrainSettings, later: Sequence[TrainSettings]) -> TrainResult:
    """Train one stage, unless it is finished.

    Args:
        settings: Settings of the stage.
        later: Those of the stages that will start from its result.
    """
    backbone = Backbone.open(settings.backbone)
    spec = spec_of(settings, backbone)
    name = result_name(settings)
    if not settings.recipe.inherit:
        log.info("training %s from random weights, as recipe.inherit=false says", name)
    elif backbone.folder is None:
        log.warning(
            "backbone %s has no weights: training %s%s, without a teacher (give "
            "backbone.weights=FOLDER to inherit)",
            backbone.name,
            name,
            " from random weights" if settings.start is None else "",
        )
        alone = {"kd_weight": 0.0, "kd_top_k": None, "kd_top_p": None}
        settings.recipe = dataclasses.replace(settings.recipe, **alone)
    if settings.recipe.inherit:
        backbone.fetch()
    workspace = _workspace(settings, backbone)
    if settings.start is None or settings.recipe.kd_weight > 0:  # it needs the backbone
        workspace = workspace.for_vocabulary(spec.vocab_size)
    key = _key(settings, spec, workspace)
    with one_at_a_time(workspace.runs.model(name), name):
        return _train_once(settings, name, spec, workspace, key, later)


def _train_once(
    settings: TrainSettings,
    name: str,
    spec: ArchSpec,
    workspace: Workspace,
    key: str,
    later: Sequence[TrainSettings],
) -> TrainResult:
    """Train, or return the result of the same earlier training."""
    runs = workspace.runs
    folder = runs.model(name)
    result = TrainResult.read(folder)
    saved = (folder / "checkpoint" / "model.safetensors").is_file()
    if result is not None and result.key == key and saved:
        log.info("%s is finished: %s", name, result.summary)
        note(result.change, again=True)
        return result
    if not settings.overwrite:
        found = [result, *(TrainResult.read(runs.model(result_name(each))) for each in later)]
        _require_free(runs, key, [each for each in found if each is not None])
    result = _train(settings, name, spec, workspace, key)
    if result is not None:
        result.write(folder)
        (folder / "checkpoints" / key / LAST).unlink(missing_ok=True)
        log.info("%s: %s -> %s", name, result.summary, folder / "checkpoint")
        note(result.change)
    wait_for_others()  # a further stage may start from this result
    result = TrainResult.read(folder)
    assert result is not None
    return result


def _require_free(runs: Runs, key: str, found: Sequence[TrainResult]) -> None:
    """Check that no finished training would be replaced.

    Args:
        runs: Layout of the folder of results.
        key: Key of the training that begins.
        found: Results of that name, and of the stages after it, which have other weights then.

    Raises:
        InputError: One of them would be.
    """
    for result in found:
        if result.key != key:
            raise InputError(
                f"{runs.model(result.name)}: holds a finished training of other settings, text or "
                "weights; overwrite=true replaces it, name=NEW keeps both"
            )


def _train(
    settings: TrainSettings, name: str, spec: ArchSpec, workspace: Workspace, key: str
) -> TrainResult | None:
    """Train and save the model; return its result, or None outside the main process."""
    from lightning import seed_everything  # takes seconds; a finished run has no use for it

    from flash.training.fit import fit

    seed_everything(settings.seed, verbose=False)
    recipe, precision = settings.recipe, settings.trainer.precision
    data, runs = workspace.data, workspace.runs
    model = initial_model(spec, workspace, recipe, settings.start)
    if recipe.qat:
        scales = None
        if recipe.qat_calibration_tokens:
            scales = begin_by_outputs(
                model,
                recipe.qat_format,
                rotate=recipe.qat_rotate,
                calibration=torch.cat(
                    list(data.calibration_batches(recipe.qat_calibration_tokens))
                ),
            )
        # Both held-out losses are those of the fake-quantized model.
        fake_quantize(model, recipe.qat_format, rotate=recipe.qat_rotate, scales=scales)
    teacher = teacher_of(workspace.backbone, data, recipe, settings.trainer, runs)
    device = main_device(settings.trainer)
    before = None
    if is_main_process():
        before = validate(model.to(device), data, precision)
        log.info("%s: %s, held-out loss %.3f before training", name, spec, before.loss)
    folder = runs.model(name)
    info = _run_info(settings, name, spec, key)
    with open_tracker(settings.logger, runs.logs, info) as tracker:
        for artifact in _inputs(settings, spec, workspace, info.origin):
            tracker.use(artifact)
        done = fit(
            model,
            data,
            recipe,
            settings.trainer,
            teacher=teacher,
            # The path contains the key, so that other settings do not resume from these.
            folder=folder / "checkpoints" / key,
            loggers=False if settings.logger.kind is LoggerKind.none else TrackerLogger(tracker),
            label=name,
        )
        if before is None:
            return None
        settle(model)
        after = validate(model.to(device), data, precision)
        _warn_if_worse(name, recipe.lr, done.tokens, before.loss, after.loss)
        parameters = count_parameters(spec).total
        result = TrainResult(name, spec, parameters, before, after, done, key, plain(settings))
        tracker.log(_metrics(result), done.steps)
        TrainResult.remove(folder)  # a result is never beside weights of another training
        rounding = recipe.trained_rounding
        metadata = rounding.to_metadata() if rounding is not None else None
        workspace.save_model(folder / "checkpoint", model, metadata)
        tracker.publish(Artifact(ArtifactKind.checkpoint, name, folder / "checkpoint"))
    return result


def _run_info(settings: TrainSettings, name: str, spec: ArchSpec, key: str) -> RunInfo:
    runs, backbone = Runs(Path(settings.runs)), settings.backbone.name
    return RunInfo(
        job=JobType.train,
        name=name,
        key=key,
        group=backbone,
        tags={"backbone": backbone, "recipe": settings.recipe.name, "arch": name},
        config={**plain(settings), "spec": spec.to_dict()},
        origin=find_origin(runs, name, spec),
        folder=runs.model(name),
    )


def _inputs(
    settings: TrainSettings, spec: ArchSpec, workspace: Workspace, origin: Origin | None
) -> Iterator[Artifact]:
    """Iterate over the artifacts that initial weights, teacher and architecture come from."""
    backbone, start, recipe = workspace.backbone, settings.start, settings.recipe
    inherits = start is None and recipe.inherit
    if start is not None:
        yield weights_artifact(Path(start), backbone.name, backbone.folder)
    if backbone.folder is not None and (inherits or recipe.kd_weight > 0):
        yield weights_artifact(backbone.folder, backbone.name, backbone.folder)
    if backbone.folder is not None and inherits and spec != backbone.spec:
        path = workspace.importance_path(recipe.calibration_tokens)
        yield Artifact(ArtifactKind.importance, backbone.name, path)
    if origin is not None:
        yield origin.artifact


_NOISE = 0.01
"""Difference of held-out losses that says nothing about a recipe [nats per token]."""


def _warn_if_worse(name: str, lr: float, tokens: int, before: float, after: float) -> None:
    """Warn of a training that has made the weights worse than they were."""
    if after > before + _NOISE:
        log.warning(
            "%s: held-out loss %.3f -> %.3f, worse than before training; recipe.lr=%g may be too "
            "high for these weights and %s tokens, try recipe.lr=%g",
            name,
            before,
            after,
            lr,
            f"{tokens:,}",
            lr / 10,
        )


def _metrics(result: TrainResult) -> dict[str, float]:
    """Figures of a finished run for its logger."""
    return {
        "val/loss": result.after.loss,
        "val/loss_before": result.before.loss,
        "val/loss_after": result.after.loss,
        "val/bits_per_byte": result.after.bits_per_byte,
        "parameters": result.parameters,
        "train/tokens": result.fit.tokens,
    }
