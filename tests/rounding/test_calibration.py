"""Memory that the calibration may take."""

import pytest

from flash.errors import InputError
from flash.rounding import calibration
from flash.rounding.calibration import check_calibration, machine_memory
from tests.conftest import SMALL


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_the_memory_of_its_limit(monkeypatch, tmp_path, name):
    monkeypatch.setattr(calibration, "CGROUP", tmp_path)
    whole = machine_memory()
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for text, memory in (("max\n", whole), (f"{whole + 1}\n", whole), ("1000000\n", 1_000_000)):
        path.write_text(text)
        assert machine_memory() == memory
    with pytest.raises(InputError, match=r"^tokens=1000000: expected at most \d+: the inputs"):
        check_calibration("tokens", 1_000_000, SMALL)
