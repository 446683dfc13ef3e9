"""Compiles a method to one shared library with AOTInductor, its weights outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.exc import CppCompileError, InductorError
from torch.export import ExportedProgram

from . import contract
from .elf import undefined_symbols
from .errors import ExportError
from .isa import baseline_isa, program_isa
from .symbols import private_symbols


@dataclass(frozen=True)
class CompiledMethod:
    library: bytes  # of the shared object
    state: dict[str, Tensor]  # what it mutates: shapes and types


def compile_method(name: str, program: ExportedProgram, target: str = contract.CPU) -> CompiledMethod:
    """Compiles the method `name` of a program for `target`.

    Raises:
        ExportError: the result would need what the runner does not have, or the C++ compiler failed.
    """
    module = program.module(check_guards=False)
    try:
        with (
            torch.no_grad(),
            baseline_isa(program_isa(target)),
            private_symbols(target),
            _generated_kernels() as kernels,
        ):
            produced: Any = torch._inductor.aot_compile(
                module, program.example_inputs[0], options=compile_options(target)
            )
    except (InductorError, CppCompileError) as error:
        raise _cause(name, error) from error
    if target == contract.CUDA and kernels:
        raise ExportError(
            f"{name}: Inductor generated {', '.join(kernels)}, which would run on the CPU; "
            "all that a cuda program computes must be in its blocks"
        )
    libraries = [Path(item) for item in produced if isinstance(item, str) and item.endswith(".so")]
    tables = [item for item in produced if isinstance(item, dict)]
    if len(libraries) != 1 or len(tables) != 1:
        raise ExportError(
            f"{name}: Inductor produced {produced}; one library and one table of weights expected"
        )
    _check_symbols(name, libraries[0], contract.allowed_symbols(target))
    weights, state = dict(module.named_parameters()), dict(module.named_buffers())
    _check_constants(name, set(tables[0]), weights.keys() | state.keys())
    return CompiledMethod(libraries[0].read_bytes(), state)


@contextmanager
def _generated_kernels() -> Iterator[list[str]]:
    """Yields the names of the kernels that Inductor writes for the CPU, as it writes them."""
    names: list[str] = []
    define = CppScheduling.define_kernel

    def define_and_tell(*args: Any, **kwargs: Any) -> str:
        names.append(define(*args, **kwargs))
        return names[-1]

    with patch.object(CppScheduling, "define_kernel", define_and_tell):
        yield names


def compile_options(target: str) -> dict[str, Any]:
    """Inductor's options. `pickle_weights` gives the weights back in memory, by name."""
    return {
        "aot_inductor.link_libtorch": False,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        "aot_inductor.custom_ops_to_c_shims": contract.shim_declarations(target),
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


def _check_symbols(method: str, library: Path, allowed: frozenset[str]) -> None:
    unknown = sorted(undefined_symbols(library) - allowed)
    if unknown:
        raise ExportError(f"{method}: the compiled code calls {', '.join(unknown)}, which no runner has")


def _check_constants(method: str, constants: set[str], expected: set[str]) -> None:
    """The compiled code's constants must be the model's weights and state, every one and no other."""
    for name in sorted(constants ^ expected):
        problem = "is unused" if name in expected else "is neither a weight nor state"
        raise ExportError(f"{method}: constant {name} of the compiled code {problem}")
