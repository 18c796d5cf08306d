"""Decoder -> torch.export -> XNNPACK program (.pte), whole or in blocks, and its parity gate."""
