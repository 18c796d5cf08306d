from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flash.device import DeviceSettings, Workload
from flash.errors import InputError

HOST = Path(__file__).parents[2] / "conf" / "device" / "host.yaml"


def test_host_file_fits_the_schema():
    merged = OmegaConf.merge(OmegaConf.structured(DeviceSettings), OmegaConf.load(HOST))
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, DeviceSettings)
    assert settings.workload.prefill_chunk == settings.lowering.prefill_chunk <= 1024


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 10_000), ("threads", 0), ("processes", 0), ("reject_ratio", 1.0),
     ("run_timeout_s", 0.0), ("max_context", 100), ("warmups", -1), ("pause_s", -1.0)],
)  # fmt: skip
def test_bad_values_are_named(key, value):
    with pytest.raises(InputError, match=rf"device\.{key}={value}: expected"):
        DeviceSettings(name="host", **{key: value})


def test_workload_says_what_context_it_needs():
    workload = Workload(
        prompts=(100,), contexts=(90,), decode_tokens=16, prefill_chunk=50, threads=1
    )
    assert workload.context == 106
    with pytest.raises(InputError, match="workload.decode_tokens=0: expected"):
        Workload(prompts=(1,), contexts=(0,), decode_tokens=0, prefill_chunk=1, threads=1)
