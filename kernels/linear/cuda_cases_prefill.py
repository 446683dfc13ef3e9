"""Shapes for tests and benchmarks of prefill's matrix products on the GPU."""

from dataclasses import dataclass

import torch

from .int4_tiles import interleave_gate_up, pack_int4_tiles, pack_scales
from .reference import dequantize

Arguments = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class PrefillCase:
    """x [tokens, in_features], W [out_features, in_features], `group` in-features a scale."""

    tokens: int
    in_features: int
    out_features: int
    group: int


# Small enough to emulate: every width of a token tile, one token more or less than a tile, columns and rows
# that do not fill theirs, one step and several.
EMULATED = [
    PrefillCase(1, 32, 24, 32),
    PrefillCase(2, 96, 80, 32),
    PrefillCase(15, 192, 16, 64),
    PrefillCase(17, 128, 33, 128),
    PrefillCase(63, 384, 130, 128),
    PrefillCase(129, 64, 72, 64),
    PrefillCase(130, 192, 1040, 32),
]
# 96 blocks of the widest tile and more.
WIDE = [PrefillCase(1100, 160, 1280, 32), PrefillCase(129, 256, 6152, 128)]
CORRECTNESS = [
    *EMULATED,
    *WIDE,
    PrefillCase(500, 2048, 2048, 64),
    PrefillCase(1000, 4096, 2048, 128),
    PrefillCase(1642, 2048, 9216, 32),
    PrefillCase(4095, 2048, 1024, 128),
]

# Each width of a tile, filled and not, of tokens, features and columns.
FLOAT_EMULATED = [
    PrefillCase(1, 32, 1, 32),
    PrefillCase(9, 1096, 90, 32),
    PrefillCase(16, 200, 40, 32),
    PrefillCase(30, 1096, 23, 32),
    PrefillCase(33, 96, 65, 32),
    PrefillCase(64, 448, 64, 64),
    PrefillCase(150, 224, 70, 32),
    PrefillCase(130, 160, 136, 32),
    PrefillCase(194, 416, 65, 32),
    PrefillCase(1281, 96, 97, 32),
]
FLOAT_CORRECTNESS = [
    *FLOAT_EMULATED,
    PrefillCase(50, 5128, 256, 32),
    PrefillCase(200, 2048, 256, 32),
    PrefillCase(500, 2048, 257, 32),
    PrefillCase(500, 2048, 256, 32),
    PrefillCase(1642, 2048, 64, 32),
    PrefillCase(1642, 2048, 256, 32),
    PrefillCase(4095, 2048, 256, 32),
    PrefillCase(2048, 2048, 1024, 32),
]


def int4_arguments(case: PrefillCase, generator: torch.Generator) -> Arguments:
    """x bf16 [T, K], tiles, packed scales, and the matrix that they stand for, f32 [N, K]."""
    x = torch.randn(case.tokens, case.in_features, generator=generator).bfloat16()
    shape = (case.out_features, case.in_features)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(case.out_features, case.in_features // case.group, generator=generator)
    scales = ((scales + 0.2) * case.in_features**-0.5 / 4).bfloat16()
    packed = pack_int4_tiles(codes), pack_scales(scales, case.in_features)
    return x, *packed, dequantize(codes, scales)


def swiglu_arguments(case: PrefillCase, generator: torch.Generator) -> Arguments:
    """As `int4_arguments`, the matrix being gate rows, then up rows, and the tiles both interleaved."""
    x, _, _, _ = int4_arguments(case, generator)
    shape = (case.out_features, case.in_features)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(case.out_features, case.in_features // case.group, generator=generator)
    scales = ((scales + 0.2) * case.in_features**-0.5 / 4).bfloat16()
    tiles = pack_int4_tiles(interleave_gate_up(codes))
    return x, tiles, pack_scales(interleave_gate_up(scales), case.in_features), dequantize(codes, scales)


def float_arguments(case: PrefillCase, generator: torch.Generator) -> Arguments:
    """x bf16 [T, K], W bf16 [N, K]."""
    x = torch.randn(case.tokens, case.in_features, generator=generator).bfloat16()
    w = torch.randn(case.out_features, case.in_features, generator=generator) * case.in_features**-0.5
    return x, w.bfloat16()
