"""Under a real Trainer: what was trained on counts, not what was read ahead."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from flash.data.batch import Batch
from flash.data.corpus import PackedData
from flash.data.module import PackedDataModule
from flash.data.sampler import Share
from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.tokenizer import train_tokenizer
from flash.errors import InputError
from tests.conftest import opened


class Recorder(L.LightningModule):
    """Learns nothing and remembers what it saw: a list of steps of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seen.append([])
        self.seen[-1] += batch.tokens.tolist()
        return self.weight * 1.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def settings_of(folder: Path, kind: str, workers: int = 0) -> DataSettings:
    lines = [f"<{i}>" + " word" * (1 + i * 7 % 40) for i in range(150)]
    if kind == "datasets":
        rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / "texts.jsonl").write_text(rows, "utf-8")
        source = {
            "kind": DataKind.datasets,
            "sources": [TextSourceSettings(path=str(folder / "texts.jsonl"))],
        }
    else:
        texts = folder / "texts"
        texts.mkdir(exist_ok=True)
        for i, line in enumerate(lines):
            (texts / f"{i}.py").write_text(line, "utf-8")
        source = {"kind": DataKind.folder, "path": str(texts)}
    return DataSettings(
        name="t", seq_len=16, validation_sequences=6, logical_shards=4, workers=workers, **source
    )


def data_of(folder: Path, kind: str, workers: int = 0) -> PackedDataModule:
    tokenizer = opened(train_tokenizer([f"a{i} b" for i in range(100)], 320), folder / "tokenizer")
    settings = settings_of(folder, kind, workers)
    data = PackedData(settings, tokenizer, batch_size=4, seed=0, cache=folder)
    return PackedDataModule(data)


def fit(data, folder, steps, accumulation=1, checkpoint=None) -> Recorder:
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=accumulation,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return recorder


def steps_of(recorder: Recorder) -> list[list]:
    return [sorted(map(tuple, step)) for step in recorder.seen]


@pytest.mark.parametrize("kind", ["datasets", "folder"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(kind, tmp_path):
    whole = fit(data_of(tmp_path, kind), tmp_path, steps=9)
    first = fit(data_of(tmp_path, kind, workers=2), tmp_path, steps=4)
    resumed = fit(
        data_of(tmp_path, kind, workers=1),
        tmp_path,
        steps=9,
        accumulation=2,
        checkpoint=tmp_path / "4.ckpt",
    )
    assert steps_of(first) + steps_of(resumed) == steps_of(whole)


@pytest.mark.parametrize("kind", ["datasets", "folder"])
def test_one_data_module_serves_several_runs(kind, tmp_path):
    data = data_of(tmp_path, kind)
    first = fit(data, tmp_path, steps=3)
    assert steps_of(fit(data, tmp_path, steps=3)) == steps_of(first)


def test_checkpoints_of_the_former_version_are_continued(tmp_path):
    """The state of a stream is kept under the names that it had before classes were renamed."""
    fit(data_of(tmp_path, "datasets"), tmp_path, steps=2)
    path = tmp_path / "2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["PackedData"]
    checkpoint["PackedData"] = {"steps": state["steps"], "places": state["stream_states"]}
    torch.save(checkpoint, path)
    resumed = fit(data_of(tmp_path, "datasets"), tmp_path, steps=4, checkpoint=path)
    whole = fit(data_of(tmp_path, "datasets"), tmp_path, steps=4)
    assert steps_of(resumed) == steps_of(whole)[2:]


def test_checkpoints_of_another_mixture_are_refused(tmp_path):
    fit(data_of(tmp_path, "datasets"), tmp_path, steps=1)
    data = data_of(tmp_path, "datasets")
    data.data.train_set = type(data.data.train_set)(**{
        **vars(data.data.train_set),
        "logical_shards": 8,
    })
    with pytest.raises(InputError, match=r"other data\.sources or data\.logical_shards"):
        fit(data, tmp_path, steps=2, checkpoint=tmp_path / "1.ckpt")


@pytest.mark.parametrize(("total", "world_size"), [(6, 1), (6, 4), (7, 2), (5, 5), (6, 5)])
def test_ranks_share_the_held_out_sequences(total, world_size, tmp_path, monkeypatch):
    data = data_of(tmp_path, "folder")
    data.data.validation_set = torch.utils.data.Subset(data.data.train_set, range(total))  # pyright: ignore
    batches = []
    for rank in range(world_size):
        share = Share(60, world_size, rank, accumulation=60 // world_size)
        monkeypatch.setattr(PackedDataModule, "share", share)
        batches.append([batch.tokens for batch in data.val_dataloader()])
    assert len({len(mine) for mine in batches}) == 1  # else collectives would wait for ever
    rows = [tuple(row.tolist()) for mine in batches for batch in mine for row in batch]
    assert sorted(rows) == sorted(tuple(row.tokens.tolist()) for row in data.data.validation_set)
    monkeypatch.setattr(PackedDataModule, "share", Share(60, 10))
    if total < 10:
        with pytest.raises(InputError, match=r"data\.validation_sequences=\d: .*10 ranks"):
            data.val_dataloader()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["datasets", "folder"])
def test_two_real_ranks_see_the_steps_of_one(kind, tmp_path):
    """Two processes over gloo, then one that goes on from their checkpoint."""
    script = textwrap.dedent("""
        import json, sys
        from pathlib import Path
        import lightning as L
        from tests.data.test_resume import Recorder, data_of
        folder, kind = Path(sys.argv[1]), sys.argv[2]
        recorder = Recorder()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_steps=4, accumulate_grad_batches=2,
            use_distributed_sampler=False, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )
        trainer.fit(recorder, datamodule=data_of(folder, kind, workers=1))
        trainer.save_checkpoint(folder / "4.ckpt")
        (folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(recorder.seen))
    """)
    path = tmp_path / "ranks.py"
    path.write_text(script, "utf-8")
    whole = fit(data_of(tmp_path, kind), tmp_path, steps=9)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path), kind],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    steps = [sorted(map(tuple, a + b)) for a, b in zip(*ranks, strict=True)]
    assert steps == steps_of(whole)[:4]
    checkpoint = tmp_path / "4.ckpt"
    resumed = fit(data_of(tmp_path, kind), tmp_path, steps=9, checkpoint=checkpoint)
    assert steps_of(resumed) == steps_of(whole)[4:]
