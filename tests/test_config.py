"""Configuration: all options compose, and mistakes end in one line and exit code 2."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from flash.arch import ArchSpec
from flash.bundled import CONF
from flash.commands import begin, following, override
from flash.config import ROOTS, entry, load, register
from flash.device.workload import Phase
from flash.search.job import open_space
from flash.search.objectives import Objective

NEEDS = {
    "data=folder": ["data.path=x"],
    "data=shards": ["data.path=x"],
    "data=files": ["data.sources=[{path: x}]"],
}
"""Settings that an option requires the user to give."""
NOT_FOR = {"search": "recipe=pretrain"}
"""Option that a command refuses."""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Function that runs an entry script in this process; returns its exit code and stderr.

    The code is -1 if a job was given that ended without an error.
    """
    monkeypatch.chdir(tmp_path)

    def call(script: str, *arguments: str, job=None) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        for name in ("FLASH_PROGRAM", "FLASH_RUNS", "FLASH_VERB"):
            monkeypatch.setenv(name, "")  # restored after the test, whatever the command sets
        begin(script)
        reached = []
        try:
            entry(script, job or reached.append)
        except SystemExit as stop:
            assert not reached
            return int(stop.code or 0), capsys.readouterr().err
        return (0 if reached else -1), capsys.readouterr().err

    return call


@pytest.mark.parametrize("script", ROOTS)
def test_defaults_compose_and_convert(script, run):
    assert run(script)[0] == 0


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_option_of_every_group_composes(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    monkeypatch.setenv("FLASH_VERB", "train")
    (tmp_path / "conf").mkdir()
    register()
    group = path.parent.name
    reached = False
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for script, schema in ROOTS.items():
            defaults = yaml.safe_load((CONF / f"{script}.yaml").read_text())["defaults"]
            known = {key for entry in defaults if isinstance(entry, dict) for key in entry}
            override = f"{group}={path.stem}"
            if group == "arch" and script in {"train", "export", "evaluate"}:
                override = f"+{override}"
            elif group not in known or override == NOT_FOR.get(script):
                continue
            settings = load(compose(script, [override, *NEEDS.get(override, [])]), schema)
            reached = True
            if group != "arch":
                node = getattr(settings, group)
                assert getattr(node, "name", path.stem) is not None
    assert reached


def test_a_command_lists_the_experiments_that_it_composes(run, monkeypatch, tmp_path):
    (tmp_path / "conf" / "train" / "experiment").mkdir(parents=True)
    own = tmp_path / "conf" / "train" / "experiment" / "mine.yaml"
    own.write_text("# @package _global_\nseed: 7\n", "utf-8")
    found = {}
    for script in ROOTS:
        said = []
        monkeypatch.setattr("builtins.print", lambda *words, said=said, **_: said.extend(words))
        run(script, "--help")
        line = re.search(r"^experiment: (.*(?:\n  .*)*)", "\n".join(map(str, said)), re.MULTILINE)
        found[script] = line[1].split(", ") if line else []
    assert found == {
        "train": ["mine", "paper", "smollm2", "tiny_backbone"],
        "search": ["paper", "smollm2"],
        "export": ["smollm2", "table6"],
        "evaluate": ["smollm2"],
        "prepare": [],
        "workspace": [],
    }
    files = {f"{path.parents[1].name} {path.stem}" for path in CONF.glob("*/experiment/*.yaml")}
    both = {f"{script} {name}" for script, names in found.items() for name in names}
    assert files | {"train mine"} == both
    for script, names in found.items():
        for name in names:
            settings = []
            assert run(script, f"experiment={name}", job=settings.append)[0] == -1
            assert name != "mine" or settings[0].seed == 7


def test_the_papers_search(run):
    settings = []
    run("search", "experiment=paper", job=settings.append)
    [search] = settings
    assert (search.space.name, search.backbone.name) == ("flash", "mobilellm_pro_shallow")
    assert (search.search.trials, search.search.batch, search.recipe.tokens) == (200, 8, 2.6e9)
    objectives = search.search.order(Objective.prefill)
    assert objectives == (Objective.quality, Objective.prefill)
    assert search.search.worst(objectives, {"loss": 2.0, "prefill_ms": 1.0}, {}) == (2.6, 4000.0)
    assert search.device.workload.first(Phase.prefill).tokens == 2048
    assert (search.device.lowering.chunk, search.device.threads) == (1024, 4)
    spec = ArchSpec.from_dict(search.backbone.arch)
    assert open_space(search.space, spec).count_slots() == 3**16 * 7 * 25 * 9
    search.device.lowering.check_fits(spec)
    changed = []
    run("search", "experiment=paper", "device=host", "search.trials=9", job=changed.append)
    assert (changed[0].device.kind.value, changed[0].search.trials) == ("host", 9)


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        (["data.validation={path: y}"], "y"),
        (["data.validation.path=y"], "y"),
        (["data.validation={path: y}", "data.validation=null"], None),
    ],
)
def test_a_setting_that_is_null_gets_a_value(run, overrides, value):
    settings = []
    source = ["data=files", "data.sources=[{path: x}]"]
    assert run("train", *source, *overrides, job=settings.append)[0] == -1
    validation = settings[0].data.validation
    assert (validation.path if validation is not None else None) == value


