"""Latency-aware design of language models for phones (method of arXiv:2603.15954)."""
