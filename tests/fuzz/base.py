"""A small project with all files that users have, made once by the commands themselves."""

import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flash.interop.gguf import write_gguf
from flash.interop.settings import GgufFormat
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.model.tokenizer import END_OF_TEXT, ModelTokenizer
from tests.conftest import SMALL
from tests.fuzz.attempt import Attempt, Ending, run

COMMON = """\
# @package _global_
backbone: {name: small, weights: hf}
data:
  kind: shards
  path: shards
  seq_len: 32
  validation_sequences: 8
logger: {kind: none}
trainer: {precision: fp32, checkpoint_every_steps: 1}
"""
RECIPE = "{tokens: 512, batch_size: 4, lr: 3.0e-3, calibration_tokens: 256}"
DEVICE = """\
device:
  processes: 1
  warmups: 1
  runs: 2
  lowering: {max_context: 64}
  workload: {prompts: [32], contexts: [32], decode_tokens: 4}
"""
OPTIONS = {
    "search/experiment": f"""{COMMON}
recipe: {RECIPE}
{DEVICE}
space:
  num_layers: {{min: 1, max: 2}}
  model_dim: {{min: 32, max: 64, step: 32}}
  ffn_dim: {{min: 64, max: 128, step: 64}}
  kinds: [full_attention, skip_attention]
  max_efficient_run: 1
latency: {{grid_widths: 2, grid_ffn: 2, calibration_models: 2, precision_pct: 1000.0}}
search:
  study: small
  trials: 3
  batch: 1
  startup_trials: 2
  winners: 1
  max_loss_increase: 50.0
  max_cost_ratio: 5.0
""",
    "train/experiment": f"{COMMON}\nrecipe: {RECIPE}\n",
    "export/experiment": f"""{COMMON}
{DEVICE}
gate: {{prefill_tokens: 8, decode_tokens: 4, min_agreement_quantized: 0.0}}
perplexity_tokens: 64
""",
    "space": "num_layers: {min: 1, max: 2}\nmodel_dim: {min: 32, max: 64, step: 32}\n",
    "arch": "layer_types: FF\nffn_dim: 64\n",
    "data": "kind: datasets\nsources: [{path: texts/*.jsonl}]\nseq_len: 32\n"
    "validation_percent: 20\n",
    "recipe": f"{RECIPE[1:-1]}\n".replace(", ", "\n"),
}
"""Options of the project's own, all with the name `small`."""
FORMATS = ["executorch", "hf", *(["gguf"] if find_spec("llama_cpp") else [])]
"""Formats of the exported model; a GGUF file is checked in llama.cpp, which few machines have."""
EXPORT = ["export", "experiment=small", "model=small", f"format=[{','.join(FORMATS)}]"]
COMMANDS = (
    ["prepare", "data=small", "data.name=small", "backbone.weights=hf", "out=shards"],
    ["search", "experiment=small"],
    ["train", "experiment=small", "+arch=small", "recipe.kd_top_k=4", "name=small"],
    EXPORT,
)
"""Commands whose results the project has."""


def make(folder: Path) -> None:
    """Make the project, unless the folder has it.

    Args:
        folder: Folder to make.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    _make_inputs(partial)
    for arguments in COMMANDS:
        ending = _run_in(partial, arguments)
        if ending.code != 0:
            raise AssertionError(f"flash {' '.join(arguments)}\n{ending.errors[-4000:]}")
    with closing(sqlite3.connect(partial / "runs" / "studies" / "small" / "study.db")) as study:
        study.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # one file, to be changed
    partial.rename(folder)


def _run_in(folder: Path, arguments: list[str]) -> Ending:
    def prepare(work: Path) -> list[str]:
        work.rmdir()
        work.symlink_to(folder.resolve(), target_is_directory=True)
        return arguments

    with TemporaryDirectory() as scratch:
        return run(Attempt("", prepare, timeout_s=600.0), Path(scratch) / "a")


def _tokenizer(texts: list[str]) -> Tokenizer:
    """Tokenizer with the pre-tokenizer of GPT-2, which GGUF files can have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _make_inputs(folder: Path) -> None:
    texts = [
        "".join(f"def f{j}(x):\n    return x + {i * j % 61}\n" for j in range(30))
        for i in range(60)
    ]
    for name in ("texts", "chats", "odd"):
        (folder / name).mkdir(parents=True)
    torch.manual_seed(0)
    _tokenizer(texts).save(str(folder / "bpe.json"))
    tokenizer = ModelTokenizer.open(folder / "bpe.json")
    model = Decoder(SMALL)
    save(folder / "hf", SMALL, state_to_save(model, torch.bfloat16), tokenizer=tokenizer)
    (folder / "bpe.json").unlink()
    own = ModelTokenizer.open(folder / "hf" / "tokenizer.json")
    write_gguf(folder / "model.gguf", model, tokenizer=own, weight_format=GgufFormat.q4_0)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts" / "a.jsonl").write_text(rows, "utf-8")
    (folder / "odd" / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "odd" / "a.txt").write_text("\n\n".join(texts), "utf-8")
    pq.write_table(pa.table({"text": texts}), folder / "odd" / "a.parquet")
    chats = [
        {
            "messages": [
                {"role": "user", "content": text[:9]},
                {"role": "assistant", "content": text},
            ]
        }
        for text in texts
    ]
    (folder / "chats" / "a.jsonl").write_text(
        "".join(json.dumps(chat) + "\n" for chat in chats), "utf-8"
    )
    for group, text in OPTIONS.items():
        path = folder / "conf" / group / "small.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
