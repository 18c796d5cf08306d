"""Stage 1 of the search: prediction of the latency of any architecture from few measurements."""
