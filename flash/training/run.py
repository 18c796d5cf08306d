"""`train.py`: an architecture, weights inherited from the backbone, trained and saved."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer

from flash.arch import ArchSpec, count_parameters
from flash.data.module import PackedData, find_tokenizer
from flash.data.settings import DataSettings
from flash.data.tokenizer import end_of_text_id, load_tokenizer
from flash.errors import InputError, under
from flash.model.backbone import Backbone
from flash.model.checkpoint import build, load, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.quantization import fake_quantize
from flash.model.settings import BackboneSettings
from flash.paths import Runs, digest
from flash.prune.importance import Importance, cached_scores, fingerprint
from flash.prune.pruning import check_fits, prune
from flash.ranks import is_main_process
from flash.training.distributed import check_devices, main_device, wait_for_others
from flash.training.fit import fit, validate
from flash.training.loggers import close_logger, make_logger
from flash.training.result import TrainResult
from flash.training.settings import RecipeSettings, TrainSettings
from flash.training.teacher import check_top_k, teacher_of

log = logging.getLogger(__name__)


def plain(settings: Any) -> Any:
    """Settings as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=lambda value: value.value))


def arch_of(changes: Mapping[str, Any], backbone: Backbone) -> ArchSpec:
    """The backbone's architecture with `changes`.

    Raises:
        InputError: An unknown key, an illegal value, a stock baseline, or a spec that cannot be cut
            from it.
    """
    if "stock" in changes:
        raise InputError(
            f"arch.stock={changes['stock']}: expected an architecture of ours; stock baselines "
            "have a latency but no weights, see `export.py model=random`"
        )
    with under("arch"):
        spec = ArchSpec.from_dict({**backbone.spec.to_dict(), **changes})
    check_fits(spec, backbone.spec)
    return spec


def spec_of(settings: TrainSettings, backbone: Backbone) -> ArchSpec:
    """The architecture to train.

    Raises:
        InputError: It cannot be cut out of the backbone, or is not the one in `start`.
    """
    if settings.start is None:
        return arch_of(settings.arch, backbone)
    folder = Path(settings.start)
    if not folder.is_dir():
        raise InputError(f"start={folder}: expected the folder of a trained checkpoint, found none")
    found = Backbone.open(BackboneSettings(name="start", weights=str(folder))).spec
    if settings.arch:
        wanted = arch_of(settings.arch, backbone)
        if found != wanted:
            raise InputError(
                f"start={settings.start}: holds arch {found}: expected {wanted}, as +arch says; "
                "leave +arch out, or start from another checkpoint"
            )
    return found


def importance_of(
    backbone: Backbone, data: PackedData, recipe: RecipeSettings, runs: Runs
) -> Importance:
    """The backbone's importance scores, computed once and kept."""
    assert backbone.folder is not None
    batches = list(data.calibration_batches(recipe.calibration_tokens))
    path = runs.importance(f"{fingerprint(backbone.folder)}_{data.digest}")
    return cached_scores(path, backbone.folder, backbone.load, batches, len(batches))


