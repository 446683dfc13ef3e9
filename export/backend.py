"""The ExecuTorch backend: compiles a whole method to one shared library with AOTInductor.

The library goes into the .pte, keyed by its digest; the weights go beside it into the .ptd, keyed by their fully
qualified name, once for both methods; mutated buffers (state) go nowhere: the runner allocates them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch import Tensor, fx
from torch.export import ExportedProgram

from . import contract
from .elf import undefined_symbols
from .errors import ExportError
from .isa import baseline_isa

METHOD_KEY = "method"


@dataclass
class Compilation:
    """What the methods of one program share while they are compiled one after the other.

    on_method: called with a method's name before it is compiled.
    stored: names of the weights already handed over, which the next method refers to.
    """

    on_method: Callable[[str], None]
    stored: set[str] = field(default_factory=set)


_current: ContextVar[Compilation] = ContextVar("compilation")


@contextmanager
def compiling(on_method: Callable[[str], None]) -> Iterator[None]:
    """Scope of one program's lowering: ExecuTorch calls the backend with nothing but compile specs."""
    token = _current.set(Compilation(on_method))
    try:
        yield
    finally:
        _current.reset(token)


class QwenAotiBackend(BackendDetails):
    """Found by ExecuTorch by its name, `contract.BACKEND_ID`."""

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """Compiles one method; raises ExportError where the result would need what the runner does not have."""
        method = next(spec.value.decode() for spec in compile_specs if spec.key == METHOD_KEY)
        compilation = _current.get()
        compilation.on_method(method)
        leave_edge_dialect(edge_program.graph_module.graph)
        library, constants = _compile(edge_program)
        _check_symbols(method, library)
        state = sorted(set(edge_program.graph_signature.buffers_to_mutate.values()))
        weights = sorted(set(constants) - set(state))
        _check_weights(method, edge_program, weights)

        store = NamedDataStore()
        code = library.read_bytes()
        library_key = f"library-{hashlib.sha256(code).hexdigest()}"
        store.add_named_data(library_key, code, alignment=contract.WEIGHT_ALIGNMENT)
        for name in weights:
            if name not in compilation.stored:
                compilation.stored.add(name)
                store.add_named_data(
                    name, constants[name], contract.WEIGHT_ALIGNMENT, external_tag=contract.WEIGHTS_TAG
                )
        signature = edge_program.graph_signature
        description = {
            "method": method,
            "library": library_key,
            "weights": weights,
            "state": [_describe(name, edge_program.state_dict[name]) for name in state],
            "inputs": len(signature.user_inputs),
            "outputs": len(signature.user_outputs),
        }
        return PreprocessResult(
            processed_bytes=json.dumps(description).encode(),
            debug_handle_map={},
            data_store_output=store.get_named_data_store_output(),
        )


def leave_edge_dialect(graph: fx.Graph) -> None:
    """Replaces edge operators by ATen's, and copying views by views.

    Inductor knows no `select_copy` and its like, and would materialize a `t_copy` of a weight at every run.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target._op if isinstance(node.target, EdgeOpOverload) else node.target
        if isinstance(target, torch._ops.OpOverload):
            target = _view_of(target)
        node.target = target


def _view_of(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The view whose result `operator` copies; `operator` itself where it is no such copy."""
    name = operator._schema.name.removeprefix("aten::")
    if operator.namespace != "aten" or not name.endswith("_copy"):
        return operator
    packet = getattr(torch.ops.aten, name.removesuffix("_copy"), None)
    view = getattr(packet, operator._overloadname, None)
    if view is None or view._schema.returns[0].alias_info is None:
        return operator
    return view


def _compile(program: ExportedProgram) -> tuple[Path, dict[str, Tensor]]:
    """The compiled library, and its constants (weights and state) by fully qualified name."""
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    with torch.no_grad(), baseline_isa():
        produced = torch._inductor.aot_compile(
            program.module(check_guards=False), tuple(inputs), options=compile_options()
        )
    libraries = [Path(item) for item in produced if isinstance(item, str) and item.endswith(".so")]
    tables = [item for item in produced if isinstance(item, dict)]
    if len(libraries) != 1 or len(tables) != 1:
        raise ExportError(f"Inductor produced {produced}: one library and one table of weights expected")
    return libraries[0], {name: tensor for name, (tensor, _) in tables[0].items()}


def compile_options() -> dict[str, Any]:
    return {
        "aot_inductor.link_libtorch": False,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        "aot_inductor.custom_ops_to_c_shims": contract.shim_declarations(),
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }


def _check_symbols(method: str, library: Path) -> None:
    needed = {name for name in undefined_symbols(library) if name.startswith(("aoti_", "AOTI"))}
    unknown = sorted(needed - contract.ALLOWED_SYMBOLS)
    if unknown:
        raise ExportError(f"{method}: the compiled code calls {', '.join(unknown)}, which no runner has")


def _check_weights(method: str, program: ExportedProgram, weights: list[str]) -> None:
    """Every constant must be a weight of the model, whole and in row-major order."""
    for name in weights:
        tensor = program.state_dict.get(name)
        if tensor is None:
            raise ExportError(f"{method}: constant {name} of the compiled code is no weight of the model")
        if not tensor.is_contiguous():
            raise ExportError(f"{method}: weight {name} is not contiguous")


def _describe(name: str, state: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(state.dtype).removeprefix("torch."), "shape": list(state.shape)}
