"""Shapes of the CUDA decode projections of linear attention, for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProjectionCase:
    """x [rows, hidden]; int4 weights in groups of `group`."""

    rows: int
    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    group: int

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_size

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim


SMALL = [
    ProjectionCase(1, 64, 2, 4, 16, 16, 4, 32),
    ProjectionCase(3, 96, 1, 4, 16, 8, 4, 32),
    ProjectionCase(2, 192, 2, 4, 64, 64, 4, 32),
    ProjectionCase(8, 64, 1, 2, 32, 32, 2, 64),
    ProjectionCase(5, 128, 2, 2, 32, 64, 3, 128),
    ProjectionCase(1, 32, 8, 20, 128, 128, 4, 32),
]
FULL = [ProjectionCase(rows, 2048, 16, 32, 128, 128, 4, group) for rows in (1, 8) for group in (32, 128)]