def test_lists_of_any_values_may_hold_lists_and_mappings(run):
    settings = []
    assert run("train", "+arch.x=[[1,2],{a: 3}]", job=settings.append)[0] == -1
    assert settings[0].arch == {"x": [[1, 2], {"a": 3}]}


def test_new_keys_are_added_to_a_mapping(run):
    settings = []
    assert run("train", "+arch.ffn_dim=64", "+arch.x.y=1", job=settings.append)[0] == -1
    assert settings[0].arch == {"ffn_dim": 64, "x": {"y": 1}}


def test_options_of_further_devices_are_further_devices(run, tmp_path):
    folder = tmp_path / "conf" / "device"
    folder.mkdir(parents=True)
    (folder / "second.yaml").write_text("name: second\nthreads: 1\n")
    settings = []
    words = ["device=host", "+device@devices.second=second"]
    assert run("search", *words, "devices.second.runs=7", job=settings.append)[0] == -1
    assert [(device.name, device.runs) for device in settings[0].all_devices] == [
        ("host", 3),
        ("second", 7),
    ]
    code, text = run("search", *words, "devices.second.thread=7")
    assert (code, text) == (
        2,
        "error: devices.second.thread: unknown key; did you mean 'threads'?\n",
    )


@pytest.mark.parametrize("override", ["backbone.arch={ffn_dim: 64}", "+backbone.arch.ffn_dim=64"])
def test_a_mapping_that_is_null_gets_keys(run, override):
    settings = []
    assert run("train", "backbone.weights=null", override, job=settings.append)[0] == -1
    assert settings[0].backbone.arch == {"ffn_dim": 64}


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("train", "recipe.lrr=1", "recipe.lrr: unknown key; did you mean 'lr'?"),
        ("train", "+recipe.lrr=1", "recipe.lrr: unknown key; did you mean 'lr'?"),
        ("train", "+recipes.lr=1", "recipes: unknown key; did you mean 'recipe'?"),
        ("train", "lr=1", "lr: unknown key; did you mean 'recipe.lr'?"),
        ("export", "rounding=mse", "unknown key; did you mean 'device.lowering.rounding'?"),
        (
            "export",
            "lowering.rounding=mse",
            "lowering: unknown key; did you mean 'device.lowering'?",
        ),
        (
            "export",
            "mixed=4",
            "mixed=4: expected values for its settings, as in mixed.max_weight_mib",
        ),
        ("export", "device.lowering.rotate=x", "rotate=x: expected true or false, or null"),
        ("export", "format=executorch,hf", "a list in brackets: 'format=[executorch,hf]'"),
        ("train", "recipe.lr=fast", "recipe.lr=fast: expected a number"),
        ("train", "recipe.lr=-1", "recipe.lr=-1.0: expected a positive number"),
        ("train", "recipe.schedule=linear", "recipe.schedule=linear: expected one of cosine, wsd"),
        ("train", "recipe=contine", "did you mean 'continue'?"),
        ("train", "+arch=flash_65m", "did you mean 'flash_650m'?"),
        ("train", "trainer.max_steps=0", "trainer.max_steps=0: expected a positive integer"),
        ("train", "data.validation.pth=x", "pth: unknown key; did you mean 'path'?"),
        (
            "train",
            "experiment=papr",
            "experiment=papr: expected one of paper, smollm2, tiny_backbone",
        ),
        ("train", "experiment=table6", "experiment=table6: expected one of paper, smollm2"),
        ("train", "recipe.inherit=false", "recipe.kd_weight=0.5: expected 0 with inherit=false"),
        ("search", "recipe=pretrain", "recipe.inherit=false: expected true for the trials"),
        ("search", "search.trails=5", "search.trails: unknown key; did you mean 'trials'?"),
        (
            "search",
            "space.model_dim.stp=1",
            "space.model_dim.stp: unknown key; did you mean 'step'?",
        ),
        ("search", "space.model_dim.step=0", "space.model_dim.step=0: expected a positive integer"),
        ("search", "device.threads=4096", "device.threads=4096: expected 1 to the"),
        ("train", "scale=1e308", "scale=1e+308: expected a positive number up to 1000000"),
        ("train", "data.pattern=/dev/zero", "data.pattern=/dev/zero: expected a pattern of files"),
        ("search", "search.reference=${oc.env:HOME}", "expected values for its settings, or a map"),
        ("search", "search.objectives=${oc.env:HOME}", "expected a list in brackets"),
        ("search", "search.reference=${search.limits}", "limits}: expected values of the kind"),
        ("search", "search.limits=${search.reference}", "reference}: expected values of the kind"),
        ("search", "search.reference=${search.sampler}", "expected values for its settings, or a"),
        ("search", "search.limits=${suite}", "search.limits=null: expected values for its set"),
        ("search", "device.workload=${search.limits}", "that device.workload has; write them out"),
        (
            "search",
            "search.objectives=${device.workload.prompts}",
            "search.objectives=${device.workload.prompts}: expected values of the kind",
        ),
        ("search", "space.num_heads=[null]", "space.num_heads[0]=null: expected an integer"),
        ("search", "space.num_heads=[[1]]", "space.num_heads[0]=[1]: expected an integer"),
        ("search", "search.objectives=[{a: 1}]", "search.objectives[0]={a: 1}: expected a word"),
        ("search", "search.objectives=[prefil]", "objective prefil; did you mean 'prefill'?"),
        (
            "search",
            "+devices.x.threads=3",
            "devices.x: is not set so far, and holds settings; add it with +device@devices.x=NAME",
        ),
        ("train", "+then.more.recipe.tokens=5", "then.more: is not set so far, and holds settings"),
        ("search", "latency=bloks", "did you mean 'blocks'?"),
        ("export", "gate.max_kl_quantised=1", "did you mean 'max_kl_quantized'?"),
        (
            "export",
            "format=[executorch,onnx]",
            "format[1]=onnx: expected one of executorch, hf, gguf",
        ),
        ("export", "device=hots", "did you mean 'host'?"),
        ("search", "device.group_size=32", "renamed to device.lowering.group_size"),
        ("export", "device.skip_unread=false", "renamed to device.lowering.prefill_last_only"),
        ("search", "latency=physical", "latency=physical: renamed to latency=analytical"),
        ("search", "latency.predictor=physical", "renamed to latency.predictor=analytical"),
        ("evaluate", "form=program", "form: renamed to format"),
        ("train", "data.parts=[]", "data.parts: renamed to data.sources"),
        (
            "train",
            "device.threads=2",
            "not a setting of this command; it is one of flash",
        ),
        ("train", "space=tiny", "space: not a group of this command; it is one of flash search"),
        ("train", "arch=flash_650m", "arch: has no option by default; write +arch=flash_650m"),
        ("search", "+arch=tiny_2", "arch: not a group of this command; it is one of flash train"),
        ("train", "+recipe=distill", "write recipe=OPTION, without '+'"),
        ("train", "+experiment=paper", "write experiment=OPTION, without '+'"),
        ("train", "++recipe=distill", "write recipe=distill"),
        ("train", "+recipe.lr=1", "+recipe.lr: is set already; write recipe.lr=VALUE"),
        ("train", "foo", "foo: expected key=value"),
        ("train", "data.end_of_text=<|x|>", """'data.end_of_text="VALUE"'"""),
        ("train", "data.x=[1", "data.x=[1: expected key=value"),
        ("export", "device.lowering.eight_bit=lm_head", "eight_bit: expected a list in brackets"),
        ("export", "device.workload.prompts=64", "such as 'device.workload.prompts=[A,B]', also"),
        ("train", "data.begin_of_text=maybe", "begin_of_text=maybe: expected true or false"),
        ("train", "arch.ffn_dim=64", "arch.ffn_dim: is not set so far; write +arch.ffn_dim=VALUE"),
        ("train", "data=null", "a config group is null: expected the name of one of its options"),
        ("train", "+arch=tiny_2", "search first"),
        (
            "export",
            "device.lowering.max_context=100",
            "device.lowering.max_context=100: expected at least",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, script, argument, message):
    code, err = run(script, argument)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_start_is_refused_with_random_weights(run):
    code, err = run("train", "recipe=pretrain", "start=x")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: start=x: expected null with recipe.inherit=false")
    stage = ["recipe@then.more.recipe=pretrain", "data@then.more.data=stdlib"]
    code, err = run("train", *(f"+{each}" for each in stage))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: then.more.recipe.inherit=false: expected true")


