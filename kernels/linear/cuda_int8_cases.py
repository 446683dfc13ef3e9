"""Shapes for tests and benchmarks of the CUDA int8 head and embedding."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Int8Case:
    """x [tokens, in_features], weight [out_features, in_features], group in-features a scale."""

    tokens: int
    in_features: int
    out_features: int
    group: int


HEAD = [
    Int8Case(1, 2048, 40, 32),
    Int8Case(8, 256, 129, 128),
    Int8Case(3, 192, 300, 64),
    Int8Case(5, 96, 17, 32),
    Int8Case(2, 32, 1, 32),
    Int8Case(8, 160, 33, 32),
    Int8Case(4, 64, 64, 64),
    Int8Case(7, 384, 16, 128),
]
HEAD_BENCHMARK = [
    Int8Case(1, 2048, 248320, 32),
    Int8Case(1, 2048, 248320, 128),
    Int8Case(8, 2048, 248320, 32),
    Int8Case(8, 2048, 248320, 128),
]
EMBEDDING = [
    Int8Case(1, 2048, 40, 32),
    Int8Case(63, 192, 50, 64),
    Int8Case(500, 32, 9, 32),
    Int8Case(1642, 2048, 300, 128),
]


def head_arguments(
    case: Int8Case, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bf16, codes i8, scales bf16."""
    x = torch.randn(case.tokens, case.in_features, generator=generator).bfloat16()
    shape = (case.out_features, case.in_features)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(case.out_features, case.in_features // case.group, generator=generator) * 0.1 - 0.02
    return x, codes, scales.bfloat16()
