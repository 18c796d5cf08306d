"""Export of trained models: lowering, parity gate, latency on the device, perplexity."""
