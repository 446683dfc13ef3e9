"""Shapes and routings for tests and benchmarks of prefill's experts on the GPU."""

from dataclasses import dataclass

import torch

from ..linear.int4_tiles import interleave_gate_up, pack_int4_tiles, pack_scales
from ..linear.reference import dequantize


@dataclass(frozen=True)
class MoePrefillCase:
    """x [tokens, hidden]; `experts` of width `intermediate`, `top_k` a token; `group` in-features a scale.

    routing: "random", "one" (every token chooses experts 0 to top_k - 1) or "few" (the last half of the
        experts idle).
    """

    tokens: int
    hidden: int
    experts: int
    intermediate: int
    top_k: int
    group: int
    routing: str = "random"


# Small enough to emulate: every width of a token tile, experts with nothing, one token more than a tile, rows
# of a multiple of 128 columns with scales for each group.
EMULATED = [
    MoePrefillCase(1, 32, 4, 32, 1, 32),
    MoePrefillCase(2, 96, 16, 96, 4, 32),
    MoePrefillCase(15, 192, 16, 64, 4, 32, "few"),
    MoePrefillCase(63, 64, 9, 32, 3, 32, "one"),
    MoePrefillCase(65, 128, 4, 128, 1, 128, "one"),
    MoePrefillCase(60, 128, 33, 64, 8, 64),
    MoePrefillCase(129, 64, 8, 192, 3, 64),
    MoePrefillCase(130, 192, 3, 320, 2, 32, "one"),
    MoePrefillCase(330, 64, 2, 32, 2, 32),
    *(MoePrefillCase(100, 384, 3, 128, 2, group) for group in (32, 64, 128)),
]
# Every width again, over many steps, and as many experts as Qwen3.5-35B-A3B has; small enough for a float32
# reference.
CORRECTNESS = [
    *EMULATED,
    MoePrefillCase(500, 2048, 64, 256, 8, 32),
    MoePrefillCase(1642, 512, 256, 128, 8, 128),
    MoePrefillCase(1000, 1024, 16, 512, 8, 64, "one"),
    MoePrefillCase(200, 512, 256, 128, 8, 128, "few"),
    MoePrefillCase(700, 512, 256, 128, 8, 32),
    MoePrefillCase(4095, 512, 32, 256, 4, 128, "few"),
]
# tokens, experts, choices a token
SORT_EMULATED = [(1, 4, 1), (7, 16, 4), (300, 256, 8), (129, 1000, 32), (40, 3, 3)]
SORT = [*SORT_EMULATED, (1642, 256, 8), (2048, 256, 8), (32768, 1024, 32)]


def choose(case: MoePrefillCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """ids i32 [T, A], weights f32 [T, A]."""
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores[:, : case.top_k] += 2
    elif case.routing == "few":
        scores[:, case.experts // 2 :] -= 2
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    return scores.topk(case.top_k).indices.int(), (
        weights / weights.sum(dim=-1, keepdim=True)
    ).bfloat16().float()


@dataclass(frozen=True)
class Experts:
    """One of the two matrices of all experts: tiles, packed scales, what they stand for (f32 [E, N, K])."""

    tiles: torch.Tensor
    scales: torch.Tensor
    dense: torch.Tensor


def experts(
    case: MoePrefillCase, rows: int, columns: int, interleaved: bool, generator: torch.Generator
) -> Experts:
    codes = torch.randint(-8, 8, (case.experts, rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(case.experts, rows, columns // case.group, generator=generator)
    scales = ((scales + 0.2) * columns**-0.5 / 4).bfloat16()
    order = interleave_gate_up if interleaved else torch.clone
    return Experts(
        pack_int4_tiles(order(codes)), pack_scales(order(scales), columns), dequantize(codes, scales)
    )
