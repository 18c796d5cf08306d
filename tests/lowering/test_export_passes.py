"""The shortened passes of ExecuTorch write the bytes of the stock passes."""

import pytest

from flash.lowering.lower import lower


def test_fast_lowering_writes_the_stock_bytes(toy, settings):
    model = toy("-")  # with attention the stock passes take a minute: below
    assert lower(model, settings()) == lower(model, settings(), fast=False)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["FS", "F-"])
@pytest.mark.parametrize(
    ("quantization", "cache"), [("fp32", "fp32"), ("int8da4w", "fp32"), ("int8da4w", "int8")]
)
def test_fast_lowering_writes_the_stock_bytes_for_every_format(
    toy, settings, pattern, quantization, cache
):
    model, formats = toy(pattern), settings(quantization, cache)
    assert lower(model, formats) == lower(model, formats, fast=False)


def test_nothing_stays_patched(toy, settings):
    from executorch.exir.pass_base import _ExportPassBase
    from torch.export import ExportedProgram

    before = (_ExportPassBase._fx, ExportedProgram.run_decompositions)
    lower(toy("-"), settings("fp32"))
    assert (_ExportPassBase._fx, ExportedProgram.run_decompositions) == before
