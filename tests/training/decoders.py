"""Small decoders for training tests, and their comparison."""

import torch

from flash.model.decoder import Decoder
from tests.conftest import SMALL


def make_model() -> Decoder:
    """A small decoder with the same random weights each time."""
    torch.manual_seed(1)
    return Decoder(SMALL)


def same_weights(a: Decoder, b: Decoder) -> bool:
    """True if all weights are equal bit by bit."""
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
