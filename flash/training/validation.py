"""Held-out loss of a decoder."""

import math

import torch
from torch.utils.data import DataLoader

from flash.data.batch import collate
from flash.data.corpus import MAX_BATCH, PackedData
from flash.model.decoder import Decoder
from flash.model.losses import Operands, linear_losses
from flash.progress import progress
from flash.rounding.fake import head_operands
from flash.training.result import ValidationMetrics
from flash.training.settings import Precision


@torch.no_grad()
def validate(model: Decoder, data: PackedData, precision: Precision) -> ValidationMetrics:
    """Quality of `model` on all held-out sequences of `data`.

    Args:
        model: Decoder on the device that it is to be evaluated on.
        data: Held-out sequences and the bytes of each token.
        precision: bf16 runs the matrix products in bf16.
    """
    total, tokens, num_bytes = 0.0, 0, 0
    device = next(model.parameters()).device
    batches = DataLoader(
        data.validation_set, batch_size=min(data.batch_size, MAX_BATCH), collate_fn=collate
    )
    for batch in progress(batches, "held-out loss"):
        batch = batch.to(device)
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].flatten()
        before = inputs.flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
            hidden = model.hidden(inputs, documents=batch.document_ids).flatten(0, 1)
            if batch.loss_mask is not None:
                learn = batch.loss_mask.flatten()
                hidden, targets, before = hidden[learn], targets[learn], before[learn]
            student = Operands(*head_operands(model, hidden))
            total += float(linear_losses(student, targets).ce)
        tokens += targets.numel()
        num_bytes += data.bytes.count(before.cpu().numpy(), targets.cpu().numpy())
    bits = total / math.log(2)
    return ValidationMetrics(total / tokens, bits / num_bytes, tokens)