def test_ctrl_c_exits_130_and_says_how_to_go_on(run):
    def interrupted(settings):
        raise KeyboardInterrupt

    code, err = run("train", "seed=3", job=interrupted)
    assert code == 130
    assert "python train.py seed=3" in err


def test_a_full_disk_is_one_line(run):
    def full(settings):
        raise OSError(28, "No space left on device", "runs/x")

    code, err = run("train", job=full)
    assert code == 1
    assert err.strip() == (
        "error: runs/x: No space left on device; finished work is kept, run the same command again"
    )


def test_a_full_disk_is_one_line_if_a_library_in_rust_finds_it(run):
    def full(settings):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    code, err = run("train", job=full)
    assert code == 1
    assert err.strip() == (
        "error: No space left on device; finished work is kept, run the same command again"
    )


def test_found_architectures_are_taken_by_name(run, tmp_path):
    found = tmp_path / "runs" / "conf" / "arch"
    found.mkdir(parents=True)
    (found / "mine_0.yaml").write_text("ffn_dim: 192\n", "utf-8")
    seen = []
    assert run("train", "+arch=mine_0", job=seen.append)[0] == -1
    assert seen[0].arch == {"ffn_dim": 192}
    assert seen[0].name == "mine_0"


def test_the_folder_of_configuration_groups_exists():
    assert Path(CONF).is_dir()


