"""Compiles a method to one shared library with AOTInductor, its weights outside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError, InductorError
from torch.export import ExportedProgram

from . import contract
from .elf import undefined_symbols
from .errors import ExportError
from .isa import baseline_isa
from .symbols import private_symbols


@dataclass(frozen=True)
class CompiledMethod:
    library: bytes  # of the shared object
    weights: dict[str, Tensor]  # what it reads, by fully qualified name
    state: dict[str, Tensor]  # what it mutates


def compile_method(name: str, program: ExportedProgram) -> CompiledMethod:
    """Compiles the method `name`.

    Raises:
        ExportError: the result would need what the runner does not have, or the C++ compiler failed.
    """
    module = program.module(check_guards=False)
    try:
        with torch.no_grad(), baseline_isa(), private_symbols():
            produced: Any = torch._inductor.aot_compile(
                module, program.example_inputs[0], options=compile_options()
            )
    except (InductorError, CppCompileError) as error:
        raise _cause(name, error) from error
    libraries = [Path(item) for item in produced if isinstance(item, str) and item.endswith(".so")]
    tables = [item for item in produced if isinstance(item, dict)]
    if len(libraries) != 1 or len(tables) != 1:
        raise ExportError(
            f"{name}: Inductor produced {produced}; one library and one table of weights expected"
        )
    _check_symbols(name, libraries[0])
    weights = {key: tensor.detach() for key, tensor in module.named_parameters()}
    state = dict(module.named_buffers())
    _check_constants(name, set(tables[0]), weights, state)
    return CompiledMethod(libraries[0].read_bytes(), weights, state)


def compile_options() -> dict[str, Any]:
    """Inductor's options. `pickle_weights` gives the weights back in memory, by name."""
    return {
        "aot_inductor.link_libtorch": False,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        "aot_inductor.custom_ops_to_c_shims": contract.shim_declarations(),
        "aot_inductor.compile_wrapper_opt_level": "O0",
        # Or weights of up to 8 elements become literals in the code.
        "always_keep_tensor_constants": True,
        # Precompiling headers takes 7 s and leaves 290 MB behind; having them saves 2 s a method.
        "aot_inductor.precompile_headers": False,
        # What Inductor generates is small beside the operators, which have their own threads; and the number
        # of threads would be the exporting machine's.
        "cpp.threads": 1,
    }


def _cause(method: str, error: InductorError | CppCompileError) -> Exception:
    """What a failed compilation ends in: the system's own error (a full disk), else one line of it all."""
    causes: list[BaseException] = [error.inner_exception if isinstance(error, InductorError) else error]
    while not isinstance(causes[-1], OSError | CppCompileError):
        cause = causes[-1].__cause__ or causes[-1].__context__
        if cause is None:
            break
        causes.append(cause)
    if isinstance(causes[-1], OSError):
        return causes[-1]
    text = causes[-1].output if isinstance(causes[-1], CppCompileError) else str(causes[0])
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    reason = next((line for line in lines if "error:" in line), lines[0])
    return ExportError(f"{method}: the compiler failed: {reason}")


def _check_symbols(method: str, library: Path) -> None:
    unknown = sorted(undefined_symbols(library) - contract.ALLOWED_SYMBOLS)
    if unknown:
        raise ExportError(f"{method}: the compiled code calls {', '.join(unknown)}, which no runner has")


def _check_constants(
    method: str, constants: set[str], weights: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """The compiled code's constants must be the model's weights and state, every one and no other."""
    expected = weights.keys() | state.keys()
    for name in sorted(constants ^ expected):
        problem = "is unused" if name in expected else "is neither a weight nor state"
        raise ExportError(f"{method}: constant {name} of the compiled code {problem}")
    for name, tensor in weights.items():
        if not tensor.is_contiguous():
            raise ExportError(f"{method}: weight {name} is not contiguous")
