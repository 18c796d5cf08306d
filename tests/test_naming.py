"""Names of results: each says what made it, and another result has another name."""

import shlex
from itertools import combinations
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from flash.bundled import CONF
from flash.compat.hydra import compose
from flash.config import load_job, register
from flash.errors import InputError
from flash.naming import changes, compose_name, name_of_path, require_own_names
from flash.paths import Runs
from flash.records import digest


@pytest.fixture
def settings_of(monkeypatch, tmp_path):
    """Function that returns the settings of a command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path / "runs"))
    found = Runs(tmp_path / "runs").found_arch
    found.mkdir(parents=True)
    (found / "tiny_12_a3f9.yaml").write_text("ffn_dim: 192\n", "utf-8")
    GlobalHydra.instance().clear()

    def load(line: str):
        verb, *overrides = shlex.split(line)
        monkeypatch.setenv("FLASH_VERB", verb)
        register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return load_job(verb, compose(verb, overrides))

    return load


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("train", "tiny-distill"),
        ("train recipe=distill seed=0", "tiny-distill"),
        ("train recipe=continue", "tiny-continue"),
        ("train +arch=tiny_12_a3f9", "tiny_12_a3f9"),
        ("train +arch=tiny_12_a3f9 recipe=continue", "tiny_12_a3f9-continue"),
        ("train seed=1 recipe=continue +arch.ffn_dim=384", "tiny-ffn_dim_384-continue-seed_1"),
        ("train +arch.ffn_dim=384 recipe.lr=0.00003", "tiny-ffn_dim_384-lr_3e-05"),
        ("train +arch.ffn_dim=384 recipe.lr=3e-5", "tiny-ffn_dim_384-lr_3e-05"),
        ("train data.document_masks=true", "tiny-distill-document_masks_true"),
        ("train backbone.weights=a/SmolLM2-135M", "SmolLM2-135M-distill"),
        ("train backbone.weights=o/m@main +arch.ffn_dim=384", "m_main-ffn_dim_384"),
        ("train backbone.name=mine backbone.weights=a/b", "mine-distill"),
        ("train +arch=tiny_12_a3f9 backbone=qwen3_0_6b", "tiny_12_a3f9-qwen3_0_6b"),
        ("train start=tiny_12_a3f9 recipe=qat", "tiny_12_a3f9-then-qat"),
        ("train start=runs/models/x/checkpoint", "x-then-distill"),
        ("train experiment=tiny_backbone", "tiny_backbone"),
        ("train +arch=flash_650m experiment=paper scale=0.5", "flash_650m-paper-scale_0.5"),
        # Of no effect on the result.
        ("train trainer=gpu logger=none data.workers=0", "tiny-distill"),
        ("export", "tiny"),
        ("export +arch=tiny_12_a3f9 format=[hf,gguf]", "tiny_12_a3f9"),
        ("export model=tiny_12_a3f9-continue", "tiny_12_a3f9-continue"),
        ("export +arch=tiny_12_a3f9 device.threads=1", "tiny_12_a3f9"),
        ("export device.lowering.group_size=64", "tiny-group_size_64"),
        ("export device=android device.android.serial=A1", "tiny-android-serial_A1"),
        ("export device.name=board7", "tiny-board7"),
        ("export experiment=table6 +arch=lfm2_350m", "lfm2_350m"),
        ("evaluate suite=paper_chat limit=10", "tiny-limit_10"),
        ("evaluate +arch=tiny_12_a3f9 format=program", "tiny_12_a3f9"),
        ("train 'name=n_${arch.ffn_dim}_${recipe.name}' +arch.ffn_dim=384", "n_384_distill"),
        ("export 'name=c_${device.lowering.cache}' device.lowering.cache=int8", "c_int8"),
    ],
)
def test_a_name_says_what_made_the_result(settings_of, line, name):
    assert settings_of(line).name == name
    assert Runs(Path("runs")).model(name).name == name


def test_the_name_of_a_backbone_is_that_of_its_weights(settings_of):
    assert settings_of("search").backbone.name == "tiny"
    assert settings_of("search backbone.weights=a/SmolLM2-135M").backbone.name == "SmolLM2-135M"
    assert settings_of("search backbone.weights=models/x/checkpoint").backbone.name == "x"


DISTINCT = [
    "",
    "recipe=continue",
    "recipe.tokens=9",
    "recipe.calibration_tokens=9",
    "data.seq_len=9",
    "data.validation_sequences=9",
    "data.document_masks=true",
    "data=folder data.path=a",
    "data=folder data.path=b",
    "seed=9",
    "scale=9",
    "trainer.max_steps=9",
    "trainer.precision=bf16",
    "backbone=tiny_random",
    "start=x",
]


def test_other_results_have_other_names(settings_of):
    names = {line: settings_of(f"train {line}").name for line in DISTINCT}
    for one, other in combinations(DISTINCT, 2):
        assert names[one] != names[other], (one, other)


def test_two_jobs_of_a_sweep_do_not_share_a_name(settings_of):
    jobs = [settings_of(f"train name=mine seed={seed}") for seed in (0, 1)]
    with pytest.raises(InputError, match=r"^name=mine: expected a name for each of the 2 jobs"):
        require_own_names("train", jobs)
    require_own_names("train", [settings_of(f"train seed={seed}") for seed in (0, 1)])
    # Each format, and each suite, has a file of its own.
    for verb, key in (("export", "format=[hf],format=[gguf]"), ("evaluate", "suite=paper_base")):
        require_own_names(verb, [settings_of(f"{verb} {each}") for each in key.split(",")])


def test_names_need_no_quotes_and_are_not_too_long():
    odd = {"a.prompt": "x y;z", "b.list": [1, 2], "c.path": "/a/b c.txt", "d": "", "e": None}
    name = compose_name("base", ["option"], odd)
    assert shlex.quote(name) == name
    assert name.startswith("base-option-prompt_")
    many = {f"key_{i:02d}": i for i in range(40)}
    long = compose_name("base", ["option"], {"arch.ffn_dim": 64, **many})
    assert long.startswith("base-ffn_dim_64-option-key_00_0-")
    assert len(long) <= 64
    assert long != compose_name("base", ["option"], {"arch.ffn_dim": 64, **many, "key_39": 4})


def test_values_are_named_by_the_last_keys_that_are_their_own():
    paths = ["recipe.tokens", "then.ift.recipe.tokens", "seed"]
    assert compose_name("b", [], {"recipe.tokens": 5, "seed": 1}, paths) == (
        "b-recipe.tokens_5-seed_1"
    )


def test_changes_count_removed_values_and_leave_out_uncounted_ones():
    before, after = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1}, "d": 4}
    assert changes(before, after, []) == {"a.c": None, "d": 4}
    assert changes(before, after, ["a"]) == {"d": 4}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/models/x/checkpoint", "x"),
        ("runs/models/x/checkpoint/", "x"),
        ("/a/SmolLM2-135M", "SmolLM2-135M"),
        ("owner/model@v1", "model_v1"),
        ("/a/b/..", "a"),
        ("x" * 100, f"{'x' * 96}_{digest('x' * 100, 4)}"),
    ],
)
def test_models_are_named_by_their_folders(path, name):
    assert name_of_path(path) == name


def test_a_model_of_a_long_name_keeps_it_when_it_is_exported(settings_of):
    changed = [f"recipe.{key}=9" for key in ("tokens", "calibration_tokens", "batch_size")]
    trained = settings_of(" ".join(["train +arch.ffn_dim=384 seed=12", *changed])).name
    assert 55 < len(trained) <= 64
    assert settings_of(f"export model={trained}").name == trained
    again = settings_of(f"export model={trained} device.lowering.embedding_bits=8").name
    assert again.startswith(f"{trained}-")


def test_places_are_named_by_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "SmolLM2").mkdir()
    monkeypatch.chdir(tmp_path / "SmolLM2")
    assert {
        name_of_path(path) for path in (".", "./", "../SmolLM2", str(tmp_path / "SmolLM2"))
    } == {"SmolLM2"}
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert name_of_path("checkpoint") == "run"
    monkeypatch.chdir(tmp_path / "SmolLM2")
    one, same, other = (
        compose_name("b", [], {"data.path": path})
        for path in ("../texts/a", str(tmp_path / "texts/a"), "../other/a")
    )
    assert one == same != other
