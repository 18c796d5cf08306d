"""Shared fixtures: a small corpus, a small backbone, and settings that run in seconds."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from flash.arch import ArchSpec, parse_pattern
from flash.data.settings import DataKind, DataSettings
from flash.data.tokenizer import train_tokenizer
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.model.tokenizer import ModelTokenizer

SMALL = ArchSpec(
    model_dim=64,
    ffn_dim=128,
    layer_types=parse_pattern("FFF"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=320,
    sliding_window=16,
    max_context=128,
)


def opened(tokenizer: Tokenizer, folder: Path) -> ModelTokenizer:
    """Save a tokenizer in a folder and open it, as the product does."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return ModelTokenizer.open(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder of forty small files of text with some structure to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"def f{j}(x):\n    return x + {(i * j) % 7}\n" for j in range(40)]
        (folder / f"file{i}.py").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture
def data_settings(corpus) -> DataSettings:
    return DataSettings(
        name="test",
        kind=DataKind.folder,
        path=str(corpus),
        validation_percent=20,
        seq_len=32,
        bpe_vocab_size=320,
        validation_sequences=8,
    )


@pytest.fixture(scope="session")
def backbone_folder(corpus, tmp_path_factory) -> Path:
    """Hugging Face folder with random weights and a tokenizer trained on the corpus."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = folder / "bpe.json"
    texts = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    train_tokenizer(texts, 320).save(str(tokenizer))
    model = Decoder(SMALL)
    save(
        folder / "hf",
        SMALL,
        state_to_save(model, torch.bfloat16),
        tokenizer=ModelTokenizer.open(tokenizer),
    )
    return folder / "hf"


@pytest.fixture
def backbone_settings(backbone_folder) -> BackboneSettings:
    return BackboneSettings(name="small", weights=str(backbone_folder))
