"""Lowering of a decoder: round, export with torch.export, delegate to XNNPACK, serialize.

`lower` runs all steps and returns the bytes of a .pte file. The steps are functions of their own
for the parity gate and for single blocks. Export and the passes change state of the whole process,
so that one thread at a time may run them (`ONE_AT_A_TIME`).
"""

import gc
import threading
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from flash.arch import Quantization
from flash.compat.executorch import (
    clear_compared_nodes,
    clear_refused_nodes,
    edge_compile_config,
    parts_of_file,
)
from flash.compat.torch import clear_fake_tensor_caches
from flash.log_filters import quiet
from flash.lowering.modules import ExportableDecoder
from flash.lowering.patches.export_passes import short_passes, short_tracing
from flash.lowering.patches.partitioner import delegated_symbols
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder
from flash.progress import stage
from flash.records import atomic_write
from flash.rounding.decoder import round_nearest

METHOD = "forward"
"""Name of the only method of a program."""

TRACING, PARTITION, FILE = "torch.export", "partition for XNNPACK", "memory plan and file"
STAGE_SHARES = {TRACING: 0.22, PARTITION: 0.7, FILE: 0.08}
"""Usual shares of the stages in the time of a lowering: those of SmolLM2-135M's shape, 30 layers.
The tiny backbone has 0.30, 0.65 and 0.05."""

ONE_AT_A_TIME = threading.RLock()
"""Lock that is held while tracing and in the passes: both change state of the process."""


def lower(
    model: Decoder,
    lowering: LoweringSettings,
    *,
    bos_id: int = 1,
    eos_ids: Sequence[int] = (2,),
    fast: bool = True,
) -> bytes:
    """Lower `model` to the bytes of a .pte file.

    Its method is `forward(tokens [1, s], input_pos [1]) -> logits [1, vocab]`.

    Args:
        model: Decoder, which `round_decoder` has rounded, or in float32 or bfloat16: then its
            weights are rounded to the nearest integers. Not changed. Weights are freed before the
            passes, where memory peaks, if the caller keeps no reference: `lower(load(), lowering)`.
        lowering: Formats and lengths.
        bos_id: Beginning-of-text token, which the file states for ExecuTorch's own runners.
        eos_ids: Tokens at which ExecuTorch's own runners stop.
        fast: Whether to leave out work of ExecuTorch's passes that changes nothing.

    Raises:
        InputError: `lowering` does not fit the architecture.
    """
    lowering.check_fits(model.spec)
    modules = [quantized_module(model, lowering)]
    constants = runner_constants(model, lowering, bos_id, eos_ids)
    del model  # a caller that keeps no reference has the float weights freed here
    # Nothing here keeps the quantised weights: `serialize` frees them when they are packed.
    return serialize(
        export_module(modules.pop(), lowering, fast=fast), constants=constants, fast=fast
    )


def quantized_module(model: Decoder, lowering: LoweringSettings) -> ExportableDecoder:
    """Build the module that gets exported, runnable in eager mode; it rounds what is in float."""
    module = ExportableDecoder(model, lowering)
    if lowering.quantization is not Quantization.fp32:
        stage("rounding")
        round_nearest(module, lowering.weight_format)
    for parameter in module.parameters():  # programs compute in float32
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()
    return module


def runner_constants(
    model: Decoder, lowering: LoweringSettings, bos_id: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """Constant methods of a program: what ExecuTorch's own LLM runners read, and its provenance."""
    return {
        "flash_arch": model.spec.to_json(),
        "flash_version": version("mobilellm-flash"),
        "get_bos_id": bos_id,
        "get_eos_ids": list(eos_ids),
        "get_vocab_size": model.spec.vocab_size,
        "get_n_layers": model.spec.num_layers,
        # For a runner this is the longest single call, not the context.
        "get_max_seq_len": lowering.chunk,
        "get_max_context_len": lowering.max_context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def export_module(
    module: nn.Module,
    lowering: LoweringSettings,
    first_input: Tensor | None = None,
    *,
    fast: bool = True,
) -> ExportedProgram:
    """Trace `module` with torch.export, for any number of tokens up to a chunk.

    Args:
        module: Its inputs are the tokens (or activations), with the sequence in dimension 1, and
            `input_pos`.
        lowering: Bounds the number of tokens of one call.
        first_input: Example of the first input; token ids if None.
        fast: Whether to leave out repeated work of the tracing.
    """
    length = min(8, lowering.chunk)
    if first_input is None:
        first_input = torch.zeros(1, length, dtype=torch.long)
    example = (first_input[:, :length], torch.zeros(1, dtype=torch.long))
    tokens = Dim("tokens", min=1, max=lowering.chunk)
    stage(TRACING)
    with ONE_AT_A_TIME, torch.no_grad(), quiet(), short_tracing() if fast else nullcontext():
        return export(module, example, dynamic_shapes=({1: tokens}, None), strict=False)


def serialize(
    programs: ExportedProgram | dict[str, ExportedProgram],
    *,
    constants: dict[str, Any] | None = None,
    fast: bool = True,
) -> bytes:
    """Lower exported programs to a .pte: XNNPACK runs what it can, portable kernels the rest.

    Args:
        programs: One program, or several by the name of their method. Their weights are freed
            before the file is put together, if the caller keeps no reference.
        constants: Values that the file returns from methods of these names.
        fast: Whether to leave out work of ExecuTorch's passes that changes nothing.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    stage(PARTITION)
    with ExitStack() as stack:
        for context in (ONE_AT_A_TIME, torch.no_grad(), quiet(), delegated_symbols()):
            stack.enter_context(context)
        if fast:
            stack.enter_context(short_passes())
        edge = to_edge_transform_and_lower(
            programs,
            partitioner=[XnnpackPartitioner()],
            compile_config=edge_compile_config(),
            constant_methods=constants,
        )
        stage(FILE)
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
        _clear_caches([edge.exported_program(name) for name in edge.methods])
        parts = parts_of_file(program)
    del programs, edge, program
    gc.collect()  # the graphs that hold the weights refer to themselves
    return bytes(parts)


def _clear_caches(programs: Sequence[ExportedProgram]) -> None:
    """Clear caches of the process that would otherwise keep all weights until it ends.

    The fake tensors' caches are keyed by the delegates themselves; ExecuTorch's comparison of nodes
    is keyed by the nodes of their graphs, and its partitioner keeps the last node that it refused.
    Eleven models of the paper's size in one process took 24 GB.
    """
    clear_fake_tensor_caches(programs)
    clear_compared_nodes()
    clear_refused_nodes()


def write(path: Path, data: bytes) -> None:
    """Write a program to a file. A kill or a full disk leaves the old file or none, never half."""
    with atomic_write(path) as file:
        file.write(data)
