import pytest

from flash.data.corpus import PackedData, find_tokenizer
from flash.data.tokenizer import load_tokenizer
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.settings import TrainSettings


@pytest.fixture
def settings(request, backbone_settings, data_settings, tmp_path) -> TrainSettings:
    """Training of a pruned backbone with RECIPE and TRAINER of the test's module."""
    return TrainSettings(
        backbone=backbone_settings,
        data=data_settings,
        recipe=request.module.RECIPE,
        trainer=request.module.TRAINER,
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        arch={"ffn_dim": 64, "layer_types": "F-"},
        name="cut",
        runs=str(tmp_path / "runs"),
    )


@pytest.fixture
def data(data_settings, tmp_path) -> PackedData:
    tokenizer = load_tokenizer(find_tokenizer(data_settings, None, tmp_path))
    return PackedData(data_settings, tokenizer, batch_size=4, seed=0, cache=tmp_path)
