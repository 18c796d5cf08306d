"""Inputs that a command opens once: results folder, backbone, text, importance, device."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from flash.arch import ArchSpec
from flash.commands import command
from flash.data.corpus import PackedData, find_tokenizer, known_tokenizer
from flash.data.factory import check_present
from flash.data.settings import DataKind, DataSettings
from flash.data.tokenizer import load_tokenizer
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.settings import DeviceSettings
from flash.errors import InputError, under
from flash.model.backbone import Backbone
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.model.tokenizer import ModelTokenizer
from flash.model.weights import read_spec
from flash.paths import Runs
from flash.prune.importance import Importance, cached_scores, fingerprint
from flash.prune.pruning import check_fits
from flash.prune.vocabulary import check_size, cut_backbone, kept_tokens, same_tokens
from flash.ranks import is_main_process
from flash.records import digest, locked, remove_leftovers

log = logging.getLogger(__name__)


class Named(Protocol):
    """Settings of a command whose result has a name."""

    name: str | None
    backbone: BackboneSettings


def result_name(settings: Named) -> str:
    """Return the name of a command's result: the setting `name`, or else the backbone's name.

    Commands set `name`; see flash.naming.
    """
    return settings.name or settings.backbone.name


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a result's folder, so that two commands do not write one result.

    Ranks other than the main one, which write nothing, do not wait.

    Args:
        folder: Folder of the result; it is created.
        name: Name of the result, for the message of a command that waits.
    """
    if not is_main_process():
        yield
        return
    with locked(folder / ".lock", lambda: log.info("%s: waits for another command", name)):
        remove_leftovers(folder)
        yield


