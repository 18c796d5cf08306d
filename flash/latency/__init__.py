"""Latency of any architecture from few measurements (stage 1 of the search)."""
