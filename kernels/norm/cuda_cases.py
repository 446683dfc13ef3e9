"""Shapes for tests and benchmarks of the CUDA norms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NormCase:
    """x [tokens, d]."""

    tokens: int
    d: int


@dataclass(frozen=True)
class GatedNormCase:
    """x [tokens, heads, dim]; the gate has `other` more columns a token."""

    tokens: int
    heads: int
    dim: int
    other: int


NORM = [NormCase(1, 2048), NormCase(63, 192), NormCase(5, 32), NormCase(3, 2080), NormCase(2, 5120)]
GATED_NORM = [
    GatedNormCase(1, 32, 128, 8192),
    GatedNormCase(63, 4, 64, 384),
    GatedNormCase(5, 3, 8, 0),
    GatedNormCase(3, 5, 16, 16),
    GatedNormCase(2, 2, 256, 64),
    GatedNormCase(7, 1, 48, 8),
]
NORM_BENCHMARK = [NormCase(1642, 2048)]
GATED_NORM_BENCHMARK = [GatedNormCase(1642, 32, 128, 8192)]
