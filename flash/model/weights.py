"""Reading of safetensors from a Hugging Face folder, one slice at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.model.families import family_of, from_config

CHUNK_BYTES = 32 * 2**20
"""Most bytes of a tensor that are mapped into memory at a time."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Name of a single file of weights, and of the index of several."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""Names of the output head and of the embedding that it can be tied to, in every family."""
_TYPES = ("BF16", "F16", "F32", "F64")
"""Types of tensors, as safetensors names them, whose values are the weights themselves."""


def read_config(folder: Path) -> dict[str, Any]:
    """Content of the folder's config.json.

    Raises:
        InputError: The file is missing or damaged.
    """
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a Hugging Face folder") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object; copy the file again")
    return values


def read_spec(folder: Path) -> ArchSpec:
    """The architecture that the config.json of a folder describes, without a look at its weights.

    Raises:
        InputError: config.json is missing or damaged, or asks for what the decoder lacks.
    """
    return from_config(read_config(folder), str(folder / "config.json"))


def weight_files(folder: Path) -> list[Path]:
    """Paths of the folder's safetensors files: model.safetensors, or the shards of its index.

    Raises:
        InputError: A file is missing, the index is damaged, or the folder holds an adapter, which
            transformers would add to the weights.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise InputError(
            f"{adapter}: adapters are not read; merge it into the weights, or move it away"
        )
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or not index.is_file():
        paths = [single]
    else:
        mapped = _read_json(index).get("weight_map")
        names = list(mapped.values()) if isinstance(mapped, dict) else []
        beside = all(isinstance(name, str) and Path(name).name == name for name in names)
        paths = [folder / name for name in sorted(set(names))] if beside else []
        if not paths:
            raise InputError(f"{index}: weight_map: expected files beside it; copy it again")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; only safetensors weights are read")
    return paths


def all_finite(values: Tensor) -> bool:
    """True if no value is NaN or infinite; in one pass, without a copy."""
    if values.numel() == 0:
        return True
    least, most = torch.aminmax(values)  # NaN if any value is
    return bool(least.isfinite() and most.isfinite())


def read_metadata(folder: Path) -> dict[str, str]:
    """Metadata of the folder's file of weights, or of the first of several.

    Raises:
        InputError: The file is missing or damaged.
    """
    path = weight_files(folder)[0]
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); copy the file again") from error


