"""Stored top-k outputs of the teacher against a teacher that runs along."""

import dataclasses
from itertools import islice

import pytest
import torch

from flash.data.corpus import PackedData
from flash.data.module import PackedDataModule
from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.teacher_codec import STEP_NATS
from flash.data.tokenizer import load_tokenizer
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.model.losses import Operands, top_log_probs
from flash.paths import Runs
from flash.training import teacher
from flash.training.fit import fit
from flash.training.run import train
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from flash.training.teacher import teacher_of
from tests.training.decoders import make_model, same_weights

VOCAB = 320
RECIPE = RecipeSettings(name="test", tokens=12 * 128, batch_size=4, lr=3e-3, kd_weight=0.7)
TOP = dataclasses.replace(RECIPE, kd_top_k=8)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=4)


@pytest.fixture
def backbone(backbone_settings) -> Backbone:
    return Backbone.open(backbone_settings)


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def small_parts(monkeypatch):
    """Limits the files of teacher outputs to eight sequences."""
    monkeypatch.setattr("flash.data.teacher_cache.PART_TOKENS", 8 * 32)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Batch sizes of the sequences that teachers have read ahead."""
    read: list[int] = []
    answers = teacher._top_k_outputs

    def counting(*args):
        answer = answers(*args)

        def one(sequences):
            read.append(len(sequences))
            return answer(sequences)

        return one

    monkeypatch.setattr(teacher, "_top_k_outputs", counting)
    return read


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_but_one_train_like_a_teacher_that_runs_along(
    temperature, data, backbone, runs, small_parts
):
    models = []
    for k in (None, VOCAB - 1):
        recipe = dataclasses.replace(RECIPE, kd_top_k=k, temperature=temperature)
        models.append(make_model())
        taught = teacher_of(backbone, data, recipe, TRAINER, runs)
        done = fit(models[-1], data, recipe, TRAINER, teacher=taught)
        assert done.steps == 12
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    # Stored log-probabilities are rounded, so weights are close but not equal.
    apart = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    moved = torch.cat([
        (a - b).flatten()
        for a, b in zip(models[0].parameters(), make_model().parameters(), strict=True)
    ]).norm()
    assert apart < 0.05 * moved


@pytest.mark.parametrize("masks", [False, True])
def test_each_sequence_has_the_outputs_of_the_teacher_for_it(
    masks, data_settings, backbone, runs, small_parts
):
    changed = dataclasses.replace(data_settings, document_masks=masks)
    tokenizer = load_tokenizer(backbone.folder / "tokenizer.json")
    data = PackedData(changed, tokenizer, batch_size=4, seed=3, cache=runs.tokens)
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    model = backbone.load()
    data.teacher_cache = taught
    for batch in islice(PackedDataModule(data).train_dataloader(), 12):
        with torch.no_grad():
            hidden = model.hidden(batch.tokens[:, :-1], documents=batch.document_ids).flatten(0, 1)
            ids, log_probs = top_log_probs(Operands(hidden, model.lm_head.weight), 8)
        assert batch.top_ids.shape == (4, 32, 8)
        kept = batch.top_log_probs.flatten(0, 1).float()
        torch.testing.assert_close(kept, log_probs, rtol=0, atol=STEP_NATS / 2 + 1e-4)
        # The order of equally likely tokens is undefined.
        same = (batch.top_ids.flatten(0, 1) == ids).float().mean()
        assert same > 0.99


def test_a_second_student_and_a_second_start_need_no_teacher(
    settings, counted, small_parts, monkeypatch
):
    settings = dataclasses.replace(settings, recipe=TOP)
    first = train(settings)
    # Seven files of eight sequences: the run has 12 steps of 4 and reads one batch ahead.
    assert sum(counted) == 56
    monkeypatch.setattr(teacher, "load_teacher", None)
    second = train(dataclasses.replace(settings, name="other", arch={"layer_types": "FF-"}))
    assert sum(counted) == 56
    assert first.key != second.key


def test_a_longer_run_adds_what_is_missing(data, backbone, runs, counted, small_parts):
    teacher_of(backbone, data, dataclasses.replace(TOP, tokens=6 * 128), TRAINER, runs)
    assert sum(counted) == 32
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    assert sum(counted) == 56
    endless = dataclasses.replace(
        TOP, tokens=10**6
    )  # several epochs, but each sequence is read only once
    teacher_of(backbone, data, endless, TRAINER, runs)
    assert sum(counted) == len(data.train_set)
    assert taught.missing(10**6) == []


def test_after_a_kill_only_the_unfinished_file_is_done_again(
    data, backbone, runs, counted, small_parts, monkeypatch
):
    answers = teacher._top_k_outputs

    def killed(*args):
        answer = answers(*args)

        def one(sequences):
            if sum(counted) == 20:  # in the third file
                raise KeyboardInterrupt
            return answer(sequences)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_top_k_outputs", killed)
        with pytest.raises(KeyboardInterrupt):
            teacher_of(backbone, data, TOP, TRAINER, runs)
    counted.clear()
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    assert sum(counted) == 56 - 16
    assert all(path.name.startswith("part_") for path in taught.folder.iterdir())


def test_processes_of_a_run_begin_with_different_files(
    data, backbone, runs, small_parts, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    write = teacher.TeacherCache.write

    def noting(self, part, *args):
        written.append(part)
        return write(self, part, *args)

    monkeypatch.setattr(teacher.TeacherCache, "write", noting)
    teacher_of(backbone, data, TOP, TRAINER, runs)
    assert written == [3, 4, 5, 6, 0, 1, 2]


def test_a_stopped_run_resumes_to_the_same_weights(data, backbone, runs, tmp_path, small_parts):
    whole, parts, resumed = make_model(), make_model(), Decoder(make_model().spec)
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    fit(whole, data, TOP, TRAINER, teacher=taught)
    short = dataclasses.replace(TRAINER, max_steps=5)
    fit(parts, data, TOP, short, teacher=taught, folder=tmp_path / "c")
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    fit(resumed, data, TOP, TRAINER, teacher=taught, folder=tmp_path / "c")
    assert same_weights(whole, resumed)


def test_another_text_share_temperature_or_format_is_another_folder(
    data, backbone, runs, small_parts, monkeypatch
):
    changes = [{}, {"kd_top_k": 4}, {"kd_top_p": 0.5}, {"kd_top_p": 0.6}, {"temperature": 2.0}]
    recipes = [dataclasses.replace(TOP, **change) for change in changes]
    folders = {teacher_of(backbone, data, each, TRAINER, runs).folder for each in recipes}
    data.digest = "other"
    folders.add(teacher_of(backbone, data, TOP, TRAINER, runs).folder)
    monkeypatch.setattr(teacher, "FORMAT", teacher.FORMAT + 1)
    folders.add(teacher_of(backbone, data, TOP, TRAINER, runs).folder)
    assert len(folders) == 7


def test_enough_probability_keeps_fewer_tokens_in_smaller_files(
    settings, data, backbone, runs, small_parts
):
    sizes = []
    for p in (None, 0.088):  # of random weights, a token has 1 of 320
        recipe = dataclasses.replace(TOP, kd_top_k=64, kd_top_p=p)
        taught = teacher_of(backbone, data, recipe, TRAINER, runs)
        sizes.append(sum(path.stat().st_size for path in taught.folder.iterdir()))
        batch = taught[taught.members(0)[0]]
        assert batch.top_ids.shape == (32, 64)
        counts = batch.top_log_probs[:, :-1].isfinite().sum(1)
        assert (counts == 64).all() if p is None else len(counts.unique()) > 1
        result = train(dataclasses.replace(settings, recipe=recipe, name=f"cut_{p}"))
        assert result.after.loss < result.before.loss
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5, float("nan")])
def test_a_probability_outside_of_0_to_1_is_refused(p):
    with pytest.raises(InputError, match=r"^kd_top_p=.*: expected a number between 0 and 1"):
        dataclasses.replace(TOP, kd_top_p=p)


def test_a_probability_needs_the_most_tokens():
    with pytest.raises(
        InputError, match=r"^kd_top_k=null: expected a positive integer.*kd_top_p=0.9"
    ):
        dataclasses.replace(RECIPE, kd_top_p=0.9)


def test_a_teacher_that_gives_no_numbers_is_refused(data, backbone, runs, monkeypatch):
    model = backbone.load()
    model.lm_head.weight.data[5] = torch.nan
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: model)
    with pytest.raises(InputError, match=r"^backbone.weights=.*: the teacher's logits are not fin"):
        teacher_of(backbone, data, TOP, TRAINER, runs)
    assert not list(runs.root.rglob("part_*"))


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[:100], lambda whole: whole[:-9] + bytes([255 - whole[-9]]) + whole[-8:]],
    ids=["cut", "flipped"],
)
def test_a_damaged_file_is_named(damage, data, backbone, runs, small_parts):
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    path = taught.path(2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"part_00002.safetensors: missing or damaged"):
        fit(make_model(), data, TOP, TRAINER, teacher=taught)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_one_line_with_workers_too(workers, data, backbone, runs, small_parts):
    taught = teacher_of(backbone, data, TOP, TRAINER, runs)
    path = taught.path(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([255 - whole[-9]]) + whole[-8:])
    data.settings.workers = workers
    with pytest.raises(InputError, match=r"part_00002.safetensors: missing or damaged") as refused:
        fit(make_model(), data, TOP, TRAINER, teacher=taught)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-9]])
def test_a_cut_file_is_made_again(damage, data, backbone, runs, small_parts, counted, caplog):
    path = teacher_of(backbone, data, TOP, TRAINER, runs).path(2)
    whole, before = path.read_bytes(), len(counted)
    path.write_bytes(damage(whole))
    teacher_of(backbone, data, TOP, TRAINER, runs)
    assert path.read_bytes() == whole
    assert sum(counted[before:]) == 8
    assert f"{path}: damaged" in caplog.text


def test_a_top_k_that_cannot_be_stored_is_refused_before_work(settings, counted, tmp_path):
    with pytest.raises(InputError, match=r"kd_top_k=320: expected below the vocabulary of 320"):
        train(dataclasses.replace(settings, recipe=dataclasses.replace(TOP, kd_top_k=320)))
    with pytest.raises(InputError, match=r"^kd_top_k=0: expected a positive integer"):
        dataclasses.replace(TOP, kd_top_k=0)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "def f{i}(x): return x"}}\n' for i in range(400)))
    streamed = DataSettings(
        name="mix",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(path))],
        validation_percent=20,
        validation_sequences=2,
        seq_len=16,
        logical_shards=1,
    )
    with pytest.raises(InputError, match=r"kd_top_k=8: expected null for data.kind=datasets"):
        train(dataclasses.replace(settings, recipe=TOP, data=streamed))
    assert counted == []


def test_a_full_disk_is_seen_before_the_teacher_is_loaded(
    data, backbone, runs, counted, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"kd_top_k=8: needs up to .* GiB in .*expected room"):
        teacher_of(backbone, data, TOP, TRAINER, runs)
    assert counted == []


def test_likeliest_tokens_without_a_teacher_are_refused():
    with pytest.raises(InputError, match=r"^kd_top_k=8: expected null with kd_weight=0.*distill"):
        dataclasses.replace(TOP, kd_weight=0.0)
