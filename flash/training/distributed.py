"""Training on several devices: Lightning's strategies, and the sharding of a decoder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
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

from flash.model.decoder import Decoder, Layer
from flash.training.settings import Precision, TrainerSettings
from flash.training.settings import Strategy as StrategyKind


def make_strategy(trainer: TrainerSettings) -> Strategy | str:
    """Lightning's strategy for `trainer`."""
    match trainer.strategy:
        case StrategyKind.auto:
            return "auto"
        case StrategyKind.ddp:
            return DDPStrategy()
        case StrategyKind.fsdp:
            return FullyShardedStrategy(trainer.devices * trainer.nodes)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 with checkpoints that any number of processes can resume from.

    The files are those of a run on one process. `ModelParallelStrategy` numbers optimizer states in
    the order of the model's parameters, but PyTorch's optimizers, and with them Lightning's other
    strategies, number them in the order of the parameter groups; so does this class.

    Args:
        ranks: Number of processes that share the model.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of the optimizer as one process would have it; empty on other ranks."""
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
        """Load weights and optimizer states into their shards and return the checkpoint."""
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
    """The state of an optimizer, with the keys of its parameters replaced by `names`."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def lightning_precision(trainer: TrainerSettings) -> Any:
    """Lightning's precision flag; with `fsdp`, FSDP casts the weights and autocast stays off."""
    return "32-true" if trainer.strategy is StrategyKind.fsdp else trainer.precision.value


def shard(model: Decoder, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard `model` layer by layer with FSDP2, in place.

    Embedding, final norm and head stay gathered for the whole step, because the loss needs the head
    after the last layer.
    """
    half = torch.bfloat16 if precision is Precision.bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for layer in cast(Iterable[Layer], model.model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def full_tensor(norm: Tensor) -> Tensor:
    """`norm` as a plain tensor; one that is spread over ranks is put together."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather(model: Decoder) -> dict[str, Tensor]:
    """All weights of a sharded model on the main process, and none elsewhere; all ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
