"""Option files of users and of searches: what they may hold, checked before Hydra sees them."""

import re

import pytest

from flash.errors import InputError
from flash.option_files import Trust, check_options


def test_option_files_choose_where_jobs_run(tmp_path):
    path = tmp_path / "train" / "experiment" / "queue.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: submitit_slurm\n  - _self_\n"
        "hydra: {launcher: {partition: gpu, timeout_min: 60}}\nseed: 1\n",
        "utf-8",
    )
    check_options(tmp_path, Trust.launcher)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.yaml").write_text("_target_: os.mkdir\n", "utf-8")
    own = tmp_path / "conf"
    (own / "arch").mkdir(parents=True)
    (own / "arch" / "linked").symlink_to(elsewhere)
    with pytest.raises(
        InputError, match=r"linked/x\.yaml: _target_: os\.mkdir: expected no setting"
    ):
        check_options(own, Trust.launcher)
    (own / "hydra").mkdir()
    with pytest.raises(InputError, match="conf/hydra: expected no options of Hydra's own groups"):
        check_options(own, Trust.launcher)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected settings as KEY: VALUE, found nothing"),
        ("# nothing\n", "expected settings as KEY: VALUE, found nothing"),
        ("[]\n", "expected settings as KEY: VALUE, found a list"),
        ("5\n", "expected settings as KEY: VALUE, found one value"),
        ("a: 1\na: 2\n", "line 2: found duplicate key a"),
        ("a: 'b\n", "line 2: found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("1: 2\n", "expected text as a key, found 1"),
        ("a: &a [*a]\n", "too many levels of nesting"),
        ("a: !!binary aGk=\n", "a: expected text, a number, true, false or null, found a bytes"),
        ("\ufeffa: 1\n", "begins with a byte-order mark"),
        ("# @pglobal_\na: 1\n", "line 1: # @pglobal_: expected `# @package NAME`"),
        ("defaults: 5\n", "defaults: expected a list"),
        ("defaults: [{a: {b: 1}}]\n", "expected the name of an option, or GROUP: OPTION"),
        ("defaults: [other]\n", "defaults: the option includes itself"),
    ],
)
def test_an_option_file_is_read_before_hydra_sees_it(tmp_path, text, expected):
    for name, content in (("mine", text), ("other", "defaults: [/arch/mine]\n")):
        path = tmp_path / "arch" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=rf"arch/\w+\.yaml.*{re.escape(expected)}"):
        check_options(tmp_path, Trust.launcher)


def test_architectures_of_a_search_have_values_only(tmp_path):
    path = tmp_path / "arch" / "found.yaml"
    path.parent.mkdir()
    for text in ("# @package _global_\nseed: 1\n", "defaults: [_self_]\nffn_dim: 64\n"):
        path.write_text(text, "utf-8")
        check_options(tmp_path, Trust.launcher)
        with pytest.raises(InputError, match="expected values only, as a search writes them"):
            check_options(tmp_path, Trust.values)
