"""Benchmarks of lm-evaluation-harness on decoders and on their programs."""
