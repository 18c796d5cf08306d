"""Codec of a teacher's likeliest tokens: ids exact, log-probabilities within half a step."""

import lzma

import pytest
import torch

from flash.data.teacher_codec import STEP_NATS, TopTokenCodec
from flash.model.losses import Operands, top_log_probs


def outputs(vocab: int, k: int, top_p: float | None, seed: int = 0):
    torch.manual_seed(seed)
    teacher = Operands(torch.randn(32, 16), torch.randn(vocab, 16))
    return top_log_probs(teacher, k, top_p=top_p)


@pytest.mark.parametrize("top_p", [None, 0.7])
@pytest.mark.parametrize(
    ("vocab", "k"), [(2, 1), (320, 8), (320, 319), (2**16, 16), (2**16 + 1, 16), (202_048, 4)]
)
def test_ids_come_back_and_log_probabilities_to_half_a_step(vocab, k, top_p):
    ids, log_probs = outputs(vocab, k, top_p)
    found, rounded = (codec := TopTokenCodec(k, vocab, 32)).decode(codec.encode(ids, log_probs))
    assert found.dtype == torch.int32
    assert found.tolist() == ids.tolist()
    torch.testing.assert_close(rounded, log_probs, rtol=0, atol=STEP_NATS / 2 + 1e-5)


def test_the_stored_distribution_is_as_close_as_promised():
    _, log_probs = outputs(320, 64, 0.95)
    codec = TopTokenCodec(64, 320, 32)
    rounded = codec.decode(codec.encode(*outputs(320, 64, 0.95)))[1].log_softmax(-1)
    kept = log_probs.isfinite()
    apart = (log_probs.exp() * (log_probs - rounded).masked_fill(~kept, 0)).sum(-1)
    assert 0 < apart.max() <= STEP_NATS**2 / 8


def test_probabilities_of_nothing_and_of_everything_are_kept():
    log_probs = torch.tensor([[0.0, -3000.0, -500.0], [-1e-7, -torch.inf, -2.0]])
    ids = torch.tensor([[319, 0], [7, 7]])
    codec = TopTokenCodec(2, 320, 2)
    found, rounded = codec.decode(codec.encode(ids, log_probs))
    assert found.tolist() == ids.tolist()
    torch.testing.assert_close(rounded, log_probs.to(rounded.dtype), rtol=0, atol=STEP_NATS / 2)


def test_every_flipped_or_missing_byte_is_noticed():
    codec = TopTokenCodec(8, 320, 32)
    whole = codec.encode(*outputs(320, 8, 0.9))
    for i in range(len(whole)):
        broken = bytearray(whole)
        broken[i] ^= 0xFF
        for damaged in (bytes(broken), whole[:i]):
            with pytest.raises((lzma.LZMAError, ValueError)):
                codec.decode(damaged)


@pytest.mark.parametrize(("vocab", "k", "seq_len"), [(300, 8, 32), (320, 4, 32), (320, 8, 64)])
def test_a_sequence_of_other_settings_is_refused(vocab, k, seq_len):
    ids, log_probs = outputs(320, 8, None)
    ids[0, 0] = 319
    encoded = TopTokenCodec(8, 320, 32).encode(ids, log_probs)
    with pytest.raises(ValueError, match=r"other data|equal|mask"):
        TopTokenCodec(k, vocab, seq_len).decode(encoded)
