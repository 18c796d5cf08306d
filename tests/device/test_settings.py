"""Device settings and workloads: illegal values, points, and the file of the host."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flash.device.connections import AndroidSettings, SshSettings
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError
from flash.lowering.settings import LoweringSettings
from flash.records import digest

HOST = Path(__file__).parents[2] / "conf" / "device" / "host.yaml"


def test_host_file_fits_the_schema():
    merged = OmegaConf.merge(OmegaConf.structured(DeviceSettings), OmegaConf.load(HOST))
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, DeviceSettings)
    assert settings.lowering.chunk <= settings.lowering.max_context == 1024


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 10_000), ("threads", 0), ("processes", 0), ("reject_ratio", 1.0),
     ("run_timeout_s", 0.0), ("warmups", -1), ("pause_s", -1.0)],
)  # fmt: skip
def test_bad_values_are_named(key, value):
    with pytest.raises(InputError, match=rf"^{key}={value}: expected"):
        DeviceSettings(name="host", **{key: value})


def test_a_context_too_short_for_the_workload_is_named():
    with pytest.raises(InputError, match=r"^lowering\.max_context=100: expected at least 528"):
        DeviceSettings(name="host", lowering=LoweringSettings(max_context=100))


def test_workload_says_what_context_it_needs():
    workload = Workload(prompts=[100], contexts=[90], decode_tokens=16)
    assert workload.context == 106
    with pytest.raises(InputError, match=r"^decode_tokens=0: expected"):
        Workload(prompts=[1], contexts=[0], decode_tokens=0)


def test_points_have_names_and_a_workload_can_be_cut_down():
    workload = Workload(prompts=[512, 2048], contexts=[64], decode_tokens=4)
    assert [point.name for point in workload.points] == ["prefill_512", "prefill_2048", "decode_64"]
    assert [Point.parse(point.name) for point in workload.points] == list(workload.points)
    assert workload.first(Phase.prefill) == Point(Phase.prefill, 512)
    only = workload.only(workload.points[1:])
    assert (only.prompts, only.contexts) == ([2048], [64])
    with pytest.raises(InputError, match="point=prefill: expected prefill_N or decode_N"):
        Point.parse("prefill")


def test_devices_have_different_names_by_default():
    kinds = DeviceKind
    links = {
        "host": {},
        "phone": {"kind": kinds.android},
        "phone-R5CT1": {"kind": kinds.android, "android": AndroidSettings(serial="R5CT1")},
        "phone-10.0.0.2-5555": {
            "kind": kinds.android,
            "android": AndroidSettings(serial="10.0.0.2:5555"),
        },
        "board-pi.local": {"kind": kinds.ssh, "ssh": SshSettings(host="pi.local")},
        "board-pi.local-2222": {"kind": kinds.ssh, "ssh": SshSettings(host="pi.local", port=2222)},
        "board-1": {"kind": kinds.ssh, "ssh": SshSettings(host="[::1]")},
    }
    assert [DeviceSettings(**values).name for values in links.values()] == list(links)
    named = DeviceSettings(name="s25", kind=kinds.android, android=AndroidSettings(serial="A"))
    assert named.name == "s25"


@pytest.mark.parametrize("lengths", [[0], [5, 5], ["x"]])
def test_bad_lengths_are_named(lengths):
    with pytest.raises(InputError, match=r"^prompts=.*: expected different integers"):
        DeviceSettings(name="host", workload=Workload(prompts=lengths))


def test_name_of_a_device_is_a_folder_and_cpus_must_be_ours():
    with pytest.raises(InputError, match=r"^name=a/b: expected at most 128 letters"):
        DeviceSettings(name="a/b")
    with pytest.raises(InputError, match=r"^cpus=\[9999\]: expected some of the CPUs"):
        DeviceSettings(name="host", cpus=[9999])


def test_results_keep_the_keys_that_they_had_before_settings_were_nested():
    """The digest of these settings in commit ff50dd0, which keys of exports were made from."""
    assert digest(DeviceSettings(name="host").identity()) == "cb302b38c0880f12"
