"""Proposed search spaces: the paper's proportions, for backbones of any shape."""

import pytest

from flash.arch import ArchSpec, Attention, SearchSpace, parse_pattern
from flash.arch.proposal import propose_space
from flash.cli import main, new_option, new_space
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
from flash.search.job import open_space
from tests.conftest import SMALL


def backbone(depth: int, width: int, ffn: int) -> ArchSpec:
    return SMALL.replace(
        layer_types=parse_pattern("F" * depth), model_dim=width, ffn_dim=ffn, num_heads=8
    )


def test_the_papers_backbone_gets_the_papers_depths_and_ends_of_widths():
    space = propose_space("x", backbone(16, 2048, 8192))
    assert (space.num_layers.min, space.num_layers.max) == (10, 16)
    assert (space.model_dim.min, space.model_dim.max) == (1024, 2048)
    assert (space.ffn_dim.min, space.ffn_dim.max) == (2048, 8192)
    assert len(space.ffn_dim.values) == 25
    assert set(space.kinds) == set(Attention)


@pytest.mark.parametrize(
    ("depth", "width", "ffn"),
    [(30, 576, 1536), (8, 256, 576), (1, 32, 32), (32, 960, 2560), (28, 1024, 3072), (3, 416, 992)],
)
def test_all_values_are_legal_and_the_backbone_is_a_member(depth, width, ffn):
    spec = backbone(depth, width, ffn)
    settings = propose_space("x", spec)
    assert spec in open_space(settings, spec)
    for choices in (settings.model_dim, settings.ffn_dim):
        assert 1 <= len(choices.values) <= 25
        assert all(value % 32 == 0 for value in choices.values)


def test_a_file_is_proposed_for_a_checkpoint_and_searched_as_it_is(
    backbone_folder, tmp_path, monkeypatch
):
    from omegaconf import OmegaConf

    from flash.arch import SpaceSettings

    monkeypatch.chdir(tmp_path)
    path, count = new_space("space", "mine", backbone_folder)
    values = OmegaConf.merge(OmegaConf.structured(SpaceSettings), OmegaConf.load(path))
    settings = OmegaConf.to_object(values)
    spec = Backbone.open(BackboneSettings(name="small", weights=str(backbone_folder))).spec
    assert settings == propose_space("mine", spec)
    assert SearchSpace(settings, spec).count() == count
    with pytest.raises(InputError, match="conf/space/mine.yaml: exists"):
        new_space("space", "mine", backbone_folder)
    with pytest.raises(InputError, match="expected the group space"):
        new_space("arch", "mine", backbone_folder)


def test_an_option_to_copy_is_refused_beside_a_backbone(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["flash", "new", "space", "mine", "--backbone", "FOLDER", "--from", "tiny"]
    monkeypatch.setattr("sys.argv", typed)
    for name in ("FLASH_PROGRAM", "FLASH_VERB"):
        monkeypatch.setenv(name, "")  # restored after the test, whatever the command sets
    with pytest.raises(SystemExit):
        main()
    assert "--from tiny: has no effect with --backbone" in capsys.readouterr().err


def test_a_space_for_another_backbone_is_refused_with_the_command_that_proposes_one(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert new_option("space", "own", "tiny")[0].is_file()
    small = propose_space("x", backbone(8, 256, 576))
    with pytest.raises(
        InputError, match=r"num_layers.max=8: .*half of the backbone's 30.*flash new"
    ):
        open_space(small, backbone(30, 576, 1536))
