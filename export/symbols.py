"""Gives the functions that compiled code takes from the runner names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._inductor import cpp_builder

from . import contract


@contextmanager
def private_symbols(target: str) -> Iterator[None]:
    """Compiles every call of `aoti_torch_*` as one of the runner's own function for `target`.

    PyTorch defines the same names, and a Python process may have made them global (loading an operator
    library through `torch.ops` does): the dynamic linker would take PyTorch's before the runner's, whose
    handles they cannot read. For the same reason the library's calls of its own functions stay inside it, and
    the C++ library is the process's: where only the static one is at hand, each would get a second. And no
    symbol is GNU's unique kind, whose library `dlclose` never unloads (clang makes none, nor knows the flag).
    """
    flags_of = cpp_builder._get_optimization_cflags
    renamed = [f"D{name}={contract.runner_symbol(name, target)}" for name in sorted(contract.shims(target))]

    def flags(compiler: str, *args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compile_flags, link_flags = flags_of(compiler, *args, **kwargs)
        own = [*renamed, "fno-gnu-unique"] if cpp_builder._is_gcc(compiler) else renamed
        return compile_flags + own, [*link_flags, "Wl,-Bsymbolic", "l:libstdc++.so.6"]

    with patch.object(cpp_builder, "_get_optimization_cflags", flags):
        yield
