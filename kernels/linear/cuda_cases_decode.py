"""Shapes and inputs of the CUDA decode products with int4 weights, for tests and benchmarks."""

from dataclasses import dataclass

import torch

from .int4_tiles import dequantize_tiles, pack_int4_tiles, pack_scales


@dataclass(frozen=True)
class DecodeCase:
    """x [rows, k] times w [n, k] in groups of `group`."""

    rows: int
    n: int
    k: int
    group: int
    norm: bool = True
    residual: bool = False


# Odd row counts, tile rows and tile columns cut short, all groups, fewer tiles than warps and more.
SMALL = [
    DecodeCase(1, 16, 64, 32),
    DecodeCase(1, 40, 96, 32, residual=True),
    DecodeCase(2, 33, 32, 32, norm=False),
    DecodeCase(8, 70, 192, 64, residual=True),
    DecodeCase(3, 17, 128, 128),
    DecodeCase(5, 100, 384, 128, norm=False, residual=True),
    DecodeCase(1, 48, 1056, 32),
    DecodeCase(7, 24, 2048, 32),
    DecodeCase(1, 24, 4096, 128, residual=True),
]
# Enough tile rows for three a block.
WIDE = [DecodeCase(1, 6350, 64, 32), DecodeCase(2, 6350, 128, 128)]
# Qwen3.5-35B-A3B: query, key, value and gate; output of attention.
FULL = [
    *(DecodeCase(rows, 9216, 2048, group) for rows in (1, 8) for group in (32, 128)),
    DecodeCase(1, 2048, 4096, 32, norm=False, residual=True),
]


@dataclass(frozen=True)
class Int4Weights:
    tiles: torch.Tensor  # u8 [.., N16, K64, 512]
    scales: torch.Tensor  # bf16 [.., N16, ceil64(K) / G, 16]
    dense: torch.Tensor  # f32 [.., N, K]


def int4_weights(*shape: int, group: int, generator: torch.Generator) -> Int4Weights:
    """A random matrix [.., N, K] about as large as a layer's."""
    n, k = shape[-2:]
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = (torch.rand((*shape[:-1], k // group), generator=generator) * 0.4 * k**-0.5).bfloat16()
    tiles, packed = pack_int4_tiles(codes), pack_scales(scales, k)
    return Int4Weights(tiles, packed, dequantize_tiles(tiles, packed, n, k, group))


def norm_weight(k: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(k, generator=generator) * 0.3).bfloat16()


def rows_of(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).bfloat16()
