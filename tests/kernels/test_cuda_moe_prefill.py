"""Prefill's routing and experts of the CUDA target."""

from typing import Any

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.moe import cuda_cases_prefill as cases
from qwen_runner.kernels.tolerance import relative_error
from torch.nn import functional


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def shape_of(gpu: Gpu, case: cases.MoePrefillCase) -> Any:
    return gpu.module.MoeShape(case.hidden, case.experts, case.top_k, case.intermediate, case.intermediate)


def skip_large(gpu: Gpu, case: Any, emulated: list[Any]) -> None:
    if gpu.emulated and case not in emulated:
        pytest.skip("too large to emulate")


def sort(gpu: Gpu, shape: Any, ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order, offsets."""
    tokens = ids.shape[0]
    ids = gpu.tensor(ids)
    order = gpu.poisoned(ids.numel(), dtype=torch.int32)
    offsets = gpu.poisoned(experts + 1, dtype=torch.int32)
    scratch = gpu.scratch(gpu.module.moe_sort_scratch(shape, tokens))
    gpu.module.moe_sort(
        gpu.ptr(ids), gpu.ptr(order), gpu.ptr(offsets), gpu.ptr(scratch), shape, tokens, gpu.stream()
    )
    gpu.synchronize()
    return order, offsets


@pytest.mark.parametrize("tokens_experts_choices", cases.SORT, ids=str)
@pytest.mark.parametrize("spread", [1, 4])
def test_choices_are_sorted_by_expert(
    gpu: Gpu, generator: torch.Generator, tokens_experts_choices: tuple[int, int, int], spread: int
) -> None:
    skip_large(gpu, tokens_experts_choices, cases.SORT_EMULATED)
    tokens, experts, choices = tokens_experts_choices
    ids = torch.randint(
        0, max(1, experts // spread), (tokens, choices), generator=generator, dtype=torch.int32
    )
    shape = gpu.module.MoeShape(32, experts, choices, 32, 32)
    order, offsets = sort(gpu, shape, ids, experts)
    assert torch.equal(order.cpu().long(), ids.flatten().sort(stable=True).indices)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("experts_choices", [(4, 1), (16, 4), (256, 8), (1000, 32), (8, 8)], ids=str)
def test_router(gpu: Gpu, generator: torch.Generator, experts_choices: tuple[int, int]) -> None:
    experts, choices = experts_choices
    tokens = 37
    logits = (torch.randn(tokens, experts, generator=generator) * 2).bfloat16().float()
    logits[3] = 0
    logits[4] = torch.where(torch.arange(experts) % 2 == 0, 0.0, -0.0)
    logits[5] = torch.arange(experts) % 3 - 100.0
    shape = gpu.module.MoeShape(32, experts, choices, 32, 32)
    on_device = gpu.tensor(logits)
    ids = gpu.poisoned(tokens, choices, dtype=torch.int32)
    weights = gpu.poisoned(tokens, choices, dtype=torch.float32)
    gpu.module.router_prefill(gpu.ptr(on_device), gpu.ptr(ids), gpu.ptr(weights), shape, tokens, gpu.stream())
    gpu.synchronize()
    expected_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :choices]
    values = logits.softmax(dim=-1).gather(1, expected_ids)
    expected = values / values.sum(dim=-1, keepdim=True)
    assert torch.equal(ids.cpu().long(), expected_ids)
    assert torch.equal(weights.cpu(), weights.cpu().bfloat16().float())
    assert ((weights.cpu() - expected).abs() / expected).max() < 2**-7


def test_a_nan_still_routes_to_experts_that_exist(gpu: Gpu) -> None:
    logits = gpu.tensor(torch.full((2, 5), float("nan")))
    ids, weights = gpu.poisoned(2, 5, dtype=torch.int32), gpu.poisoned(2, 5, dtype=torch.float32)
    shape = gpu.module.MoeShape(32, 5, 5, 32, 32)
    gpu.module.router_prefill(gpu.ptr(logits), gpu.ptr(ids), gpu.ptr(weights), shape, 2, gpu.stream())
    gpu.synchronize()
    assert [sorted(row) for row in ids.tolist()] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    "tokens_experts_choices", [(1, 4, 1), (40, 3, 3), (70, 256, 8), (128, 1000, 32), (129, 257, 8)], ids=str
)
def test_one_call_routes_and_sorts(
    gpu: Gpu, generator: torch.Generator, tokens_experts_choices: tuple[int, int, int]
) -> None:
    """What the router and the sort make one after the other."""
    tokens, experts, choices = tokens_experts_choices
    logits = gpu.tensor((torch.randn(tokens, experts, generator=generator) * 2).bfloat16().float())
    shape = gpu.module.MoeShape(32, experts, choices, 32, 32)
    ids, weights = (gpu.poisoned(tokens, choices, dtype=d) for d in (torch.int32, torch.float32))
    expected_ids, expected_weights = (torch.empty_like(t) for t in (ids, weights))
    order = gpu.poisoned(tokens * choices, dtype=torch.int32)
    offsets = gpu.poisoned(experts + 1, dtype=torch.int32)
    scratch = gpu.scratch(gpu.module.moe_sort_scratch(shape, tokens))
    outputs = [gpu.ptr(t) for t in (ids, weights, order, offsets, scratch)]
    gpu.module.moe_route(gpu.ptr(logits), *outputs, shape, tokens, gpu.stream())
    gpu.module.router_prefill(
        gpu.ptr(logits), gpu.ptr(expected_ids), gpu.ptr(expected_weights), shape, tokens, gpu.stream()
    )
    gpu.synchronize()
    expected_order, expected_offsets = sort(gpu, shape, expected_ids.cpu(), experts)
    assert torch.equal(ids, expected_ids)
    assert ((weights - expected_weights).abs() <= expected_weights * 2**-7).all()
    assert torch.equal(order, expected_order)
    assert torch.equal(offsets, expected_offsets)


def run_experts(
    gpu: Gpu,
    name: str,
    case: cases.MoePrefillCase,
    x: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor],
    matrix: cases.Experts,
    width: int,
    activations: str,
) -> torch.Tensor:
    """A launcher of experts, twice with the same result, on `case.tokens * case.top_k` rows of `width`."""
    x, tiles, scales = (gpu.tensor(a) for a in (x, matrix.tiles, matrix.scales))
    rows, columns = matrix.dense.shape[1:]
    w = gpu.module.Int4Matrix(gpu.ptr(tiles), gpu.ptr(scales), rows, columns, case.group)
    shape = shape_of(gpu, case)
    outputs = []
    for _ in range(2):
        y = gpu.poisoned(case.tokens * case.top_k, width, dtype=torch.bfloat16)
        arguments = [gpu.ptr(x), *(gpu.ptr(r) for r in routing), w, gpu.ptr(y)]
        if activations == "BFLOAT16":
            getattr(gpu.module, name)(*arguments, shape, case.tokens, gpu.stream())
        else:
            kind = getattr(gpu.module.ExpertActivations, activations)
            scratch = gpu.scratch(gpu.module.moe_8bit_scratch(shape, case.tokens))
            launcher = getattr(gpu.module, f"{name}_8bit")
            launcher(kind, *arguments, gpu.ptr(scratch), shape, case.tokens, gpu.stream())
        gpu.synchronize()
        outputs.append(y.cpu())
    assert same_bits(*outputs)
    return outputs[0]


def product(rows: torch.Tensor, experts: torch.Tensor, matrix: cases.Experts) -> torch.Tensor:
    """Each row of `rows` times its expert's matrix."""
    out = torch.empty(rows.shape[0], matrix.dense.shape[1])
    for e in torch.unique(experts).tolist():
        out[experts == e] = rows[experts == e].float() @ matrix.dense[e].T
    return out


# Measured with random activations: int8 up to 1.6e-2; e4m3, which has three bits of mantissa, up to 2.6e-2,
# of which SwiGLU makes 4.8e-2.
BOUNDS = {"BFLOAT16": 1e-2, "INT8": 2e-2, "FLOAT8": 6e-2}
TILES = [(8, 16), (16, 16), (16, 8), (32, 8), (64, 16), (64, 32), (128, 16)]
# Tiles that meet the same weights at a time; a block for each tile, or a persistent grid.
ORDERS = [(16, 8, 3), (32, 8, 2, True), (64, 32, 2), (64, 32, 1, True), (128, 16, 3)]


@pytest.mark.parametrize("config", [*TILES, *ORDERS], ids=str)
@pytest.mark.parametrize("case", [cases.EMULATED[6], cases.EMULATED[7], cases.EMULATED[5]], ids=str)
def test_every_tile_computes_the_same(
    gpu: Gpu, generator: torch.Generator, case: cases.MoePrefillCase, config: tuple[int, ...]
) -> None:
    m = gpu.module
    kernels = (m.PrefillKernel.MOE_GATE_UP, m.PrefillKernel.MOE_DOWN)
    for kernel in kernels:
        m.override_prefill_config(kernel, *config)
    try:
        test_experts(gpu, generator, case, "BFLOAT16")
    finally:
        for kernel in kernels:
            m.override_prefill_config(kernel, 0, 0)


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
@pytest.mark.parametrize("activations", BOUNDS)
def test_experts(gpu: Gpu, generator: torch.Generator, case: cases.MoePrefillCase, activations: str) -> None:
    bound = BOUNDS[activations]
    skip_large(gpu, case, cases.EMULATED)
    x = torch.randn(case.tokens, case.hidden, generator=generator).bfloat16()
    ids, _ = cases.choose(case, generator)
    routing = sort(gpu, shape_of(gpu, case), ids, case.experts)
    order = routing[0].cpu().long()

    gate_up = cases.experts(case, 2 * case.intermediate, case.hidden, True, generator)
    gate, up = product(x[order // case.top_k], ids.flatten()[order], gate_up).chunk(2, dim=-1)
    act = run_experts(gpu, "moe_gate_up_prefill", case, x, routing, gate_up, case.intermediate, activations)
    assert relative_error(act, functional.silu(gate) * up) < bound

    down = cases.experts(case, case.hidden, case.intermediate, False, generator)
    sorted_choices = product(act, ids.flatten()[order], down)
    expected = torch.empty_like(sorted_choices)
    expected[order] = sorted_choices
    actual = run_experts(gpu, "moe_down_prefill", case, act, routing, down, case.hidden, activations)
    assert relative_error(actual, expected) < bound


@pytest.mark.parametrize(
    "tokens_hidden_choices", [(1, 32, 1), (5, 96, 4), (33, 2048, 8), (3, 64, 11)], ids=str
)
def test_combine(gpu: Gpu, generator: torch.Generator, tokens_hidden_choices: tuple[int, int, int]) -> None:
    tokens, hidden, top_k = tokens_hidden_choices
    weights = torch.rand(tokens, top_k, generator=generator)
    choices = torch.randn(tokens, top_k, hidden, generator=generator).bfloat16()
    shared = torch.randn(tokens, hidden, generator=generator).bfloat16()
    shared_logit = torch.randn(tokens, generator=generator)
    residual = torch.randn(tokens, hidden, generator=generator).bfloat16()
    expected = (choices.float() * weights.unsqueeze(-1)).sum(dim=1) + residual.float()
    expected += shared_logit.sigmoid().bfloat16().float().unsqueeze(-1) * shared.float()
    tensors = [gpu.tensor(a) for a in (weights, choices, shared, shared_logit, residual)]
    shape = gpu.module.MoeShape(hidden, 64, top_k, 32, 32)
    outputs = []
    for in_place in (False, True):
        y = tensors[-1] if in_place else gpu.poisoned(tokens, hidden, dtype=torch.bfloat16)
        gpu.module.moe_combine(*(gpu.ptr(a) for a in tensors), gpu.ptr(y), shape, tokens, gpu.stream())
        gpu.synchronize()
        outputs.append(y.cpu())
    assert same_bits(*outputs)
    assert relative_error(outputs[0], expected) < 4e-3
