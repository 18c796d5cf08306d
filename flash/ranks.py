"""Rank of this process among those of one run, from the environment alone."""

import os


def is_main_process() -> bool:
    """Whether this process is the first of its run: the one that prints and writes.

    Lightning starts the others with the same command and these variables; so do Slurm and torchrun.
    """
    names = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)
