"""ExecuTorch's own LLM runner continues text as the decoder does."""

import json
import string

import torch

from flash.device.stock_runner import generate_text
from tests.model.greedy import generate

LETTERS = "_^" + string.ascii_letters + string.digits


def write_tokenizer(path):
    """One token a character, so that every token is printable and the runner shows them all."""
    path.write_text(
        json.dumps({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "model": {
                "type": "BPE",
                "vocab": {letter: i for i, letter in enumerate(LETTERS)},
                "merges": [],
            },
        })
    )


def test_stock_runner_continues_text_as_the_decoder_does(model, program, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    prompt = "helloFlash42"  # longer than one chunk
    ids = [LETTERS.index(letter) for letter in prompt]
    out = generate(model, torch.tensor([ids]), 10)[0, len(ids) :].tolist()
    expected = out[: out.index(0) + 1] if 0 in out else out
    text, statistics = generate_text(program, tmp_path / "tokenizer.json", prompt, 10)
    assert text == "".join(LETTERS[token] for token in expected)
    assert statistics["prompt_tokens"] == len(prompt)