def test_former_names_of_the_changelog_are_answered(run):
    """Every renamed key of the changelog, typed at a command that has its group."""
    text = (CONF.parent / "CHANGELOG.md").read_text("utf-8")
    table = text.partition("### Renamed keys")[2].partition("###")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", table, re.MULTILINE)
    assert len(rows) > 15
    for former, present in rows:
        code, err = run("search", f"{former}=1")
        assert (code, err.strip()) == (2, f"error: {former}: renamed to {present}")


def test_a_broken_file_of_the_user_is_named(run, tmp_path):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "broken.yaml").write_text("a: [b\n", "utf-8")
    code, err = run("train", "data=broken")
    assert code == 2
    assert err.count("\n") == 1
    assert "broken.yaml, line " in err


def test_the_next_command_has_what_was_typed_and_works_when_pasted(run):
    typed = [
        *("backbone=smollm2_135m", "backbone.weights=a/b", "data.kind=folder", "seed=3"),
        *('data.path="a, (b) c"', "trainer.precision=fp32", "device.threads=2", "name=x"),
    ]
    words = ["recipe=qat", override("start", 'runs/one, "two"/checkpoint'), "name=x-qat"]
    lines = []
    run(
        "export",
        *typed,
        job=lambda settings: lines.append(
            following("train", words, ("backbone", "data", "trainer", "seed"))
        ),
    )
    assert lines == ["python train.py " + shlex.join([*typed[:6], *words])]
    found = []
    code, error = run("train", *shlex.split(lines[0])[2:], job=found.append)
    assert (code, error) == (-1, "")
    assert found[0].start == 'runs/one, "two"/checkpoint'
    assert (found[0].backbone.weights, found[0].backbone.arch["model_dim"]) == ("a/b", 576)
    assert (found[0].data.path, found[0].seed, found[0].name) == ("a, (b) c", 3, "x-qat")


@pytest.mark.parametrize(
    ("verb", "name", "carried"),
    [("export", "smollm2", True), ("evaluate", "smollm2", True), ("export", "paper", False)],
)
def test_the_next_command_has_the_experiment_if_it_knows_it(run, verb, name, carried):
    lines = []
    run(
        "train",
        f"experiment={name}",
        job=lambda settings: lines.append(following(verb, ["name=x"], ("backbone", "experiment"))),
    )
    [line] = lines
    assert line.endswith(" name=x")
    assert (f"experiment={name}" in line) == carried


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: os.mkdir, path: made}}}",
        "hydra:\n  callbacks:\n    x: {'_target_': os.mkdir, path: made}",
        'a: [{"\\x5ftarget_": "${oc.env:X}"}]',
        "hydra: {job: {env_set: {PATH: /tmp}}}",
        "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: made}}}}",
        "hydra: {run: {dir: made}}",
        "hydra: {launcher: {timeout_min: 5, setup: [touch made]}}",
        "hydra.run.dir: made",
        "defaults:\n  - /arch@hydra.job: flash_350m",
        "defaults:\n  - override /hydra/job_logging: default",
        "a: !!python/object/apply:pathlib.Path [a]\nhydra: {run: {dir: made}}",
    ],
)
def test_files_of_a_working_directory_set_nothing_of_hydra(run, tmp_path, text):
    for folder in ("conf/train/experiment", "runs/conf/arch"):
        path = tmp_path / folder / "mine.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n", "utf-8")
        code, err = run("train", "experiment=mine")
        assert code == 2
        assert "mine.yaml" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "made").exists()
        path.unlink()