def arch_of(changes: Mapping[str, Any], backbone: Backbone) -> ArchSpec:
    """Return the backbone's architecture with `changes`.

    Raises:
        InputError: An unknown key, an illegal value, a stock baseline, or an architecture to which
            the backbone cannot be pruned.
    """
    if "stock" in changes:
        raise InputError(
            f"arch.stock={changes['stock']}: expected an architecture of ours; stock baselines "
            f"have a latency but no weights, see `{command('export')} model=random`"
        )
    with under("arch"):
        spec = ArchSpec.from_dict({**backbone.spec.to_dict(), **changes})
    check_fits(spec, backbone.spec)
    return spec


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Inputs of a command; each is opened at its first use and then kept.

    Commands use the inputs that they need before any work, so that errors come first. No weights
    are loaded, except by `importance` if no earlier run has stored the scores.

    Attributes:
        runs: Layout of the folder of results.
        backbone: Source of weights.
        data_settings: Settings of the text; None for commands that read no text.
        device_settings: Settings of the device; None for commands that measure nothing.
        model_folder: Folder of the weights in use, whose tokenizer comes before the backbone's;
            None: the backbone.
        batch_size: Sequences per training step, and per forward pass on held-out text.
        seed: Seed of the order of the text.
    """

    runs: Runs
    backbone: Backbone
    data_settings: DataSettings | None = None
    device_settings: DeviceSettings | None = None
    model_folder: Path | None = None
    batch_size: int = 8
    seed: int = 0

    @cached_property
    def device(self) -> Device:
        """Device of the settings; its identity is read once per command.

        Raises:
            InputError: Connection settings that cannot be used.
        """
        assert self.device_settings is not None
        return open_device(self.device_settings)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """Tokenizer in use: that of the settings, else of the model, else of the backbone.

        Raises:
            InputError: There is none, or it has more entries than the backbone's vocabulary.
        """
        data = self.data_settings
        assert data is not None
        path = find_tokenizer(data, self._own_tokenizer, self.runs.tokens)
        tokenizer = load_tokenizer(path, data)
        tokenizer.require_fits(self.backbone.spec.vocab_size, "data.tokenizer=")
        return tokenizer

    @property
    def _own_tokenizer(self) -> Path | None:
        """The tokenizer.json of the model, else of the backbone; None if both have none."""
        return self._model_tokenizer or self.backbone.tokenizer

    def check_data(self) -> None:
        """Check the text and its tokenizer as far as possible without reading the text.

        Raises:
            InputError: As `data`.
        """
        data, limit = self.data_settings, self.backbone.spec.max_context
        assert data is not None
        own, model = self._own_tokenizer, self.model_folder
        # The tokenizer of a model that an earlier stage will write is not there yet.
        later = model is not None and not model.is_dir() and own is None and data.tokenizer is None
        known = not later and known_tokenizer(data, own) is not None
        check_present(data, self.tokenizer if known else None)
        if data.seq_len > limit:
            raise InputError(
                f"data.seq_len={data.seq_len}: expected at most {limit}, the longest context of "
                "the backbone's rotary embedding"
            )

    @cached_property
    def data(self) -> PackedData:
        """Text as batches: the training split and the validation split.

        Raises:
            InputError: The text cannot be used, or its sequences are longer than the backbone's
                context.
        """
        self.check_data()
        data = self.data_settings
        assert data is not None
        return PackedData(
            data,
            self.tokenizer,
            batch_size=self.batch_size,
            seed=self.seed,
            cache=self.runs.tokens,
        )

    def for_vocabulary(self, size: int, place: str = "arch") -> "Workspace":
        """Return the workspace of a model with fewer tokens than the backbone.

        Its backbone has the rows of these tokens only, and is written at the first use. They are
        those of the model's own tokenizer if there is one, else those that the training text uses
        most.

        Args:
            size: Number of tokens of the model.
            place: Settings whose `vocab_size` says so, for errors.

        Raises:
            InputError: The vocabulary cannot be cut, or the text cannot be used.
        """
        self.check_vocabulary(size, place)
        if size == self.backbone.spec.vocab_size:
            return self
        if size not in self._cut:
            self._cut[size] = self._cut_to(size, place)
        return self._cut[size]

    @cached_property
    def _cut(self) -> dict[int, "Workspace"]:
        """Workspaces of models with fewer tokens, by their number."""
        return {}

    def _cut_to(self, size: int, place: str) -> "Workspace":
        """Write the backbone with `size` tokens, unless it exists, and return its workspace."""
        whole = self.backbone
        assert whole.folder is not None
        if self.model_folder is not None and self._model_tokenizer is None:
            raise InputError(
                f"{self.model_folder}: expected a tokenizer.json beside the weights, as they have "
                f"{size} of the backbone's {whole.spec.vocab_size} tokens"
            )
        whole.fetch()
        settings = dataclasses.replace(self._settings, tokenizer=None)
        source = dataclasses.replace(self, model_folder=None)
        cut = load_tokenizer(self._model_tokenizer, settings) if self._model_tokenizer else None
        if cut is not None:
            tokens: Any = cut.digest
        else:  # the first text of a stream depends on more than its sources
            text = source.data
            tokens = text.train_identity if text.settings.streamed else text.digest
        name = f"{whole.name}_{size}_{digest([fingerprint(whole.folder), tokens])}"
        folder = self.runs.backbone(name)
        checkpoint = folder / "checkpoint"
        with locked(folder / ".lock"):  # also between the processes of one training
            if not checkpoint.is_dir():
                remove_leftovers(folder)
                if cut is not None:
                    kept = same_tokens(source.tokenizer, cut, size)
                else:
                    with under(place):
                        kept = kept_tokens(source.tokenizer, size, source.data.token_counts())
                cut_backbone(whole.folder, source.tokenizer, kept, checkpoint)
        backbone = Backbone(whole.name, read_spec(checkpoint), checkpoint)
        return dataclasses.replace(self, backbone=backbone, data_settings=settings)

    def check_vocabulary(self, size: int, place: str = "arch", *, inherits: bool = True) -> None:
        """Check that a model with `size` tokens can be trained, without reading the text.

        Args:
            size: Number of tokens.
            place: Settings whose `vocab_size` says so, for errors.
            inherits: False if the training needs nothing of the backbone.

        Raises:
            InputError: The backbone has more tokens, and no weights; the text is stored as its
                tokens; or its vocabulary cannot be cut to this size.
        """
        whole, settings = self.backbone.spec.vocab_size, self._settings
        if size == whole:
            return
        wanted = f"{place}.vocab_size={size}: expected the backbone's {whole}"
        if inherits and self.backbone.folder is None:
            raise InputError(
                f"{wanted}, since backbone {self.backbone.name} has no weights to inherit; set "
                "backbone.weights"
            )
        if self._model_tokenizer is not None:
            return
        if settings.kind is DataKind.shards:
            raise InputError(
                f"{wanted}, since data.kind=shards holds its tokens; train on the text that the "
                "shards were made of"
            )
        if self.model_folder is None and known_tokenizer(settings, self._own_tokenizer) is not None:
            with under(place):
                check_size(self.tokenizer, size)

    @property
    def _model_tokenizer(self) -> Path | None:
        """The tokenizer.json of the model; None if there is none."""
        path = self.model_folder / "tokenizer.json" if self.model_folder is not None else None
        return path if path is not None and path.is_file() else None

    @property
    def _settings(self) -> DataSettings:
        assert self.data_settings is not None
        return self.data_settings

    def importance(self, calibration_tokens: int) -> Importance:
        """Return the backbone's importance scores on the first training text, stored for later.

        Raises:
            InputError: There is no text, or stored scores are damaged.
        """
        folder, data = self.backbone.folder, self.data
        assert folder is not None
        batches = list(data.calibration_batches(calibration_tokens))
        path = self.importance_path(calibration_tokens)
        return cached_scores(path, folder, self.backbone.load, batches, len(batches))

    def importance_path(self, calibration_tokens: int) -> Path:
        """Return the file in which `importance` stores the scores."""
        folder = self.backbone.folder
        assert folder is not None
        text = digest([self.data.train_identity, calibration_tokens])
        return self.runs.importance(f"{fingerprint(folder)}_{text}")

    def save_model(
        self, folder: Path, model: Decoder, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write `model` in bfloat16 and its tokenizer as a Hugging Face folder.

        After training on conversations the tokenizer has the chat template that was taught.

        Args:
            folder: Folder to write.
            model: The model.
            metadata: Further facts to write into the file of weights.
        """
        tokenizer, data = self.tokenizer, self.data_settings
        if data is not None and data.kind is DataKind.chat:
            from flash.data.chat import taught  # transformers takes seconds to import

            tokenizer = taught(tokenizer, data.chat_template)
        weights = state_to_save(model, torch.bfloat16)
        save(folder, model.spec, weights, tokenizer=tokenizer, metadata=metadata)
