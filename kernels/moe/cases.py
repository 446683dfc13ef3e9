"""Shapes and routings for tests and benchmarks of the router and the experts."""

from dataclasses import dataclass

import torch

from ..linear.reference import pack_int4

Arguments = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class MoeCase:
    """x [tokens, hidden]; `experts` of width `intermediate`, `top_k` a token; `group` in-features a scale.

    routing: "random", "one" (every token's first choice is expert 0) or "few" (the last half of the experts
        idle).
    """

    tokens: int
    hidden: int
    experts: int
    intermediate: int
    top_k: int
    group: int
    dtype: torch.dtype = torch.float32
    routing: str = "random"


CORRECTNESS = [
    MoeCase(1, 64, 16, 32, 4, 32),
    MoeCase(1, 256, 8, 128, 2, 64),
    MoeCase(2, 128, 4, 128, 4, 128),
    MoeCase(63, 96, 16, 64, 4, 32, routing="one"),
    MoeCase(500, 64, 32, 32, 8, 32, routing="few"),
    MoeCase(1000, 32, 4, 32, 1, 32),
    MoeCase(63, 128, 16, 64, 4, 64, torch.bfloat16),
    MoeCase(1, 64, 16, 64, 4, 32, torch.bfloat16, "one"),
    MoeCase(5, 40, 6, 36, 3, 4),
]
BENCHMARK = [
    MoeCase(1, 2048, 64, 512, 8, 32),
    MoeCase(64, 2048, 64, 512, 8, 32),
    MoeCase(1, 256, 16, 128, 4, 32),
    MoeCase(500, 256, 16, 128, 4, 32),
]


def router_arguments(case: MoeCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    x = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)
    weight = torch.randn(case.experts, case.hidden, generator=generator).to(case.dtype)
    return x, weight * case.hidden**-0.5, case.top_k


def _choices(case: MoeCase, generator: torch.Generator) -> Arguments:
    x = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores[:, 0] = 2.0
    elif case.routing == "few":
        scores[:, case.experts // 2 :] -= 2.0
    ids = scores.topk(case.top_k).indices
    return x, ids, torch.rand(case.tokens, case.top_k, generator=generator)


def float_arguments(case: MoeCase, generator: torch.Generator) -> Arguments:
    gate_up = torch.randn(case.experts, 2 * case.intermediate, case.hidden, generator=generator)
    down = torch.randn(case.experts, case.hidden, case.intermediate, generator=generator)
    scaled = ((gate_up * case.hidden**-0.5).to(case.dtype), (down * case.intermediate**-0.5).to(case.dtype))
    return (*_choices(case, generator), *scaled)


def int4_arguments(case: MoeCase, generator: torch.Generator) -> Arguments:
    weights = []
    for rows, columns in ((2 * case.intermediate, case.hidden), (case.hidden, case.intermediate)):
        codes = torch.randint(-8, 8, (case.experts, rows, columns), generator=generator, dtype=torch.int8)
        scales = (
            torch.rand(case.experts, rows, columns // case.group, generator=generator) * 0.2 * columns**-0.5
        )
        weights += [pack_int4(codes), scales.bfloat16()]
    return (*_choices(case, generator), *weights)
