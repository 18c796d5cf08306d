"""Rounding of a whole decoder: its matrices are turned and rounded one after another."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flash.compat.torchao import is_quantized, quantized_tensor
from flash.log_filters import quiet
from flash.model.decoder import Decoder, RMSNorm
from flash.progress import progress_bar
from flash.rounding.fake import NORMS_OF_HEADS, round_activations
from flash.rounding.gptq import gptq, inverse_factor
from flash.rounding.grid import Grid, round_to_grid
from flash.rounding.rotation import Turn, replace_small_gains, turns
from flash.rounding.settings import Rounding, WeightFormat

Matrix = nn.Linear | nn.Embedding


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
    also a Hessian, and the activations of one layer for all of the calibration text.

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
    by_outputs = _ByOutputs(weight_format, keep) if method is Rounding.gptq else None
    linears = {n: m for n, m in rounded.named_modules() if isinstance(m, nn.Linear)}
    with progress_bar("rounding", len(linears), "matrix") as bar:
        for name, linear in linears.items():
            change = changes.get(name, Turn())
            if by_outputs is None:
                _turn(linear, change)
                _store(linear, _nearest(name, linear, weight_format, mse=mse))
                bar.update()
            else:
                by_outputs.await_input(name, linear, change, bar.update)
        if by_outputs is not None:
            assert calibration is not None
            # The head alone, as the logits of all positions would be gigabytes.
            by_outputs.round(rounded.lm_head, rounded.hidden(calibration))
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


class _ByOutputs:
    """Rounding of linears by GPTQ, each when its inputs arrive.

    They come from the rounded matrices before it, so that it makes up for some of their errors.
    """

    def __init__(self, weight_format: WeightFormat, keep: Callable[[str, Grid], None]) -> None:
        self._format, self._keep = weight_format, keep
        self._waiting: dict[nn.Linear, Callable[[], str]] = {}
        self._inputs: Tensor | None = None
        self._factor: Tensor | None = None

    def await_input(
        self, name: str, linear: nn.Linear, change: Turn, done: Callable[[], Any]
    ) -> None:
        """Round a linear at its first call, or by `round`; then call `done`."""

        def prepare() -> str:
            hook.remove()
            _turn(linear, change)
            done()
            return name

        hook = linear.register_forward_pre_hook(lambda module, inputs: self.round(linear, *inputs))
        self._waiting[linear] = prepare

    def round(self, linear: nn.Linear, inputs: Float[Tensor, "n s c"]) -> None:
        """Round a linear that waits for these inputs."""
        name = self._waiting.pop(linear)()
        if inputs is not self._inputs:  # the same for queries, keys and values
            rows = round_activations(inputs).flatten(0, -2)
            self._inputs, self._factor = inputs, inverse_factor(rows.T @ rows)
        assert self._factor is not None
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
