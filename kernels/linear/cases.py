"""Shapes for tests and benchmarks of the matrix products."""

from dataclasses import dataclass

import torch

from .reference import pack_int4

Arguments = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LinearCase:
    """x [tokens, in_features], weight [out_features, in_features], group in-features a scale."""

    tokens: int
    in_features: int
    out_features: int
    group: int
    dtype: torch.dtype = torch.float32


CORRECTNESS = [
    LinearCase(1, 64, 48, 32),
    LinearCase(1, 256, 1000, 64),
    LinearCase(2, 128, 63, 128),
    LinearCase(63, 96, 33, 32),
    LinearCase(500, 384, 130, 128),
    LinearCase(1000, 64, 17, 32),
    LinearCase(7, 2048, 65, 128, torch.bfloat16),
    LinearCase(1, 2048, 1, 64, torch.bfloat16),
    LinearCase(500, 64, 64, 32, torch.bfloat16),
    LinearCase(1, 24, 40, 8),
    LinearCase(5, 50, 21, 10),
    LinearCase(3, 2, 3, 2),
]
# A decode step and a prefill chunk of Qwen3.5-35B-A3B's projections, and of a small model's.
BENCHMARK = [
    LinearCase(1, 2048, 8192, 32),
    LinearCase(64, 2048, 2048, 32),
    LinearCase(1, 256, 512, 32),
    LinearCase(500, 256, 512, 32),
]


def _x(case: LinearCase, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(case.tokens, case.in_features, generator=generator).to(case.dtype)


def _scales(case: LinearCase, generator: torch.Generator) -> torch.Tensor:
    shape = (case.out_features, case.in_features // case.group)
    return (torch.rand(shape, generator=generator) * 0.1 - 0.02).bfloat16()


def float_arguments(case: LinearCase, weight_dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    weight = torch.randn(case.out_features, case.in_features, generator=generator).to(weight_dtype)
    return _x(case, generator), weight


def int8_arguments(case: LinearCase, generator: torch.Generator) -> Arguments:
    shape = (case.out_features, case.in_features)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return _x(case, generator), codes, _scales(case, generator)


def int4_arguments(case: LinearCase, generator: torch.Generator) -> Arguments:
    shape = (case.out_features, case.in_features)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    return _x(case, generator), pack_int4(codes), _scales(case, generator)


def embedding_arguments(case: LinearCase, generator: torch.Generator) -> Arguments:
    """The case's out_features are the vocabulary, its in_features the hidden size."""
    _, codes, scales = int8_arguments(case, generator)
    return torch.randint(0, case.out_features, (case.tokens,), generator=generator), codes, scales
