"""A process that lowers many models does not keep them."""

import gc

from flash.lowering.lower import lower


def _alive() -> int:
    gc.collect()
    return sum(type(each).__name__ == "LoweredBackendModule" for each in gc.get_objects())


def test_programs_of_earlier_lowerings_are_freed(toy, settings):
    lower(toy("-"), settings())
    first = _alive()  # ExecuTorch logs why a node was not delegated and keeps that node's program
    for _ in range(2):
        lower(toy("-"), settings())
    assert _alive() == first
