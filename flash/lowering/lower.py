"""`lower`: a decoder as the bytes of one ExecuTorch program."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from flash.log_filters import quiet
from flash.lowering.modules import ExportableDecoder
from flash.lowering.patches.export_passes import short_passes
from flash.lowering.patches.partitioner import delegated_symbols
from flash.lowering.quantize import quantize
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder
from flash.records import atomic_write

log = logging.getLogger(__name__)

METHOD = "forward"

ONE_AT_A_TIME = threading.RLock()
"""Held while tracing and in the passes: both change state of the process."""


def lower(
    model: Decoder,
    settings: LoweringSettings,
    *,
    bos_id: int = 1,
    eos_ids: Sequence[int] = (2,),
    fast: bool = True,
) -> bytes:
    """The .pte of `model`: method `forward(tokens [1, s], input_pos [1]) -> logits [1, vocab]`.

    An architecture that the settings do not fit is an InputError.

    Args:
        model: Weights in float32; not changed. They are freed before the passes, where memory
            peaks, if the caller keeps no reference: `lower(load(), settings)`.
        settings: Formats and lengths.
        bos_id: Beginning-of-text token that stock runners are told of.
        eos_ids: Tokens at which stock runners stop.
        fast: Whether to leave out work of ExecuTorch's passes that changes nothing.
    """
    settings.check_fits(model.spec)
    form = quantized_form(model, settings)
    constants = runner_constants(model, settings, bos_id, eos_ids)
    del model  # a caller that keeps no reference has the float weights freed here
    return serialise(export_form(form, settings), settings, constants=constants, fast=fast)


def quantized_form(model: Decoder, settings: LoweringSettings) -> ExportableDecoder:
    """What gets exported, runnable in eager mode: the form with its weights quantised."""
    with quiet():
        return quantize(ExportableDecoder(model, settings), settings)


def runner_constants(
    model: Decoder, settings: LoweringSettings, bos_id: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """Constant methods: what ExecuTorch's stock LLM runners ask for, and what the file is."""
    return {
        "flash_arch": model.spec.to_json(),
        "flash_version": version("mobilellm-flash"),
        "get_bos_id": bos_id,
        "get_eos_ids": list(eos_ids),
        "get_vocab_size": model.spec.vocab_size,
        "get_n_layers": model.spec.num_layers,
        # For a runner this is the longest single call, not the context.
        "get_max_seq_len": settings.chunk,
        "get_max_context_len": settings.max_context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def export_form(
    form: nn.Module, settings: LoweringSettings, first_input: Tensor | None = None
) -> ExportedProgram:
    """torch.export's program of `form` with a dynamic number of tokens.

    Args:
        form: Takes the tokens (or activations) with the sequence in dimension 1, and `input_pos`.
        settings: Bounds the number of tokens of one call.
        first_input: Example of the first input; token ids when None.
    """
    length = min(8, settings.chunk)
    if first_input is None:
        first_input = torch.zeros(1, length, dtype=torch.long)
    example = (first_input[:, :length], torch.zeros(1, dtype=torch.long))
    tokens = Dim("tokens", min=1, max=settings.chunk)
    started = time.perf_counter()
    with ONE_AT_A_TIME, torch.no_grad(), quiet():
        program = export(form, example, dynamic_shapes=({1: tokens}, None), strict=False)
    log.debug("exported in %.1f s", time.perf_counter() - started)
    return program


def serialise(
    programs: ExportedProgram | dict[str, ExportedProgram],
    settings: LoweringSettings,
    *,
    constants: dict[str, Any] | None = None,
    fast: bool = True,
) -> bytes:
    """Delegate what XNNPACK can run and write the rest for the portable kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    started = time.perf_counter()
    with ExitStack() as stack:
        for context in (ONE_AT_A_TIME, torch.no_grad(), quiet(), delegated_symbols()):
            stack.enter_context(context)
        if fast:
            stack.enter_context(short_passes())
        edge = to_edge_transform_and_lower(
            programs,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=constants,
        )
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        data = bytes(program.buffer)
        _forget([edge.exported_program(name) for name in edge.methods])
    log.debug("lowered in %.1f s, %d bytes", time.perf_counter() - started, len(data))
    return data


def _forget(programs: Sequence[ExportedProgram]) -> None:
    """Drop caches that would keep all weights for good: they live as long as the process.

    Those of fake tensors are keyed by the delegates themselves, ExecuTorch's comparison of nodes by
    nodes of their graphs. Eleven models of the paper's size in one process took 24 GB.
    """
    from executorch.exir.backend.utils import is_same_node
    from torch._subclasses import FakeTensorMode

    FakeTensorMode.cache_clear()
    is_same_node.cache_clear()
    for program in programs:
        for node in program.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.fake_tensor_cache.clear()


def write(path: Path, data: bytes) -> None:
    """Write a program; a kill or a full disk leaves the old file or none, never half of one."""
    with atomic_write(path) as file:
        file.write(data)
