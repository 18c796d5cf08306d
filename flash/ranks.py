"""Rank of this process in its run, from environment variables alone."""

import os


def is_main_process() -> bool:
    """True for the first process of a run, the one that prints and writes.

    Lightning, Slurm and torchrun all set one of these variables for each process that they start.
    """
    names = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)
