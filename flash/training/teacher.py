"""The teacher of a run: the backbone itself, or its stored outputs for the run's sequences."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flash.data.batch import Batch, collate
from flash.data.corpus import PackedData
from flash.data.packed import PackedSequences
from flash.data.settings import DataSettings
from flash.data.teacher_cache import TeacherCache
from flash.data.teacher_codec import FORMAT, TopTokenCodec
from flash.errors import InputError, require
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.model.losses import Operands, top_log_probs
from flash.paths import Runs
from flash.progress import progress_bar
from flash.prune.importance import fingerprint
from flash.records import digest
from flash.training.accelerators import local_device, rank_fraction
from flash.training.memory import out_of_memory_named
from flash.training.settings import Precision, RecipeSettings, TrainerSettings

log = logging.getLogger(__name__)

Teacher = Decoder | TeacherCache

_DEFAULT_BATCH = 8
"""Most sequences per forward pass of the teacher if `trainer.micro_batch` is null."""


def check_top_k(recipe: RecipeSettings, data: DataSettings, vocab_size: int) -> None:
    """Check that `recipe.kd_top_k` can be used with these data.

    Raises:
        InputError: It is as large as the vocabulary, or the data are streamed and so cannot be read
            by index.
    """
    k = recipe.kd_top_k
    if recipe.kd_weight == 0 or k is None:
        return
    expected = f"below the vocabulary of {vocab_size}, or null for all"
    require(k < vocab_size, "recipe.kd_top_k", k, expected)
    require(
        not data.streamed,
        "recipe.kd_top_k",
        k,
        f"null for data.kind={data.kind.value}, which is streamed; make shards of it "
        "(`flash prepare`) and train with data=shards",
    )


def load_teacher(backbone: Backbone, precision: Precision) -> Decoder:
    """The backbone as a teacher.

    With bf16 products its weights are in bf16 too, which halves their memory.

    Raises:
        InputError: The backbone has no weights, or they are damaged.
    """
    teacher = backbone.load()
    return teacher.bfloat16() if precision is Precision.bf16 else teacher


def teacher_of(
    backbone: Backbone,
    data: PackedData,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    runs: Runs,
) -> Teacher | None:
    """The teacher that `recipe` asks for; None without distillation.

    With `kd_top_k`, the backbone first reads all sequences of the run and stores its likeliest
    tokens for them. Outputs that an earlier run on the same text has stored are used again, and so
    are those that a killed run has finished. If several processes of the run exist by now (with
    torchrun or Slurm), they share the work.

    Raises:
        InputError: The backbone has no weights or gives numbers that are not finite, `check_top_k`
            fails, or the disk has too little room.
    """
    check_top_k(recipe, data.settings, backbone.spec.vocab_size)
    if recipe.kd_weight == 0:
        return None
    if recipe.kd_top_k is None:
        return load_teacher(backbone, trainer.precision)
    taught = _open(backbone, data, recipe, trainer.precision, runs)
    ahead = 1 + 2 * data.settings.workers  # batches that loaders have read ahead when the run ends
    steps = recipe.steps(data.settings.seq_len) + ahead
    missing = taught.missing(steps * recipe.batch_size)
    if missing:
        _check_room(taught, missing)
        _write(taught, missing, backbone, recipe, trainer)
    return taught


def _open(
    backbone: Backbone, data: PackedData, recipe: RecipeSettings, precision: Precision, runs: Runs
) -> TeacherCache:
    assert isinstance(data.train_set, PackedSequences)
    assert backbone.folder is not None
    assert recipe.kd_top_k is not None
    kept = [recipe.kd_top_k, recipe.kd_top_p, recipe.temperature]
    decisive = {
        "format": FORMAT,
        "backbone": fingerprint(backbone.folder),
        "data": data.train_identity,
        "distillation": [*kept, precision.value],
    }
    codec = TopTokenCodec(recipe.kd_top_k, backbone.spec.vocab_size, data.settings.seq_len)
    return TeacherCache(data.train_set, data.seed, runs.teacher(digest(decisive)), codec)


def _check_room(taught: TeacherCache, missing: list[int]) -> None:
    codec = taught.codec
    tokens = codec.seq_len * sum(len(taught.members(part)) for part in missing)
    needed = tokens * codec.bytes_per_token
    taught.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(taught.folder).free
    if needed > free:
        raise InputError(
            f"recipe.kd_top_k={codec.top_k}: needs up to {needed / 2**30:.1f} GiB in "
            f"{taught.folder} for {tokens:,} tokens, and {free / 2**30:.1f} GiB are free; "
            "expected room, a smaller k, or null for a teacher that runs along"
        )


def _write(
    taught: TeacherCache,
    missing: list[int],
    backbone: Backbone,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
) -> None:
    """Let the backbone read the `missing` parts, and store its outputs."""
    device = local_device(trainer)
    model = load_teacher(backbone, trainer.precision).to(device)
    answer = _top_k_outputs(model, recipe, trainer, backbone.folder)
    at_once = trainer.micro_batch or min(recipe.batch_size, _DEFAULT_BATCH)
    # Nothing is kept for gradients, so that checkpointing would save nothing.
    reading = dataclasses.replace(trainer, micro_batch=at_once, activation_checkpointing=True)
    # Each process begins at a part of its own and skips those that others have written meanwhile.
    first = rank_fraction() * len(missing)
    order = missing[int(first) :] + missing[: int(first)]
    total = sum(len(taught.members(part)) for part in missing)
    log.info("the teacher reads %s sequences ahead -> %s", f"{total:,}", taught.folder)
    with progress_bar("teacher", total, unit="seq") as bar:
        for part in order:
            if taught.has(part):
                bar.update(len(taught.members(part)))
                continue
            with out_of_memory_named(recipe, reading):
                for done in taught.write(part, answer, at_once):
                    bar.update(done)


def _top_k_outputs(
    teacher: Decoder, recipe: RecipeSettings, trainer: TrainerSettings, folder: Path | None
) -> Callable[[list[Batch]], tuple[Tensor, Tensor]]:
    """A function from sequences to the teacher's likeliest tokens and their log-probabilities."""
    teacher.requires_grad_(False).eval()
    device, k = next(teacher.parameters()).device, recipe.kd_top_k
    assert k is not None
    half = trainer.precision is Precision.bf16

    @torch.no_grad()
    def answer(sequences: list[Batch]) -> tuple[Tensor, Tensor]:
        batch = collate(sequences)
        inputs = batch.tokens[:, :-1].to(device)
        documents = batch.document_ids.to(device) if batch.document_ids is not None else None
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            hidden = teacher.hidden(inputs, documents=documents).flatten(0, 1)
            operands = Operands(hidden, teacher.lm_head.weight)
            top = top_log_probs(operands, k, recipe.temperature, recipe.kd_top_p)
        if bool(top.log_probs.isnan().any()):
            raise InputError(
                f"backbone.weights={folder}: the teacher's logits are not finite with "
                f"trainer.precision={trainer.precision.name}; check the weights, or take fp32"
            )
        ids, log_probs = (part.unflatten(0, inputs.shape) for part in top)
        return ids, log_probs

    return answer
