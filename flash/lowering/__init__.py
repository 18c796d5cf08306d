"""Lowering of a decoder to an XNNPACK program (.pte), whole or in blocks, and its parity gate."""
