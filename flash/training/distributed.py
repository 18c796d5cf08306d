"""Several devices: Lightning's strategies, and how a decoder is shared out among them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flash.errors import InputError
from flash.model.decoder import Decoder, Layer
from flash.training.settings import Precision, TrainerSettings
from flash.training.settings import Strategy as Kind


def check_devices(trainer: TrainerSettings) -> None:
    """See that this machine has the devices that it is to train on.

    Raises:
        InputError: It has not.
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


def main_device(trainer: TrainerSettings) -> torch.device:
    """Where the main process evaluates a whole model."""
    return torch.device("cuda" if trainer.accelerator in {"gpu", "cuda"} else "cpu")


def own_device(trainer: TrainerSettings) -> torch.device:
    """Where this process works on a whole model, before Lightning has begun."""
    device = main_device(trainer)
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device(device.type, int(number)) if device.type == "cuda" else device


def share_of_run() -> float:
    """Where in the run's row of processes this one stands, from 0 to below 1."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    return rank / max(size, rank + 1)


def wait_for_others() -> None:
    """Until all processes of the run are here; nothing to wait for where there is one."""
    if dist.is_initialized():
        dist.barrier()


def make_strategy(trainer: TrainerSettings) -> Strategy | str:
    """Lightning's strategy for these settings."""
    match trainer.strategy:
        case Kind.auto:
            return "auto"
        case Kind.ddp:
            return DDPStrategy()
        case Kind.fsdp:
            return FullyShardedStrategy(trainer.devices * trainer.nodes)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are those of one process: they can be resumed on any number.

    Lightning numbers optimiser states in the order of the model's parameters; PyTorch's optimisers,
    and so its own other strategies, in the order of their groups.

    Args:
        ranks: Processes that share the model.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state as one process would have it; on other ranks nothing."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank != 0:
            return state
        names = [name for group in state["param_groups"] for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and optimiser states into their shards; returns the checkpoint."""
        assert self.model is not None
        path = self.broadcast(str(checkpoint_path))
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            named = _renamed(state, dict(enumerate(order)))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimiser's state with other names for its parameters."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def lightning_precision(trainer: TrainerSettings) -> Any:
    """What Lightning is told: shared-out weights are cast by FSDP, not by autocast."""
    return "32-true" if trainer.strategy is Kind.fsdp else trainer.precision.value


def shard(model: Decoder, mesh: DeviceMesh, precision: Precision) -> None:
    """Share out `model` layer by layer (FSDP2), in place.

    What is left (embedding, final norm, head) is gathered for the whole step, as the loss needs the
    head after the layers are done.
    """
    half = torch.bfloat16 if precision is Precision.bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for layer in cast(Iterable[Layer], model.model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def whole(norm: Tensor) -> Tensor:
    """A value that may be spread over ranks, as a plain tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather(model: Decoder) -> dict[str, Tensor]:
    """All weights of a shared-out model on the main process (elsewhere none); all ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