class Weights:
    """The tensors of a checkpoint folder of any family, under our names.

    Opening a folder reads file headers only. `read` copies no more than it returns.

    Attributes:
        folder: The folder.
        spec: Architecture that its config.json describes. As in transformers, a head that is not
            the embedding is not tied to it, whatever the config says.

    Raises:
        InputError: A file is missing or damaged, the architecture is not supported, or a tensor is
            of a type that weights do not have unless they are quantized.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_config(folder)
        self.spec = from_config(config, str(folder / "config.json"))
        self._family = family_of(config, str(folder))
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        found = file.get_slice(name)
                        self._files[name] = path
                        self._shapes[name] = tuple(found.get_shape())
                        _check_type(path, name, found.get_dtype())
            except SafetensorError as error:
                raise InputError(f"{path}: damaged ({error}); copy the file again") from error
        if self.spec.tie_embeddings and not self._head_is_embedding():
            self.spec = self.spec.replace(tie_embeddings=False)

    def _head_is_embedding(self) -> bool:
        """True unless the files have a head that differs from the embedding."""
        if HEAD not in self._files or EMBEDDING not in self._files:
            return True
        if self._shapes[HEAD] != self._shapes[EMBEDDING] or not self._shapes[HEAD]:
            return False
        chunks = zip(self._chunks(HEAD), self._chunks(EMBEDDING), strict=True)
        return all(torch.equal(head, embedding) for (_, head), (_, embedding) in chunks)

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Check that the folder has exactly the tensors `shapes`.

        Args:
            shapes: Shape of each tensor, by our name.

        Raises:
            InputError: A tensor is missing, left over, or of another shape.
        """
        sources = set()
        for name, shape in shapes.items():
            source = self._family.source(name)
            if source is None:
                continue
            sources.add(source)
            if source not in self._files:
                remedy = f"expected shape {tuple(shape)}"
                if source == HEAD:
                    remedy += ", or tie_word_embeddings=true in config.json"
                raise InputError(f"{self.folder}: tensor {source} is missing; {remedy}")
            if self._shapes[source] != tuple(shape):
                raise InputError(
                    f"{self.folder}: tensor {source} has shape {self._shapes[source]}: expected "
                    f"{tuple(shape)} for arch {self.spec}"
                )
        # Some files store a tied head a second time, and older ones a table of rotary frequencies.
        known = sources | {HEAD}
        left_over = [n for n in self._files if n not in known and not n.endswith("inv_freq")]
        if left_over:
            raise InputError(
                f"{self._files[left_over[0]]}: tensor {left_over[0]} does not belong to arch "
                f"{self.spec}"
            )

    def read(
        self,
        name: str,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A copy of our tensor `name`, or of the chosen rows and columns of it.

        Its values are looked at while they are copied, so that no pass over the file is added.

        Args:
            name: Our name of the tensor.
            rows: Ascending indices of rows to keep; None keeps all.
            columns: Indices of columns to keep; None keeps all.
            dtype: Dtype of the copy; None takes the stored one.

        Raises:
            InputError: The tensor cannot be read, or holds NaN or infinite values.
        """
        source = self._family.source(name)
        if source is None:
            return torch.ones(self.spec.head_dim, dtype=dtype or self._stored_dtype())
        order = self._family.row_order(name, self.spec)
        try:
            out = self._gather(source, rows if order is None else None, columns, dtype)
        except SafetensorError as error:
            path = self._files[source]
            raise InputError(f"{path}: tensor {source} cannot be read ({error})") from error
        if order is None:
            return out
        return out[order if rows is None else order[rows]]

    def _stored_dtype(self) -> torch.dtype:
        name = next(iter(self._files))
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name)[:1].dtype

    def _gather(
        self, source: str, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        shape = list(self._shapes[source])
        shape[0] = shape[0] if rows is None else len(rows)
        if columns is not None:
            shape[1] = len(columns)
        out: Tensor | None = None
        filled = 0
        for start, chunk in self._chunks(source):
            if rows is not None:
                inside = rows[(rows >= start) & (rows < start + chunk.shape[0])] - start
                chunk = chunk.index_select(0, inside)
            if columns is not None:
                chunk = chunk.index_select(1, columns)
            if out is None:
                out = torch.empty(shape, dtype=dtype or chunk.dtype)
            part = out[filled : filled + chunk.shape[0]]
            part.copy_(chunk)
            if not all_finite(part):
                raise InputError(
                    f"{self._files[source]}: tensor {source} has values that are NaN or infinite: "
                    "expected finite numbers; copy the file again, or train the model again"
                )
            filled += chunk.shape[0]
        assert out is not None
        assert filled == shape[0]
        return out

    def _chunks(self, source: str) -> Iterator[tuple[int, Tensor]]:
        """First row and values of successive row ranges of a tensor, each mapped by itself.

        A mapped page counts as resident memory until its mapping ends. One mapping of a whole file
        would raise the peak to the size of the backbone.
        """
        rows, *rest = self._shapes[source]
        row_bytes = 4 * (rest[0] if rest else 1)
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            with safe_open(self._files[source], framework="pt") as file:
                yield start, file.get_slice(source)[start : start + step]


def _check_type(path: Path, name: str, found: str) -> None:
    if found not in _TYPES:
        raise InputError(
            f"{path}: tensor {name} is of type {found}: expected one of {', '.join(_TYPES)}; only "
            "weights that are not quantized are read"
        )
