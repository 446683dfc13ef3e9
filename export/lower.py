"""Lowers a model to an ExecuTorch program: both methods exported over one set of weights, each compiled whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from . import contract
from .backend import METHOD_KEY, compiling
from .model import Model


def lower(
    model: Model, *, chunk: int, metadata: dict[str, int], on_stage: Callable[[str], None]
) -> ExecutorchProgramManager:
    """Compiles `model` for the cpu.

    Args:
        chunk: most tokens of a prefill call.
        metadata: constant methods of the program: `get_<name>` returns the value.
        on_stage: called with what is about to be done.
    """
    from executorch.backends.aoti.aoti_partitioner import AotiPartitioner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_stage("trace prefill and decode")
        methods = trace(model, chunk)
        partitioners = {
            name: [AotiPartitioner(contract.BACKEND_ID, [CompileSpec(METHOD_KEY, name.encode())])]
            for name in methods
        }
        with compiling(lambda name: on_stage(f"compile {name}")):
            edge = to_edge_transform_and_lower(
                methods,
                partitioner=partitioners,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods={f"get_{name}": value for name, value in metadata.items()},
            )
        on_stage("assemble the program")
        return edge.to_executorch(ExecutorchBackendConfig())


def trace(model: Model, chunk: int) -> dict[str, ExportedProgram]:
    """Both methods of `model`, by name. Prefill takes 2 to `chunk` tokens, and is traced at the most."""
    length = Dim("T", min=2, max=chunk)
    with torch.no_grad():
        prefill = export(
            model,
            _example_inputs(chunk),
            dynamic_shapes=({1: length}, *(None for _ in contract.ROW_INPUTS)),
        )
        decode = export(model, _example_inputs(1))
    return {contract.PREFILL: prefill, contract.DECODE: decode}


def _example_inputs(length: int) -> tuple[Tensor, ...]:
    rows = [torch.zeros(1, dtype=dtype) for dtype in contract.ROW_INPUTS.values()]
    return (torch.zeros(1, length, dtype=torch.int64), *rows)
