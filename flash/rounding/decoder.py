"""Rounding of a whole decoder: its matrices are turned and rounded one after another."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flash.compat.torchao import is_quantized, quantized_tensor
from flash.log_filters import quiet
from flash.model.decoder import Decoder, Layer, RMSNorm
from flash.progress import progress_bar
from flash.rounding.fake import NORMS_OF_HEADS, round_activations
from flash.rounding.gptq import gptq, inverse_factor
from flash.rounding.grid import Grid, round_to_grid
from flash.rounding.rotation import Turn, replace_small_gains, turns
from flash.rounding.settings import Rounding, WeightFormat

Matrix = nn.Linear | nn.Embedding

CHUNK_TOKENS = 8192
"""Tokens of calibration text that pass a layer at a time."""


@torch.no_grad()
def round_nearest(root: nn.Module, weight_format: WeightFormat) -> None:
    """Round all linears and embeddings of `root` in place that are still in floating point.

    Patterns of `weight_format.eight_bit` match the names of the modules below `root`.
    """
    for name, module in root.named_modules():
        if isinstance(module, Matrix) and not is_quantized(module.weight):
            _store(module, _nearest(name, module, weight_format, mse=False))


@torch.no_grad()
def round_decoder(
    model: Decoder,
    weight_format: WeightFormat,
    method: Rounding,
    *,
    rotate: bool,
    calibration: Int[Tensor, "n s"] | None = None,
    keep: Callable[[str, Grid], None] = lambda name, grid: None,
) -> Decoder:
    """Make a decoder with rounded weights, whose forward pass also rounds activations.

    Its head is not tied to its embedding, though its `spec` says so, as each has integers of its
    own. Beside `model` and the integers, memory holds the float weights of one matrix; with `gptq`
    also a Hessian, the activations of one layer for `CHUNK_TOKENS`, and the inputs of one layer for
    all of the calibration text.

    Args:
        model: Decoder in float32; not changed.
        weight_format: Bits and groups.
        method: Choice of integers and scales.
        rotate: Turn the weights first, as `flash.rounding.rotation`.
        calibration: Token ids, for `gptq` only.
        keep: Called by `gptq` with the name of each linear and its rounded matrix.
    """
    rounded = untie(model)
    changes = turns(model) if rotate else {}
    if rotate:
        _drop_gains(rounded)
    mse = method is not Rounding.nearest
    rounded.model.embed_tokens = round_embedding(model, weight_format, mse=mse, rotate=rotate)
    linears = {n: m for n, m in rounded.named_modules() if isinstance(m, nn.Linear)}
    with progress_bar("rounding", len(linears), "matrix") as bar:
        if method is Rounding.gptq:
            assert calibration is not None
            by_outputs = _ByOutputs(weight_format, keep)
            for name, linear in linears.items():
                by_outputs.await_input(name, linear, changes.get(name, Turn()), bar.update)
            by_outputs.run(rounded, calibration)
            return rounded
        for name, linear in linears.items():
            _turn(linear, changes.get(name, Turn()))
            _store(linear, _nearest(name, linear, weight_format, mse=mse))
            bar.update()
    return rounded


@torch.no_grad()
def begin_by_outputs(
    model: Decoder,
    weight_format: WeightFormat,
    *,
    rotate: bool,
    calibration: Int[Tensor, "n s"],
) -> dict[str, Tensor]:
    """Give `model` the weights and scales of `gptq`, as a start for training.

    Each matrix gets the weights that were rounded, not the rounded ones: those lie where training
    moves one as easily as another to the next integer. A tied head stays the embedding. Gains near
    0 become 1, as the weights that were rounded have values there too.

    Args:
        model: Decoder in float32, changed in place.
        weight_format: Bits and groups.
        rotate: Turn the weights before rounding, and back after it.
        calibration: Token ids of training text.

    Returns:
        Scales `(rows, groups)` of each changed matrix, by the name of its module.
    """
    changes = turns(model) if rotate else {}
    scales: dict[str, Tensor] = {}

    def keep(name: str, grid: Grid) -> None:
        if not (name == "lm_head" and model.spec.tie_embeddings):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            assert grid.targets is not None
            # Its former values are not needed any more: they have been rounded.
            linear.weight.copy_(changes.get(name, Turn()).inverse(grid.targets))
            scales[name] = grid.scales

    round_decoder(
        model,
        weight_format,
        Rounding.gptq,
        rotate=rotate,
        calibration=calibration,
        keep=keep,
    )
    replace_small_gains(changes[name] for name in scales if name in changes)
    return scales


@torch.no_grad()
def round_embedding(
    model: Decoder, weight_format: WeightFormat, *, mse: bool, rotate: bool
) -> nn.Embedding:
    """Make the rounded embedding of `model`.

    Args:
        model: Decoder in float32; not changed.
        weight_format: Bits and groups.
        mse: Choose scales by the least squared error, else the smallest that clip nothing.
        rotate: Turn the weights first.
    """
    embedding = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach())
    _turn(embedding, turns(model)["model.embed_tokens"] if rotate else Turn())
    _store(embedding, _nearest("", embedding, weight_format, mse=mse))
    return embedding


@torch.no_grad()
def turn_decoder(model: Decoder) -> Decoder:
    """Make the decoder that `round_decoder` rounds after a rotation, in float32."""
    turned = untie(model)
    _drop_gains(turned)
    for name, change in turns(model).items():
        module = turned.get_submodule(name)
        assert isinstance(module, Matrix)
        _turn(module, change)
    return turned


class _OthersFirst(Exception):
    """End of a chunk's pass at a matrix that waits for the inputs of other chunks."""


