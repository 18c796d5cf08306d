"""Edited configs of all families: read as stock transformers reads them, or refused by name."""

import pytest

from tests.model.config_variants import Folders, variants, verdict
from tests.verdicts import Outcome

VARIANTS = variants()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("variants"))


@pytest.mark.parametrize("variant", VARIANTS, ids=[f"{v.family}-{v.name}" for v in VARIANTS])
def test_a_config_means_what_transformers_takes_it_to_mean(variant, folders):
    found = verdict(variant, folders.make(variant))
    expected = Outcome.right if variant.refused is None else Outcome.refused
    assert found.outcome is expected, found


def test_the_variants_are_many_and_each_has_its_name():
    names = {(variant.family, variant.name) for variant in VARIANTS}
    assert len(names) == len(VARIANTS) >= 100
