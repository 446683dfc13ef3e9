"""Which instructions compiled code may use: a named level of x86-64, not all that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import cpp_builder, cpu_vec_isa

from . import contract

# GCC's architecture level of each name in a manifest.
_LEVELS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}


def host_isa() -> str:
    """The best level of this machine: "avx512", "avx2" or "default" (the compiler's own baseline)."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in _LEVELS else "default"


def program_isa(target: str) -> str:
    """The level that a program for `target` compiled here needs; a cuda program's code computes nothing."""
    return host_isa() if target == contract.CPU else "default"


@contextmanager
def baseline_isa(isa: str) -> Iterator[None]:
    """Compiles for the level `isa` alone.

    Inductor passes -march=native, where a program must run on every machine of its level. And it writes its
    loops in terms of PyTorch's vector classes, whose elementary functions are Sleef's, inside libtorch: with
    no vector extension to offer it writes plain loops, which the compiler vectorizes if it is let.
    """
    march = _LEVELS.get(isa)
    flags_of = cpp_builder._get_optimization_cflags

    def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compile_flags, link_flags = flags_of(*args, **kwargs)
        kept = [flag for flag in compile_flags if flag not in ("march=native", "fno-tree-loop-vectorize")]
        return kept + ([f"march={march}"] if march else []), link_flags

    with (
        patch.object(cpp_builder, "_get_optimization_cflags", flags),
        patch.object(cpu_vec_isa, "valid_vec_isa_list", list),
    ):
        yield
