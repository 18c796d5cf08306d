"""Devices that training can use: checks, and the place of a whole model."""

import os

import torch
import torch.distributed as dist

from flash.errors import InputError
from flash.training.settings import TrainerSettings


def check_devices(trainer: TrainerSettings) -> None:
    """Check that this machine has the devices that `trainer` asks for.

    Raises:
        InputError: It has fewer.
    """
    if trainer.accelerator not in {"gpu", "cuda"}:
        return
    found = torch.cuda.device_count()
    if found < trainer.devices:
        key = "devices" if found else "accelerator"
        raise InputError(
            f"trainer.{key}={getattr(trainer, key)}: expected {trainer.devices} CUDA device(s), "
            f"found {found}; use fewer, or trainer=cpu"
        )


def uses_cuda(trainer: TrainerSettings) -> bool:
    """True if Lightning takes CUDA devices for `trainer`, also for `accelerator=auto`."""
    named = trainer.accelerator in {"gpu", "cuda"}
    return named or (trainer.accelerator == "auto" and torch.cuda.is_available())


def main_device(trainer: TrainerSettings) -> torch.device:
    """Device on which the main process evaluates a whole model."""
    return torch.device("cuda" if uses_cuda(trainer) else "cpu")


def local_device(trainer: TrainerSettings) -> torch.device:
    """Device of this process for work on a whole model before Lightning has started."""
    device = main_device(trainer)
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device(device.type, int(number)) if device.type == "cuda" else device


def rank_fraction() -> float:
    """Rank of this process divided by the number of processes of the run, from 0 to below 1."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    return rank / max(size, rank + 1)


def wait_for_others() -> None:
    """Wait until all processes of the run have come here; returns at once if there is only one."""
    if dist.is_initialized():
        dist.barrier()
