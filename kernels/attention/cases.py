"""Shapes for tests and benchmarks of attention."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionCase:
    """`rows` consecutive tokens of the last of `slots` from `position`, or, if `batched`, one token of each
    slot.
    """

    rows: int
    position: int
    query_heads: int
    key_heads: int
    head_dim: int
    cache_length: int
    slots: int = 2
    dtype: torch.dtype = torch.float32
    batched: bool = False


CORRECTNESS = [
    AttentionCase(1, 0, 4, 2, 32, 8),
    AttentionCase(1, 62, 4, 1, 64, 63),
    AttentionCase(2, 5, 2, 2, 24, 16),
    AttentionCase(63, 0, 8, 2, 32, 64),
    AttentionCase(63, 37, 6, 1, 40, 100),
    AttentionCase(500, 0, 5, 1, 16, 500),
    AttentionCase(1, 999, 4, 2, 256, 1000),
    AttentionCase(63, 500, 8, 1, 64, 600, dtype=torch.bfloat16),
    AttentionCase(1, 130, 3, 3, 32, 200, dtype=torch.bfloat16),
    AttentionCase(3, 17, 4, 2, 32, 40, slots=3, batched=True),
    AttentionCase(4, 70, 4, 1, 32, 90, slots=4, batched=True, dtype=torch.bfloat16),
]
BENCHMARK = [
    AttentionCase(1, 4095, 16, 2, 256, 4096, slots=1),
    AttentionCase(500, 0, 16, 2, 256, 512, slots=1),
    AttentionCase(1, 511, 8, 2, 32, 1024, slots=1),
    AttentionCase(500, 0, 8, 2, 32, 1024, slots=1),
]


def arguments(case: AttentionCase, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    position = torch.tensor([case.position])
    slot = torch.tensor([case.slots - 1])
    if case.batched:
        slot = torch.arange(case.slots).flip(0)
        position = case.position - torch.arange(case.slots)
    return (
        normal(case.rows, case.query_heads, case.head_dim) * 2,
        normal(case.rows, case.key_heads, case.head_dim),
        normal(case.rows, case.key_heads, case.head_dim),
        normal(case.slots, case.key_heads, case.cache_length, case.head_dim),
        normal(case.slots, case.key_heads, case.cache_length, case.head_dim),
        position,
        slot,
    )
