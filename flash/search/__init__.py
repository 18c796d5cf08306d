"""Stage 2: which architectures are worth training, found by Bayesian optimisation."""