def initial_model(
    spec: ArchSpec,
    backbone: Backbone,
    data: PackedData,
    recipe: RecipeSettings,
    runs: Runs,
    start: str | None = None,
) -> Decoder:
    """`spec` with the weights in `start`, or the backbone's: all, or those that pruning keeps.

    Without backbone weights they are random.
    """
    if start is not None:
        return load(Path(start))
    if backbone.folder is None:
        return Decoder(spec)
    if spec == backbone.spec:
        return backbone.load()
    importance = importance_of(backbone, data, recipe, runs)
    return build(spec, prune(backbone.folder, importance, spec), str(backbone.folder))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a job needs before it works: opened, checked, nothing large loaded.

    Attributes:
        runs: Where results go.
        backbone: What weights come from.
        tokenizer_path: The tokenizer.json in use.
        tokenizer: The same, loaded.
        data: Batches.
    """

    runs: Runs
    backbone: Backbone
    tokenizer_path: Path
    tokenizer: Tokenizer
    data: PackedData

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        data: DataSettings,
        recipe: RecipeSettings,
        *,
        seed: int,
        runs: Runs,
    ) -> "Inputs":
        """Find the tokenizer and the token streams.

        Raises:
            InputError: Corpus or tokenizer cannot be used with this backbone, or its likeliest
                tokens not be kept for this corpus.
        """
        check_top_k(recipe, data, backbone.spec.vocab_size)
        path = find_tokenizer(data, backbone.tokenizer, runs.tokens)
        tokenizer = load_tokenizer(path)
        if tokenizer.get_vocab_size() > backbone.spec.vocab_size:
            raise InputError(
                f"data.tokenizer={path}: has {tokenizer.get_vocab_size()} entries: expected at "
                f"most the backbone's vocabulary of {backbone.spec.vocab_size}"
            )
        if data.seq_len > backbone.spec.max_context:
            raise InputError(
                f"data.seq_len={data.seq_len}: expected at most {backbone.spec.max_context}, the "
                "longest context of the backbone's rotary embedding"
            )
        packed = PackedData(
            data,
            tokenizer,
            batch_size=recipe.batch_size,
            seed=seed,
            cache=runs.tokens,
            folder=path.parent,
        )
        return cls(runs, backbone, path, tokenizer, packed)

    @property
    def end_of_text(self) -> int:
        """Id of the token between documents."""
        return end_of_text_id(self.tokenizer, self.tokenizer_path)

    def save_model(self, folder: Path, model: Decoder) -> None:
        """Write `model` as a bf16 Hugging Face folder with the tokenizer."""
        save(
            folder,
            model.spec,
            state_to_save(model, torch.bfloat16),
            tokenizer=self.tokenizer_path,
            token_ids={"bos_token_id": self.end_of_text, "eos_token_id": self.end_of_text},
        )


def _key(settings: TrainSettings, spec: ArchSpec, inputs: Inputs) -> str:
    folder = inputs.backbone.folder
    decisive = {
        "spec": spec.to_dict(),
        "recipe": plain(settings.recipe),
        "precision": settings.trainer.precision.value,
        "max_steps": settings.trainer.max_steps,
        "data": [inputs.data.digest, settings.data.seq_len],
        "backbone": fingerprint(folder) if folder else "random",
        "seed": settings.seed,
    }
    if settings.start is not None:
        decisive["start"] = fingerprint(Path(settings.start))
    return digest(decisive)


def train(settings: TrainSettings) -> TrainResult:
    """Train what `settings` ask for, stage by stage; finished stages are not done again.

    Returns:
        The result of the last stage.

    Raises:
        InputError: Settings, backbone or data that cannot be used.
    """
    return [_train_stage(stage) for stage in _stages(settings)][-1]


def _stages(settings: TrainSettings) -> list[TrainSettings]:
    """The settings of each stage, the first of which is `settings` itself."""

    def scaled(recipe: RecipeSettings) -> RecipeSettings:
        counts = {
            name: max(1, round(getattr(recipe, name) * settings.scale))
            for name in ("tokens", "calibration_tokens")
        }
        return dataclasses.replace(recipe, **counts)

    first = dataclasses.replace(settings, recipe=scaled(settings.recipe), then={}, scale=1.0)
    stages = [first]
    for key, stage in settings.then.items():
        before = stages[-1].name or settings.backbone.name
        stages.append(
            dataclasses.replace(
                first,
                recipe=scaled(stage.recipe),
                data=stage.data,
                arch={},
                start=str(Runs(Path(settings.runs)).model(before) / "checkpoint"),
                name=f"{before}_{key}",
            )
        )
    return stages


def _train_stage(settings: TrainSettings) -> TrainResult:
    backbone = Backbone.open(settings.backbone)
    spec = spec_of(settings, backbone)
    check_devices(settings.trainer)
    settings.trainer.accumulation(settings.recipe.batch_size)  # says what cannot be shared out
    name = settings.name or backbone.name
    if backbone.folder is None:
        log.warning(
            "backbone %s has no weights: training %s%s, without a teacher (give "
            "backbone.weights=FOLDER to inherit)",
            backbone.name,
            name,
            " from random weights" if settings.start is None else "",
        )
        settings.recipe = dataclasses.replace(settings.recipe, kd_weight=0.0)
    backbone.fetch()
    L.seed_everything(settings.seed, verbose=False)
    own = Path(settings.start, "tokenizer.json") if settings.start is not None else None
    if own is not None and own.is_file() and settings.data.tokenizer is None:
        settings.data = dataclasses.replace(settings.data, tokenizer=str(own))
    runs = Runs(Path(settings.runs))
    inputs = Inputs.open(backbone, settings.data, settings.recipe, seed=settings.seed, runs=runs)
    key = _key(settings, spec, inputs)
    folder = runs.model(name)
    result = TrainResult.read(folder)
    saved = (folder / "checkpoint" / "model.safetensors").is_file()
    if result is not None and result.key == key and saved:
        log.info("%s is finished: %s", name, result.summary)
        return result
    result = _train(settings, name, spec, inputs, key)
    if result is not None:
        result.write(folder)
        log.info("%s: %s -> %s", name, result.summary, folder / "checkpoint")
    wait_for_others()  # what follows may start from this result
    result = TrainResult.read(folder)
    assert result is not None
    return result


def _train(
    settings: TrainSettings, name: str, spec: ArchSpec, inputs: Inputs, key: str
) -> TrainResult | None:
    """The trained and saved model's result; None in processes other than the main one."""
    recipe, precision = settings.recipe, settings.trainer.precision
    model = initial_model(spec, inputs.backbone, inputs.data, recipe, inputs.runs, settings.start)
    if recipe.qat:
        # Both held-out losses are those of the rounded model.
        fake_quantize(model, recipe.qat_group_size, recipe.qat_embedding_bits)
    teacher = teacher_of(inputs.backbone, inputs.data, recipe, settings.trainer, inputs.runs)
    device = main_device(settings.trainer)
    before = None
    if is_main_process():
        before = validate(model.to(device), inputs.data, precision)
        log.info("%s: %s, held-out loss %.3f before training", name, spec, before.loss)
    logger = make_logger(
        settings.logger,
        folder=inputs.runs.logs,
        run=name,
        job="train",
        config={**plain(settings), "spec": spec.to_dict()},
    )
    folder = inputs.runs.model(name)
    try:
        done = fit(
            model,
            inputs.data,
            recipe,
            settings.trainer,
            teacher=teacher,
            # Checkpoints carry the key: other settings start over, not from foreign ones.
            folder=folder / "checkpoints" / key,
            loggers=logger if logger is not None else False,
            label=name,
        )
        if before is None:
            return None
        after = validate(model.to(device), inputs.data, precision)
        if logger is not None:
            metrics = {
                "val/loss_before": before.loss,
                "val/loss_after": after.loss,
                "val/bits_per_byte": after.bits_per_byte,
                "parameters": count_parameters(spec).total,
            }
            logger.log_metrics(metrics, step=done.steps)
    finally:
        close_logger(logger)
    inputs.save_model(folder / "checkpoint", model)
    return TrainResult(
        name=name,
        spec=spec,
        parameters=count_parameters(spec).total,
        before=before,
        after=after,
        fit=done,
        key=key,
        settings=plain(settings),
    )
