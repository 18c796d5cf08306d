"""Export of finished models: written, proven, measured, judged by their own perplexity."""
