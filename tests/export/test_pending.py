"""Parts of an unfinished export: what a second start finds, and what it does not trust."""

from flash.export.mixed import PartCost
from flash.export.pending import PendingExport

COST = PartCost(name="lm_head", kl=0.1, kl_eight=0.01, extra_bytes=512, extra_ms=None)


def test_a_second_start_finds_choice_and_program(tmp_path):
    first = PendingExport.open(tmp_path, "key")
    assert (first.eight_bit, first.gate) == (None, {})
    chosen = first.with_choice(["lm_head"], [COST])
    assert PendingExport.open(tmp_path, "key") == chosen
    proved = chosen.with_program(b"program", {"passed": True}, 2.5)
    assert PendingExport.open(tmp_path, "key") == proved
    other = PendingExport.open(tmp_path, "other")
    assert (other.eight_bit, other.costs, other.gate) == (None, [], {})


def test_a_changed_program_and_a_damaged_record_count_as_none(tmp_path):
    chosen = PendingExport.open(tmp_path, "key").with_choice(["lm_head"], [COST])
    proved = chosen.with_program(b"program", {"passed": True}, 2.5)
    proved.program.write_bytes(b"progra")
    assert PendingExport.open(tmp_path, "key") == chosen
    proved.program.unlink()
    assert PendingExport.open(tmp_path, "key") == chosen
    (tmp_path / ".pending.json").write_text('{"key": 1')
    assert PendingExport.open(tmp_path, "key").eight_bit is None


def test_publishing_names_the_program_and_leaves_no_former_result(tmp_path):
    for name in ("export.json", "gate_failed.json", "model.pte"):
        (tmp_path / name).write_text("former")
    chosen = PendingExport.open(tmp_path, "key").with_choice(["lm_head"], [COST])
    proved = chosen.with_program(b"program", {"passed": True}, 2.5)
    proved.publish()
    proved.discard()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gate.json", "mixed.json", "model.pte"]
    assert (tmp_path / "model.pte").read_bytes() == b"program"
