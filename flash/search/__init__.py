"""Stage 2: Bayesian optimization that finds the architectures worth training."""
