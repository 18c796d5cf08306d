"""Odd data files: rows come out as they are written, or one line names file and row."""

import pytest

from tests.data.odd_files import cases, verdict


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_rows_are_as_written_or_named(case, tmp_path):
    assert verdict(case, tmp_path) in {"right", "refused"}
