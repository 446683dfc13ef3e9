"""What an ExecuTorch program holds of ours: one delegate call a method, whose payload is compiled apart.

The model never goes through ExecuTorch's edge dialect, which would retrace it a dozen times and turn views
into copies. A method enters the program as a shell, one opaque operator with the method's inputs and outputs;
the backend puts the compiled method in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import contract
from .compile import CompiledMethod

METHOD_KEY = "method"

_INPUTS = ", ".join(f"Tensor {name}" for name in ("tokens", *contract.ROW_INPUTS))
torch.library.define("qwen_export::method", f"({_INPUTS}, int vocab_size) -> (Tensor, Tensor)")


@torch.library.register_fake("qwen_export::method")
def _method(tokens: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, vocab_size = tokens.shape[0], arguments[-1]
    return tokens.new_empty(rows), torch.empty(rows, vocab_size, dtype=torch.float32)


class Shell(nn.Module):
    """A method's inputs and outputs (see `LanguageModel.forward`), and nothing between them."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.qwen_export.method(*inputs, self.vocab_size)


_methods: ContextVar[dict[str, CompiledMethod]] = ContextVar("methods")


@contextmanager
def delegating(methods: dict[str, CompiledMethod]) -> Iterator[None]:
    """Scope in which the backend puts `methods` in place of shells: all it is handed is compile specs."""
    token = _methods.set(methods)
    try:
        yield
    finally:
        _methods.reset(token)


class QwenAotiBackend(BackendDetails):
    """Found by ExecuTorch by its name, `contract.BACKEND_ID`.

    A library goes into the .pte, keyed by its digest. Weights go beside it, where `ptd.py` writes them: the
    library itself says which it reads. State goes nowhere: the runner allocates it.
    """

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        methods = _methods.get()
        name = next(spec.value.decode() for spec in compile_specs if spec.key == METHOD_KEY)
        method = methods[name]
        store = NamedDataStore()
        library_key = f"library-{hashlib.sha256(method.library).hexdigest()}"
        store.add_named_data(library_key, method.library, contract.WEIGHT_ALIGNMENT)
        description = {
            "method": name,
            "library": library_key,
            "state": [
                {"name": key, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
                for key, value in sorted(method.state.items())
            ],
            "inputs": 1 + len(contract.ROW_INPUTS),
            "outputs": 2,
        }
        return PreprocessResult(
            processed_bytes=json.dumps(description).encode(),
            debug_handle_map={},
            data_store_output=store.get_named_data_store_output(),
        )
