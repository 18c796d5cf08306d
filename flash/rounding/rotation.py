"""Rotation of a decoder's weights, which spreads outliers over all channels before rounding.

Two orthogonal matrices are merged into the weights, so that nothing is added at run time and the
logits stay the same (QuaRot, arXiv:2404.00456; R1 and R2 of SpinQuant, arXiv:2405.16406):

- the residual stream is turned by one matrix. That needs norms without a gain, so each gain is
  first multiplied into the matrices that read the norm;
- the values of each key head, and so the inputs of the output projection, are turned by another.

A tied head becomes a matrix of its own, as the final norm's gain belongs to it and not to the
embedding. In a quantized program this costs nothing: it holds both anyway, in formats of their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from flash.model.decoder import Decoder, Layer, RMSNorm

SEED = 0
"""Seed of the random signs. Fixed, as a program must turn the weights as their training did."""

SMALLEST_GAIN = 1e-3
"""Smallest magnitude of a gain that a matrix is divided by. At 0 its column would be lost, and near
0 the column would be so large that the first step of a training moves it far."""


@dataclass(frozen=True)
class Orthogonal:
    """Orthogonal matrix `diag(signs) @ kron(left, right)`; multiplied by its factors in turn.

    Attributes:
        signs: Random signs, `(n,)`.
        left: Factor of the slow index, `(a, a)`.
        right: Factor of the fast index, `(b, b)`; `a * b = n`.
    """

    signs: Float[Tensor, " n"]
    left: Float[Tensor, "a a"]
    right: Float[Tensor, "b b"]

    def turn(self, x: Float[Tensor, "*m k"]) -> Float[Tensor, "*m k"]:
        """Multiply each block of n neighbors in the last dimension by the matrix."""
        blocks = self._blocks(x) * self.signs.view(len(self.left), -1).to(x)
        return (self.left.T.to(x) @ blocks @ self.right.to(x)).reshape(x.shape)

    def turn_back(self, x: Float[Tensor, "*m k"]) -> Float[Tensor, "*m k"]:
        """Multiply each block of n neighbors in the last dimension by the inverse."""
        blocks = self.left.to(x) @ self._blocks(x) @ self.right.T.to(x)
        return (blocks * self.signs.view(len(self.left), -1).to(x)).reshape(x.shape)

    def _blocks(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, len(self.left), len(self.right))


@dataclass(frozen=True)
class Turn:
    """Change of one matrix by the rotation; without attributes it changes nothing.

    Attributes:
        norm: Norm whose output the matrix reads, and whose gain it takes over.
        columns: Orthogonal matrix that its columns are multiplied by.
        rows: Orthogonal matrix whose transpose its rows are multiplied by.
    """

    norm: RMSNorm | None = None
    columns: Orthogonal | None = None
    rows: Orthogonal | None = None

    def __call__(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Turn a matrix; differentiable in the matrix and in the gain.

        It is not autocast: in bfloat16 a turned weight can round to another integer.
        """
        with torch.autocast(weight.device.type, enabled=False):
            if self.norm is not None:
                weight = weight * self.norm.weight
            if self.columns is not None:
                weight = self.columns.turn(weight)
            return weight if self.rows is None else self.rows.turn(weight.T).T

    def bias(self, bias: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """Turn the bias that is added to the outputs."""
        with torch.autocast(bias.device.type, enabled=False):
            return bias if self.rows is None else self.rows.turn(bias)

    def inverse(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Turn a matrix back; `replace_small_gains` then has to complete it."""
        if self.rows is not None:
            weight = self.rows.turn_back(weight.T).T
        if self.columns is not None:
            weight = self.columns.turn_back(weight)
        return weight if self.norm is None else weight / _divisors(self.norm.weight)


@torch.no_grad()
def replace_small_gains(changes: Iterable[Turn]) -> None:
    """Set gains near 0 to 1, as `inverse` took them for.

    A rounded matrix that was turned back has values in all columns, also where the gain was 0. With
    this gain it is turned to the same rounded matrix again.

    Args:
        changes: Changes by which all matrices that read their norms were turned back.
    """
    for change in changes:
        if change.norm is not None:
            change.norm.weight.copy_(_divisors(change.norm.weight))


def _divisors(gain: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    return torch.where(gain.abs() < SMALLEST_GAIN, 1, gain)


def turns(model: Decoder) -> dict[str, Turn]:
    """Make the change of each matrix of `model`, by the name of its module.

    The decoder that has the turned matrices, and norms without gains, computes the same logits.
    The norms of queries and keys keep their gains, as they are no part of the residual stream.
    """
    residual, head = orthogonal(model.spec.model_dim), orthogonal(model.spec.head_dim)
    found = {
        "model.embed_tokens": Turn(columns=residual),
        "lm_head": Turn(norm=model.model.norm, columns=residual),
    }
    for i, layer in enumerate(cast(Iterable[Layer], model.model.layers)):
        mlp, attention = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
        reads = Turn(norm=layer.post_attention_layernorm, columns=residual)
        found[f"{mlp}.gate_proj"] = found[f"{mlp}.up_proj"] = reads
        found[f"{mlp}.down_proj"] = Turn(rows=residual)
        if layer.kind.attends:
            norm = layer.input_layernorm
            reads = Turn(norm=norm, columns=residual)
            found[f"{attention}.q_proj"] = found[f"{attention}.k_proj"] = reads
            found[f"{attention}.v_proj"] = Turn(norm=norm, columns=residual, rows=head)
            found[f"{attention}.o_proj"] = Turn(columns=head, rows=residual)
    return found


@cache
def orthogonal(width: int) -> Orthogonal:
    """Make a random orthogonal matrix, a Hadamard matrix with random signs as far as possible.

    All entries of a Hadamard matrix have the same magnitude, which spreads an outlier evenly. Where
    none of this width is known here, only the largest power of two that divides it has one, and the
    other factor is a random orthogonal matrix.
    """
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
    power = width & -width
    orders = (power >> shift for shift in range(power.bit_length()))
    core = next((matrix for order in orders if (matrix := paley(width // order)) is not None), None)
    if core is None:
        random = torch.randn(width // power, width // power, generator=generator)
        core = torch.linalg.qr(random.double())[0]
    rest, right = width // len(core), core
    while rest > 2 * len(right):  # factors of about the same size take the least work
        rest, right = rest // 2, torch.kron(_sylvester(2), right)
    return Orthogonal(signs, _sylvester(rest).float(), right.float())


def paley(order: int) -> Float[Tensor, "order order"] | None:
    """Make an orthogonal matrix of entries of one magnitude, by Paley's two constructions.

    The order is 1, or q + 1 or 2 (q + 1) for a prime q; others have None.
    """
    if order == 1:
        return _sylvester(1)
    if order % 4:
        return None
    if _is_prime(q := order - 1):  # q = 3 mod 4: the Jacobsthal matrix is antisymmetric
        border = _bordered(q, -1) + torch.eye(order, dtype=torch.float64)
        return border / order**0.5
    if (order // 2) % 4 == 2 and _is_prime(q := order // 2 - 1):  # q = 1 mod 4: symmetric
        pairs = torch.kron(_bordered(q, 1), _matrix([[1, 1], [1, -1]]))
        diagonal = torch.eye(q + 1, dtype=torch.float64)
        return (pairs + torch.kron(diagonal, _matrix([[1, -1], [-1, -1]]))) / order**0.5
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """Legendre symbols of all differences modulo the prime q, with a border of ones."""
    squares = {i * i % q for i in range(1, q)}
    symbols = [0] + [1 if i in squares else -1 for i in range(1, q)]
    rows = [[sign] + [symbols[(i - j) % q] for j in range(q)] for i in range(q)]
    return _matrix([[0] + [1] * q, *rows])


def _sylvester(order: int) -> Tensor:
    """Orthogonal matrix of entries of one magnitude, of an order that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(_matrix([[1, 1], [1, -1]]), matrix) / 2**0.5
    return matrix


def _matrix(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
