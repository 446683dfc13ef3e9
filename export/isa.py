"""Which instructions the compiled code may use: a named level of x86-64, not everything the exporting machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch._inductor import cpp_builder, cpu_vec_isa

# Inductor's vector class and GCC's architecture level of each name in a manifest.
_LEVELS: dict[str, tuple[type[cpu_vec_isa.VecISA], str]] = {
    "avx512": (cpu_vec_isa.VecAVX512, "x86-64-v4"),
    "avx2": (cpu_vec_isa.VecAVX2, "x86-64-v3"),
}


def host_isa() -> str:
    """The best level of this machine: "avx512", "avx2" or "default" (the compiler's own baseline)."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in _LEVELS else "default"


@contextmanager
def baseline_isa() -> Iterator[None]:
    """Compiles for `host_isa()` alone.

    Inductor passes -march=native and picks the widest extension it can compile and load a probe for. Both are
    replaced: a program must run on every machine of its level, and each probe costs seconds.
    """
    isa = host_isa()
    vector_class, march = _LEVELS.get(isa, (None, None))
    flags_of = cpp_builder._get_optimization_cflags

    def flags(*args: object, **kwargs: object) -> tuple[list[str], list[str]]:
        compile_flags, link_flags = flags_of(*args, **kwargs)
        kept = [flag for flag in compile_flags if flag != "march=native"]
        return kept + ([f"march={march}"] if march else []), link_flags

    levels = [_without_probe(vector_class)] if vector_class else []
    with (
        patch.object(cpp_builder, "_get_optimization_cflags", flags),
        patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: levels),
    ):
        yield


def _without_probe(vector_class: type[cpu_vec_isa.VecISA]) -> cpu_vec_isa.VecISA:
    class Level(vector_class):  # type: ignore[misc, valid-type]
        __hash__ = vector_class.__hash__

        def __bool__(self) -> bool:
            return True

        def build_arch_flags(self) -> str:
            return self._arch_flags

    return Level()
