"""Mixed precision: an exact choice of parts under limits, and programs of both formats."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flash.arch import Quantization, linear_parts
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.export.mixed import PartCost, check_mixed, choose_parts, cost_table, mixed_lowering
from flash.export.rounding import RoundingChoice
from flash.export.settings import MixedSettings
from flash.lowering.gate import check_parity
from flash.lowering.lower import lower
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.rounding.decoder import round_decoder
from flash.rounding.settings import Rounding, WeightFormat
from tests.lowering.conftest import toy_model

SHORT = GateSettings(prefill_tokens=24, decode_tokens=8)
LOWERING = LoweringSettings(max_context=64)
SHORT_WORK = Workload(prompts=[16], contexts=[16])


def costs_of(seed: int, count: int = 9) -> list[PartCost]:
    numbers = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        PartCost(
            name=f"p{i}",
            kl=kl,
            kl_eight=kl_eight * 0.9,
            extra_bytes=round(1000 * size),
            extra_ms=ms,
        )
        for i, (kl, kl_eight, size, ms) in enumerate(numbers)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [(1500.0, None), (None, 1.2), (2500.0, 0.9), (0.0, None)])
def test_no_choice_within_the_limits_saves_more(seed, limits):
    costs = costs_of(seed)
    room_bytes, room_ms = limits

    def saved(chosen):
        return sum(cost.saved for cost in chosen)

    best = 0.0
    for take in itertools.product([False, True], repeat=len(costs)):
        chosen = list(itertools.compress(costs, take))
        fits = room_bytes is None or sum(c.extra_bytes for c in chosen) <= room_bytes
        if fits and (room_ms is None or sum(c.extra_ms or 0 for c in chosen) <= room_ms):
            best = max(best, saved(chosen))
    names = choose_parts(costs, room_bytes, room_ms)
    chosen = [cost for cost in costs if cost.name in names]
    assert saved(chosen) == pytest.approx(best)
    if room_bytes is not None:
        assert sum(c.extra_bytes for c in chosen) <= room_bytes


def test_a_part_that_8_bits_do_not_help_stays_in_4():
    worse = PartCost(name="x", kl=0.1, kl_eight=0.2, extra_bytes=1, extra_ms=0.0)
    assert choose_parts([worse], 1e9, None) == []
    assert "x" in cost_table([worse], [])


def test_the_bytes_of_a_mixed_program_are_those_of_its_file():
    model = toy_model("F-", vocab_size=512, ffn_dim=512)
    mixed = replace(LOWERING, eight_bit=["layers.1.mlp", "lm_head"])
    sizes = []
    for lowering in (LOWERING, mixed):
        rounded = round_decoder(model, lowering.weight_format, Rounding.nearest, rotate=False)
        sizes.append(len(lower(rounded, lowering)))
    counted = mixed.weight_bytes(model.spec) - LOWERING.weight_bytes(model.spec)
    assert sizes[1] - sizes[0] == pytest.approx(counted, rel=0.05)


@torch.no_grad()
def test_a_mixed_program_runs_as_in_eager_mode_and_loses_less():
    text = torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(1))
    model = toy_model("F-")
    exact = model(text[None])
    losses = []
    for parts in ([], ["layers.*", "lm_head"]):
        lowering = replace(LOWERING, eight_bit=parts)
        lowering.check_fits(model.spec)
        rounded = round_decoder(model, lowering.weight_format, Rounding.nearest, rotate=True)
        report = check_parity(rounded, lowering, text, SHORT)
        assert report.passed, report
        losses.append((rounded(text[None]) - exact).square().mean())
    assert losses[1] < 0.8 * losses[0]


def test_patterns_name_parts():
    weight_format = WeightFormat(eight_bit=("layers.*.mlp", "lm_head"))
    assert weight_format.linear_bits("model.layers.3.mlp.up_proj") == 8
    assert weight_format.linear_bits("model.layers.3.self_attn.q_proj") == 4
    assert weight_format.linear_bits("lm_head") == 8
    spec = toy_model("F-").spec
    assert list(linear_parts(spec)) == [
        "layers.0.self_attn",
        "layers.0.mlp",
        "layers.1.mlp",
        "lm_head",
    ]
    with pytest.raises(InputError, match=r"eight_bit=layers\.1\.self_attn: expected a name or"):
        replace(LOWERING, eight_bit=["layers.1.self_attn"]).check_fits(spec)


def test_limits_that_cannot_be_met_are_refused():
    spec = toy_model("F-").spec
    host = DeviceSettings(lowering=LOWERING, workload=SHORT_WORK)
    check_mixed(MixedSettings(), host, spec)
    check_mixed(MixedSettings(max_weight_mib=1.0), host, spec)
    with pytest.raises(
        InputError, match=r"mixed\.max_weight_mib=0\.001: expected at least 0\.0[1-9]"
    ):
        check_mixed(MixedSettings(max_weight_mib=0.001), host, spec)
    fp32 = replace(LOWERING, quantization=Quantization.fp32)
    with pytest.raises(InputError, match="quantization=fp32: expected int8da4w with a limit of"):
        check_mixed(MixedSettings(max_weight_mib=1000.0), replace(host, lowering=fp32), spec)
    named = replace(LOWERING, eight_bit=["lm_head"])
    with pytest.raises(InputError, match=r"eight_bit=\[lm_head\]: expected \[\] with a limit"):
        check_mixed(MixedSettings(max_weight_mib=1.0), replace(host, lowering=named), spec)
    phone = replace(host, kind=DeviceKind.android, name="phone")
    with pytest.raises(InputError, match="max_decode_ms=5: expected null for a phone"):
        check_mixed(MixedSettings(max_decode_ms=5.0), phone, spec)
    with pytest.raises(InputError, match="max_decode_ms=0"):
        MixedSettings(max_decode_ms=0)


class _Device:
    """Device on which each program takes a time of its own, and all have names of their own."""

    def __init__(self, ms: dict[str, float]) -> None:
        self.settings, self.ms = DeviceSettings(lowering=LOWERING, workload=SHORT_WORK), ms

    def measure(self, programs, workload):
        assert [point.name for point in workload.points] == ["decode_16"]
        assert len({program.name for program in programs}) == len(programs)
        found = [self.ms[program.path.name] for program in programs]
        return [SimpleNamespace(decode=SimpleNamespace(ms=ms)) for ms in found]


def test_times_of_parts_add_up_to_the_decode_step_of_the_model(monkeypatch, tmp_path):
    def lowered(subject, lowering, folder):
        kind = subject.block.kind.value if subject.block is not None else "model"
        return folder / f"{kind}-{8 if lowering.eight_bit else 4}"

    monkeypatch.setattr("flash.export.mixed.cached_program", lowered)
    ms = {"full_attention-4": 2.0, "ffn-4": 3.0, "ends-4": 4.0, "model-4": 6.0}
    ms |= {"full_attention-8": 2.6, "ffn-8": 4.2, "ends-8": 3.9, "model-8": 7.5}
    model, device = toy_model("F-"), _Device(ms)
    text = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(1))

    def mixed(limit):
        limits, choice = MixedSettings(max_decode_ms=limit), RoundingChoice(Rounding.nearest, False)
        return mixed_lowering(model, LOWERING, limits, choice, text, device, tmp_path)

    parts = {cost.name: cost.extra_ms for cost in mixed(6.0)[1]}
    expected = {"layers.0.self_attn": 0.3, "layers.0.mlp": 0.6, "layers.1.mlp": 0.6, "lm_head": 0}
    assert parts == pytest.approx(expected)
    assert set(mixed(7.51)[0]) == set(parts)
    assert not set(mixed(6.2)[0]) - {"lm_head"}  # which takes no more time
    with pytest.raises(InputError, match=r"max_decode_ms=5: expected at least 6, the decode step"):
        mixed(5.0)


def test_results_of_before_keep_their_names():
    """Settings that came later are no part of a program's identity while they are not used."""
    assert not {"eight_bit", "rounding", "rotate", "calibration_tokens"} & set(LOWERING.identity())
    assert replace(LOWERING, eight_bit=["lm_head"]).identity()["eight_bit"] == ["lm_head"]
