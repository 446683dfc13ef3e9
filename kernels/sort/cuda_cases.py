"""Shapes for tests and benchmarks of the CUDA sort."""

from dataclasses import dataclass

import torch

DTYPES = {
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
}


@dataclass(frozen=True)
class SortCase:
    """Lines of `length` elements along the middle dimension of [outer, length, inner]."""

    outer: int
    length: int
    inner: int


CORRECTNESS = [
    SortCase(1, 1, 1),
    SortCase(1, 1000, 1),
    SortCase(7, 63, 1),
    SortCase(1, 5, 300),
    SortCase(3, 50, 4),
    SortCase(500, 1, 2),
]
BENCHMARK = [SortCase(1, 248320, 1), SortCase(8, 248320, 1), SortCase(1642, 256, 1)]


def values(case: SortCase, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[outer, length, inner] with extremes, many equals and, of floats, NaN and zeros of both signs."""
    shape = (case.outer, case.length, case.inner)
    choice = torch.randint(4, shape, generator=generator)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        small = torch.randint(-3, 4, shape, generator=generator)
        large = torch.randint(info.min, info.max, shape, generator=generator)
        extreme = torch.where(small > 0, info.max, info.min)
        return torch.where(choice < 2, small, torch.where(choice == 2, large, extreme)).to(dtype)
    normal = torch.randn(shape, generator=generator) * 100
    special = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1e-7])
    picked = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(choice < 2, normal, torch.where(choice == 2, normal.round(), picked)).to(dtype)
