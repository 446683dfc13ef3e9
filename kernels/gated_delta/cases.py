"""Shapes for tests and benchmarks of the gated delta rule."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GatedDeltaCase:
    """`rows` tokens: consecutive ones of the last of `slots`, or, if `batched`, one of each slot."""

    rows: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    slots: int = 2
    dtype: torch.dtype = torch.float32
    batched: bool = False


CORRECTNESS = [
    GatedDeltaCase(1, 2, 4, 32, 32),
    GatedDeltaCase(2, 2, 2, 16, 24),
    GatedDeltaCase(63, 1, 4, 64, 128),
    GatedDeltaCase(65, 4, 8, 24, 10, taps=3),
    GatedDeltaCase(500, 2, 4, 32, 64),
    GatedDeltaCase(1000, 1, 2, 16, 16, taps=1),
    GatedDeltaCase(5, 2, 2, 8, 8, taps=9),
    GatedDeltaCase(130, 2, 6, 128, 128, dtype=torch.bfloat16),
    GatedDeltaCase(1, 2, 4, 32, 32, dtype=torch.bfloat16),
    GatedDeltaCase(3, 2, 4, 32, 40, slots=3, batched=True),
    GatedDeltaCase(2, 1, 2, 16, 48, slots=2, batched=True, dtype=torch.bfloat16),
]
BENCHMARK = [
    GatedDeltaCase(1, 16, 32, 128, 128, slots=1),
    GatedDeltaCase(500, 16, 32, 128, 128, slots=1),
    GatedDeltaCase(1, 4, 8, 32, 32, slots=1),
    GatedDeltaCase(500, 4, 8, 32, 32, slots=1),
]


def arguments(case: GatedDeltaCase, generator: torch.Generator) -> tuple[Any, ...]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels = 2 * case.key_heads * case.key_dim + case.value_heads * case.value_dim
    slot = torch.arange(case.slots).flip(0) if case.batched else torch.tensor([case.slots - 1])
    return (
        normal(case.rows, channels).to(case.dtype),
        normal(case.rows, case.value_heads).to(case.dtype),
        normal(case.rows, case.value_heads).to(case.dtype),
        (normal(channels, case.taps) * 0.5).to(case.dtype),
        torch.empty(case.value_heads).uniform_(0.01, 16, generator=generator).log().to(case.dtype),
        normal(case.value_heads).to(case.dtype),
        normal(case.slots, channels, case.taps - 1).to(case.dtype),
        normal(case.slots, case.value_heads, case.key_dim, case.value_dim) * 0.1,
        slot,
        case.key_heads,
    )
