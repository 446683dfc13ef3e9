"""Shapes of the CUDA decode router and experts, for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCase:
    """x [rows, hidden]; int4 weights in groups of `group`: it divides hidden and both widths."""

    rows: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int
    group: int


SMALL = [
    DecodeCase(1, 64, 16, 4, 64, 128, 32),
    DecodeCase(1, 192, 16, 4, 64, 128, 32),
    DecodeCase(3, 96, 5, 2, 32, 96, 32),
    DecodeCase(8, 128, 4, 4, 128, 64, 64),
    DecodeCase(2, 128, 3, 1, 128, 256, 128),
    DecodeCase(2, 64, 40, 32, 32, 32, 32),
    DecodeCase(1, 40 * 32, 12, 8, 96, 32, 32),
    DecodeCase(1, 32, 33, 32, 512, 320, 32),
]
FULL = [DecodeCase(rows, 2048, 256, 8, 512, 512, group) for rows in (1, 8) for group in (32, 128)]
# Experts, chosen: as many as there may be, and more or fewer than a warp looks at at once.
ROUTERS = [(1, 1), (8, 8), (33, 32), (256, 8), (257, 6), (1000, 32), (1024, 8)]
