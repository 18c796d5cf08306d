"""Evaluation of decoders and exported programs with lm-evaluation-harness."""
