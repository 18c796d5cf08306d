"""Tokenizer folders of all kinds are read as transformers reads them, or refused in one line."""

import pytest

from tests.data.odd_tokenizers import FOLDERS, verdict

REFUSED = {
    "wordpiece": "tokenizer.json: model.type=WordPiece: expected BPE or Unigram",
    "no end at all": "names an end-of-text token; set data.end_of_text",
    "a damaged config": "tokenizer_config.json: damaged",
    "an id that is none": "config.json: eos_token_id=</s>: expected the id of a token",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
    found = verdict(FOLDERS[name], tmp_path)
    if name in REFUSED:
        assert found.startswith("refused: ")
        assert REFUSED[name] in found
        assert "\n" not in found
    else:
        assert found == "right"
