"""Lowers a model to an ExecuTorch program: its methods over one set of weights, each compiled whole."""

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


def stages(batch: int) -> tuple[str, ...]:
    """Those of `lower`, in order."""
    methods = contract.methods(batch)
    return (*(f"{verb} {name}" for name in methods for verb in ("trace", "compile")), ASSEMBLE)


def lower(
    model: LanguageModel,
    *,
    target: str,
    chunk: int,
    batch: int,
    metadata: dict[str, int],
    on_stage: Callable[[str], None],
) -> ExecutorchProgramManager:
    """Compiles `model` for `target`. The values of its weights and state are not looked at.

    Args:
        chunk: most tokens of a prefill call.
        batch: most rows of a decode step.
        metadata: constant methods of the program: `get_<name>` returns the value. Among them vocab_size.
        on_stage: called with each of `stages(batch)` as it begins.
    """
    compiled = {}
    for name in contract.methods(batch):
        on_stage(f"trace {name}")
        method = trace(model, name, chunk=chunk, batch=batch)
        on_stage(f"compile {name}")
        compiled[name] = compile_method(name, method, target)
    on_stage(ASSEMBLE)
    return assemble(compiled, chunk=chunk, batch=batch, metadata=metadata)


def trace(module: nn.Module, method: str, *, chunk: int, batch: int) -> ExportedProgram:
    """Exports `module`, which has the inputs of `LanguageModel.forward`, as `method`.

    Prefill takes 2 to `chunk` tokens, a batch 2 to `batch` rows; they are traced at the most: Inductor sizes
    buffers by what it is shown.
    """
    dynamic: Any = None
    rows, length = 1, 1
    if method == contract.PREFILL:
        length = chunk
        if chunk > 2:
            dynamic = ({1: Dim("T", min=2, max=chunk)}, *(None for _ in contract.ROW_INPUTS))
    elif method == contract.DECODE_BATCH:
        rows = batch
        if batch > 2:
            dynamic = ({0: Dim("B", min=2, max=batch)},) * (1 + len(contract.ROW_INPUTS))
    if dynamic is not None and isinstance(module, Shell):
        dynamic = (dynamic,)  # its one parameter is `*inputs`
    with torch.no_grad():
        return export(module, _example_inputs(rows, length), dynamic_shapes=dynamic)


def assemble(
    methods: dict[str, CompiledMethod], *, chunk: int, batch: int, metadata: dict[str, int]
) -> ExecutorchProgramManager:
    """The program that delegates to `methods`."""
    vocab_size = metadata["vocab_size"]
    shells = {name: trace(Shell(vocab_size), name, chunk=chunk, batch=batch) for name in methods}
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


def _example_inputs(rows: int, length: int) -> tuple[Tensor, ...]:
    inputs = [torch.zeros(rows, dtype=dtype) for dtype in contract.ROW_INPUTS.values()]
    return (torch.zeros(rows, length, dtype=torch.int64), *inputs)
