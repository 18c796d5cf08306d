"""Smaller vocabularies: every text still decodes to itself, and the backbone's rows stay."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.arch import ArchSpec, parse_pattern
from flash.errors import InputError
from flash.model.checkpoint import load, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer
from flash.prune.vocabulary import cut_backbone, cut_tokenizer, kept_tokens
from tests.interop.test_gguf import byte_level

TEXT = [f"def word{i}(self): return [{i}, 'naïve 好'] # the other thing" for i in range(50)]


@pytest.fixture
def whole(tmp_path) -> ModelTokenizer:
    folder = tmp_path / "whole"
    folder.mkdir()
    backend = byte_level("gpt-2", texts=TEXT * 3, size=420)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return ModelTokenizer.open(folder / "tokenizer.json")


def counts(tokenizer: ModelTokenizer, texts=TEXT) -> np.ndarray:
    ids = [i for text in texts for i in tokenizer.encode(text)]
    return np.bincount(ids, minlength=tokenizer.size)


def smaller(tokenizer: ModelTokenizer, size: int, folder: Path) -> tuple[ModelTokenizer, list[int]]:
    folder.mkdir(exist_ok=True)
    kept = kept_tokens(tokenizer, size, counts(tokenizer))
    return cut_tokenizer(tokenizer, kept, folder), kept


@pytest.mark.parametrize("size", [270, 300, 330])
def test_every_text_decodes_to_itself(whole, tmp_path, size):
    cut, kept = smaller(whole, size, tmp_path / "cut")
    assert len(kept) == cut.size == size
    rng = random.Random(0)
    texts = [*TEXT, *("".join(chr(rng.randrange(1, 0xD800)) for _ in range(40)) for _ in range(50))]
    texts += [bytes(rng.randrange(256) for _ in range(40)).decode("latin-1") for _ in range(50)]
    for text in texts:
        assert cut.decode(cut.encode(text)) == whole.decode(whole.encode(text)) == text
        assert max(cut.encode(text)) < size


def test_kept_tokens_mean_the_same_and_special_ones_stay(whole, tmp_path):
    cut, kept = smaller(whole, 300, tmp_path / "cut")
    for new, old in enumerate(kept):
        assert cut.backend.id_to_token(new) == whole.backend.id_to_token(old)
    special = {token.content for token in whole.backend.get_added_tokens_decoder().values()}
    assert special == {token.content for token in cut.backend.get_added_tokens_decoder().values()}
    end = cut.backend.token_to_id("<|endoftext|>")
    assert (cut.end_of_text, cut.ends) == (end, (end,))
    assert cut.chat_template == whole.chat_template
    assert cut.encode("<|endoftext|>") == [end]


def test_the_most_used_tokens_stay_with_all_that_they_are_merged_from(whole):
    only = ["the other thing"] * 20
    kept = {whole.backend.id_to_token(i) for i in kept_tokens(whole, 285, counts(whole, only))}
    assert {"Ġother", "Ġthing"} <= kept
    made = {a + b: (a, b) for a, b in json.loads(whole.backend.to_str())["model"]["merges"][::-1]}
    for token in kept:
        assert set(made.get(token, ())) <= kept


def test_without_a_text_the_first_merges_stay(whole):
    nothing = np.zeros(whole.size, dtype=int)
    merges = json.loads(whole.backend.to_str())["model"]["merges"]
    kept = {whole.backend.id_to_token(i) for i in kept_tokens(whole, 300, nothing)}
    first = [a + b for a, b in merges if a + b in kept]
    assert first == [a + b for a, b in merges[: len(first)]]


def test_sizes_that_cannot_be_kept_are_refused(whole):
    for size in (200, whole.size + 1):
        with pytest.raises(InputError, match=rf"^vocab_size={size}: expected 2\d\d .*bytes.* to 3"):
            kept_tokens(whole, size, counts(whole))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_cut_backbone_gives_the_same_logits_for_the_tokens_it_has(whole, tmp_path, tied):
    torch.manual_seed(0)
    spec = ArchSpec(
        model_dim=64,
        ffn_dim=96,
        layer_types=parse_pattern("FF"),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=whole.size + 7,  # rows without a token
        tie_embeddings=tied,
    )
    model = Decoder(spec)
    save(tmp_path / "model", spec, state_to_save(model, torch.float32), tokenizer=whole)
    kept = kept_tokens(whole, 300, counts(whole))
    cut_backbone(tmp_path / "model", whole, kept, tmp_path / "cut")
    cut = ModelTokenizer.open(tmp_path / "cut" / "tokenizer.json")
    ids = torch.tensor([cut.encode(TEXT[7])])
    old = torch.tensor(kept)[ids]
    expected = model(old)[..., kept]
    torch.testing.assert_close(load(tmp_path / "cut")(ids), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    stock = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert stock(TEXT[7], add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert stock.eos_token_id == theirs.config.eos_token_id == cut.end_of_text
