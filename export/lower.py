"""Lowers a model to an ExecuTorch program: two methods over one set of weights, each compiled whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from . import contract
from .backend import METHOD_KEY, Shell, delegating
from .compile import CompiledMethod, compile_method
from .model import LanguageModel

ASSEMBLE = "assemble the program"
STAGES = (*(f"{verb} {name}" for name in contract.METHODS for verb in ("trace", "compile")), ASSEMBLE)


def lower(
    model: LanguageModel,
    *,
    target: str,
    chunk: int,
    metadata: dict[str, int],
    on_stage: Callable[[str], None],
) -> ExecutorchProgramManager:
    """Compiles `model` for `target`. The values of its weights and state are not looked at.

    Args:
        chunk: most tokens of a prefill call.
        metadata: constant methods of the program: `get_<name>` returns the value. Among them vocab_size.
        on_stage: called with each of `STAGES` as it begins.
    """
    compiled = {}
    for name in contract.METHODS:
        on_stage(f"trace {name}")
        method = trace(model, name, chunk)
        on_stage(f"compile {name}")
        compiled[name] = compile_method(name, method, target)
    on_stage(ASSEMBLE)
    return assemble(compiled, chunk=chunk, metadata=metadata)


def trace(module: nn.Module, method: str, chunk: int) -> ExportedProgram:
    """Exports `module`, which has the inputs of `LanguageModel.forward`, as `method`.

    Prefill takes 2 to `chunk` tokens and is traced at the most: Inductor sizes buffers by what it is shown.
    """
    dynamic: Any = None
    if method == contract.PREFILL and chunk > 2:
        dynamic = ({1: Dim("T", min=2, max=chunk)}, *(None for _ in contract.ROW_INPUTS))
        if isinstance(module, Shell):
            dynamic = (dynamic,)  # its one parameter is `*inputs`
    with torch.no_grad():
        inputs = _example_inputs(chunk if method == contract.PREFILL else 1)
        return export(module, inputs, dynamic_shapes=dynamic)


def assemble(
    methods: dict[str, CompiledMethod], *, chunk: int, metadata: dict[str, int]
) -> ExecutorchProgramManager:
    """The program that delegates to `methods`."""
    shells = {name: trace(Shell(metadata["vocab_size"]), name, chunk) for name in methods}
    partitioners = {
        name: [AotiPartitioner(contract.BACKEND_ID, [CompileSpec(METHOD_KEY, name.encode())])]
        for name in methods
    }
    with delegating(methods):
        edge = to_edge_transform_and_lower(
            shells,
            partitioner=partitioners,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods={f"get_{name}": value for name, value in metadata.items()},
        )
    return edge.to_executorch(ExecutorchBackendConfig())


def _example_inputs(length: int) -> tuple[Tensor, ...]:
    rows = [torch.zeros(1, dtype=dtype) for dtype in contract.ROW_INPUTS.values()]
    return (torch.zeros(1, length, dtype=torch.int64), *rows)