class _ByOutputs:
    """Rounding of linears by GPTQ, each when its inputs have arrived.

    They come from the rounded matrices before it, so that it makes up for some of their errors. The
    calibration text passes each layer in chunks. A matrix needs the inputs of all of them, so the
    pass of a chunk ends there, and begins anew at the layer when the matrix is rounded.
    """

    def __init__(self, weight_format: WeightFormat, keep: Callable[[str, Grid], None]) -> None:
        self._format, self._keep = weight_format, keep
        self._waiting: dict[nn.Linear, Callable[[], str]] = {}
        self._chunks: list[Tensor] = []
        self._current = 0
        self._arrived: set[int] = set()
        self._hessian: Tensor | float = 0.0
        self._inputs: Tensor | None = None
        self._factor: Tensor | None = None

    def await_input(
        self, name: str, linear: nn.Linear, change: Turn, done: Callable[[], Any]
    ) -> None:
        """Round a linear in `run`; then call `done`."""

        def prepare() -> str:
            hook.remove()
            _turn(linear, change)
            done()
            return name

        hook = linear.register_forward_pre_hook(lambda module, inputs: self._round(linear, *inputs))
        self._waiting[linear] = prepare

    def run(self, model: Decoder, calibration: Int[Tensor, "n s"]) -> None:
        """Round all linears of `model` that wait."""
        parts = calibration.split(max(1, CHUNK_TOKENS // calibration.shape[1]))
        self._chunks = [model.layer_inputs(part)[0] for part in parts]
        _, rotary, masks = model.layer_inputs(parts[0])
        for layer, mask in zip(cast(Iterable[Layer], model.model.layers), masks, strict=True):
            self._pass_all(lambda x, layer=layer, mask=mask: layer(x, rotary, mask)[0])
        # The head alone, as the logits of all positions would be gigabytes.
        self._pass_all(model.model.norm)
        for i, chunk in enumerate(self._chunks):
            self._current = i
            with suppress(_OthersFirst):
                self._round(model.lm_head, chunk)

    def _pass_all(self, module: Callable[[Tensor], Tensor]) -> None:
        """Replace all chunks by the outputs of a part of the model, once it is rounded."""
        left = list(range(len(self._chunks)))
        while left:
            for i in tuple(left):
                self._current = i
                with suppress(_OthersFirst):
                    self._chunks[i] = module(self._chunks[i])
                    left.remove(i)

    def _round(self, linear: nn.Linear, inputs: Float[Tensor, "n s c"]) -> None:
        """Round a linear that waits for the inputs of the current chunk, if it is the last one."""
        if inputs is not self._inputs:  # the same for queries, keys and values
            if self._current not in self._arrived:
                rows = round_activations(inputs).flatten(0, -2)
                self._hessian = self._hessian + rows.T @ rows
                self._arrived.add(self._current)
            if len(self._arrived) < len(self._chunks):
                raise _OthersFirst
            assert isinstance(self._hessian, Tensor)
            self._inputs, self._factor = inputs, inverse_factor(self._hessian)
            self._arrived, self._hessian = set(), 0.0
        assert self._factor is not None
        name = self._waiting.pop(linear)()
        bits = self._format.linear_bits(name)
        group = self._format.group(bits, linear.in_features)
        grid = gptq(linear.weight, self._factor, group, bits)
        _store(linear, grid)
        self._keep(name, grid)


def untie(model: Decoder) -> Decoder:
    """Make a decoder with an untied head on the memory of the same weights."""
    with torch.device("meta"):
        shared = Decoder(model.spec.replace(tie_embeddings=False))
    shared.load_state_dict(model.state_dict(), assign=True)
    shared.spec = model.spec
    return shared.requires_grad_(False).eval()


def _drop_gains(model: Decoder) -> None:
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and not name.endswith(NORMS_OF_HEADS):
            module.weight = _frozen(torch.ones_like(module.weight))


def _turn(module: Matrix, change: Turn) -> None:
    module.weight = _frozen(change(module.weight.float()))
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias = _frozen(change.bias(module.bias))


def _nearest(name: str, module: Matrix, weight_format: WeightFormat, *, mse: bool) -> Grid:
    is_embedding = isinstance(module, nn.Embedding)
    bits = weight_format.embedding_bits if is_embedding else weight_format.linear_bits(name)
    group_size = weight_format.group(bits, module.weight.shape[1])
    return round_to_grid(module.weight, group_size, bits, mse=mse)


def _store(module: Matrix, grid: Grid) -> None:
    is_linear = isinstance(module, nn.Linear)
    with quiet():  # the first call imports torchao
        tensor = quantized_tensor(grid.integers, grid.scales, grid.bits, round_inputs=is_linear)
    module.weight = _frozen(tensor)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
