"""Fixtures of the lowering tests that the tests of other formats share."""

from tests.lowering.conftest import one_thread, text, toy

__all__ = ["one_thread", "text", "toy"]
