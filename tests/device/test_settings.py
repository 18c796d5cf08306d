"""Device settings and workloads: illegal values, points, and the file of the host."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flash.device.settings import REFUSED, DeviceSettings
from flash.device.workload import Phase, Point, Workload
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


@pytest.mark.parametrize("backend", list(REFUSED))
def test_other_backends_are_refused_with_the_reason(backend):
    with pytest.raises(InputError, match=rf"device\.backend={backend.value}: .*{REFUSED[backend]}"):
        DeviceSettings(name="host", backend=backend)


def test_workload_says_what_context_it_needs():
    workload = Workload(
        prompts=(100,), contexts=(90,), decode_tokens=16, prefill_chunk=50, threads=1
    )
    assert workload.context == 106
    with pytest.raises(InputError, match="workload.decode_tokens=0: expected"):
        Workload(prompts=(1,), contexts=(0,), decode_tokens=0, prefill_chunk=1, threads=1)


def test_points_have_names_and_a_workload_can_be_cut_down():
    workload = Workload(
        prompts=(512, 2048), contexts=(64,), decode_tokens=4, prefill_chunk=512, threads=1
    )
    assert [point.name for point in workload.points] == ["prefill_512", "prefill_2048", "decode_64"]
    assert [Point.parse(point.name) for point in workload.points] == list(workload.points)
    assert workload.first(Phase.prefill) == Point(Phase.prefill, 512)
    only = workload.only(workload.points[1:])
    assert (only.prompts, only.contexts, only.prefill_chunk) == ((2048,), (64,), 512)
    with pytest.raises(InputError, match="point=prefill: expected prefill_N or decode_N"):
        Point.parse("prefill")


@pytest.mark.parametrize("lengths", [[0], [5, 5], ["x"]])
def test_bad_lengths_are_named(lengths):
    with pytest.raises(InputError, match=r"workload\.prompts=.*: expected different integers"):
        DeviceSettings(name="host", prompts=lengths)


def test_name_of_a_device_is_a_folder_and_cpus_must_be_ours():
    with pytest.raises(InputError, match=r"device\.name=a/b: expected letters"):
        DeviceSettings(name="a/b")
    with pytest.raises(InputError, match=r"device\.cpus=\[9999\]: expected some of the CPUs"):
        DeviceSettings(name="host", cpus=[9999])
