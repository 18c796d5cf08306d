"""Edited configs of all families: read as stock transformers reads them, or refused by name."""

import re

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
    if variant.refused is None:
        assert found.outcome is Outcome.right, found
    else:
        assert found.outcome is Outcome.refused, found
        assert re.search(variant.refused, found.reason), found


def test_the_variants_are_many_and_each_has_its_name():
    names = {(variant.family, variant.name) for variant in VARIANTS}
    assert len(names) == len(VARIANTS) >= 100
