"""A search over vocabularies: losses and latencies are those of the same text."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from flash.arch import Attention, Choices, FfnChoices
from flash.data.settings import DataKind
from flash.errors import InputError
from flash.paths import Runs
from flash.search.job import check
from flash.search.run import run_search
from flash.search.settings import SearchStage
from flash.training.run import train
from flash.training.settings import TrainSettings
from tests.pipeline.conftest import RECIPE, SPACE, search_settings, with_lowering

CUT, WHOLE = 290, 320


def settings_of(common):
    settings = search_settings(common)
    settings.space = dataclasses.replace(
        SPACE,
        num_layers=Choices(min=2, max=2),
        model_dim=Choices(min=64, max=64),
        ffn_dim=FfnChoices(min=128, max=128),
        kinds=[Attention.full_attention],
        vocab_size=[CUT, WHOLE],
    )
    settings.search = dataclasses.replace(settings.search, study="words", trials=2)
    return settings


@pytest.fixture(scope="module")
def words(common):
    return run_search(settings_of(common))


def test_losses_are_proportional_to_bits_per_byte(words):
    trials = {trial["spec"]["vocab_size"]: trial for trial in words["trials"]}
    assert trials.keys() == {CUT, WHOLE}
    ratios = [
        trial["loss"] / (trial["extra"]["bits_per_byte"] * math.log(2)) for trial in trials.values()
    ]
    assert ratios[0] == pytest.approx(ratios[1])  # bytes of a token of the whole vocabulary
    assert trials[CUT]["loss"] != trials[WHOLE]["loss"]


def test_a_prompt_has_more_tokens_in_a_smaller_vocabulary(words):
    trials = {trial["spec"]["vocab_size"]: trial for trial in words["trials"]}
    [longer] = {int(p.split("_")[1]) for p in words["latency_points"] if "prefill" in p} - {32}
    assert 32 < longer < 48
    assert trials[CUT]["costs"]["size_mib"] < trials[WHOLE]["costs"]["size_mib"]
    for number, points in words["predicted"].items():
        trial = next((t for t in words["trials"] if str(t["number"]) == number), None)
        if trial is not None:
            size = trial["spec"]["vocab_size"]
            prompt = points[f"prefill_{longer if size == CUT else 32}"]["mean_ms"]
            assert trial["costs"]["prefill_ms"] == pytest.approx(prompt)
            steps = longer / 32 if size == CUT else 1
            decode = points["decode_32"]["mean_ms"] * steps
            assert trial["costs"]["decode_ms"] == pytest.approx(decode, rel=0.02)


def test_a_winner_is_trained_with_the_tokens_of_its_search(common, words):
    runs = Runs(Path(common["runs"]))
    files = [yaml.safe_load(path.read_text()) for path in runs.found_arch.glob("words_*.yaml")]
    arch = {**files[0], "vocab_size": CUT}
    recipe = dataclasses.replace(RECIPE, kd_weight=0.5)
    result = train(TrainSettings(**common, recipe=recipe, arch=arch, name="words"))
    assert result.spec.vocab_size == CUT
    assert len(list((runs.root / "backbones").iterdir())) == 1


def test_what_cannot_be_cut_is_refused_before_any_work(common):
    settings = settings_of(common)
    settings.data = dataclasses.replace(settings.data, kind=DataKind.shards)
    with pytest.raises(InputError, match=rf"^space\.vocab_size={CUT}: .* data\.kind=shards"):
        check(settings)
    settings = settings_of(common)
    settings.space = dataclasses.replace(settings.space, vocab_size=[100])
    settings.stage = SearchStage.latency
    with pytest.raises(InputError, match=r"^space\.vocab_size=100: expected 2\d\d .*bytes"):
        run_search(settings)
    settings = settings_of(common)
    settings.space = dataclasses.replace(settings.space, vocab_size=[265])  # few more than bytes
    settings.device = with_lowering(max_context=36)
    settings.search = dataclasses.replace(settings.search, study="short")
    with pytest.raises(InputError, match=r"max_context=36: expected .* space\.vocab_size=265"):
        run_search(settings)
