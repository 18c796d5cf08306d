import pytest

from flash.data import PackedData, find_tokenizer, load_tokenizer


@pytest.fixture
def data(data_settings, tmp_path) -> PackedData:
    tokenizer = load_tokenizer(find_tokenizer(data_settings, None, tmp_path))
    return PackedData(data_settings, tokenizer, batch_size=4, seed=0, cache=tmp_path)
