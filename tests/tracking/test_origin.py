"""Facts about the study that an architecture is traced back to."""

import dataclasses
import os

import yaml

from flash.paths import Runs
from flash.search.frontier import write_frontier
from flash.search.loop import frontier
from flash.tracking.origin import find_origin
from tests.search import toy_search as toy


def write_arch(runs, study, arch, spec, trial=3):
    path = runs.found_arch / f"{arch}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# Frontier of the search study {study}: trial {trial}, loss 2.5 nats a token,\n"
    path.write_text(header + yaml.safe_dump(spec.to_dict()))
    return path


def test_the_files_that_a_search_writes_are_understood(tmp_path):
    runs = Runs(tmp_path)
    trials = toy.run(tmp_path / "study.db", trials=8)
    paths = write_frontier(runs.found_arch, "a_b", trials, toy.PROBLEM)
    for path, trial in zip(paths, frontier(trials, toy.PROBLEM), strict=True):
        origin = find_origin(runs, "any name", trial.spec)
        assert origin is not None
        assert (origin.study, origin.trial, origin.path) == ("a_b", trial.number, path)


def test_the_architecture_decides_and_then_the_name(tmp_path):
    runs, spec = Runs(tmp_path), toy.BACKBONE
    other = dataclasses.replace(spec, ffn_dim=256)
    first = write_arch(runs, "tiny_1", "tiny_1_3_a3f9", spec)
    write_arch(runs, "tiny", "tiny_1", other)
    later = write_arch(runs, "new", "new_3_a3f9", spec, trial=7)
    os.utime(first, (1, 1))
    named = find_origin(runs, "tiny_1_3_a3f9-ffn_dim384", spec)
    assert named is not None
    assert (named.study, named.trial, named.arch) == ("tiny_1", 3, "tiny_1_3_a3f9")
    free = find_origin(runs, "mine", spec)
    assert free is not None
    assert free.path == later
    changed = find_origin(runs, "tiny_1_3_a3f9", other)
    assert changed is not None
    assert changed.study == "tiny"
    assert find_origin(runs, "new_3_a3f9", dataclasses.replace(spec, ffn_dim=512)) is None


def test_files_of_others_are_passed_over(tmp_path):
    runs = Runs(tmp_path)
    assert find_origin(runs, "a", toy.BACKBONE) is None
    path = write_arch(runs, "t", "t_3_a3f9", toy.BACKBONE)
    path.write_text(path.read_text() + "model_dim: [\n")
    (runs.found_arch / "mine.yaml").write_text(yaml.safe_dump(toy.BACKBONE.to_dict()))
    (runs.found_arch / "list.yaml").write_text(
        "# Frontier of the search study t: trial 3, loss 1\n- 1\n"
    )
    assert find_origin(runs, "t_3_a3f9", toy.BACKBONE) is None
