"""Prefill's matrix products of the CUDA target."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear import cuda_cases_prefill as cases
from qwen_runner.kernels.tolerance import relative_error
from torch.nn import functional


def run(
    gpu: Gpu, case: cases.PrefillCase, arguments: cases.Arguments, residual: torch.Tensor | None
) -> torch.Tensor:
    """int4_linear_prefill, twice with the same result."""
    x, tiles, scales = (gpu.tensor(a) for a in arguments[:3])
    matrix = gpu.module.Int4Matrix(
        gpu.ptr(tiles), gpu.ptr(scales), case.out_features, case.in_features, case.group
    )
    added = None if residual is None else gpu.tensor(residual)
    outputs = []
    for _ in range(2):
        y = gpu.poisoned(case.tokens, case.out_features, dtype=torch.bfloat16)
        gpu.module.int4_linear_prefill(
            gpu.ptr(x), matrix, gpu.ptr(added), gpu.ptr(y), case.tokens, gpu.stream()
        )
        gpu.synchronize()
        outputs.append(y.cpu())
    assert torch.equal(outputs[0].view(torch.int16), outputs[1].view(torch.int16))
    return outputs[0]


def skip_large(gpu: Gpu, case: cases.PrefillCase, emulated: list[cases.PrefillCase]) -> None:
    if gpu.emulated and case not in emulated:
        pytest.skip("too large to emulate")


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_int4_linear(
    gpu: Gpu, generator: torch.Generator, case: cases.PrefillCase, with_residual: bool
) -> None:
    skip_large(gpu, case, [*cases.EMULATED, cases.WIDE[0]])
    *arguments, matrix = cases.int4_arguments(case, generator)
    expected = arguments[0].float() @ matrix.T
    residual = None
    if with_residual:
        residual = torch.randn(case.tokens, case.out_features, generator=generator).bfloat16()
        expected = expected + residual.float()
    assert relative_error(run(gpu, case, tuple(arguments), residual), expected) < 1e-2


TILES = [(16, 8), (32, 8), (32, 1), (128, 8), (128, 16)]
# Tiles that meet the same weights at a time; a block for each tile, or a persistent grid.
ORDERS = [(16, 8, 2), (32, 8, 3), (128, 16, 1), (16, 8, 2, True), (128, 16, 1, True)]


@pytest.mark.parametrize("config", [*TILES, *ORDERS], ids=str)
@pytest.mark.parametrize("case", [cases.EMULATED[3], cases.EMULATED[6]], ids=str)
def test_every_tile_computes_the_same(
    gpu: Gpu, generator: torch.Generator, case: cases.PrefillCase, config: tuple[int, ...]
) -> None:
    m = gpu.module
    *arguments, matrix = cases.int4_arguments(case, generator)
    expected = arguments[0].float() @ matrix.T
    m.override_prefill_config(m.PrefillKernel.LINEAR, *config)
    try:
        assert relative_error(run(gpu, case, tuple(arguments), None), expected) < 1e-2
    finally:
        m.override_prefill_config(m.PrefillKernel.LINEAR, 0, 0)


def test_the_residual_may_be_the_output(gpu: Gpu, generator: torch.Generator) -> None:
    case = cases.EMULATED[4]
    x, tiles, scales, matrix = cases.int4_arguments(case, generator)
    residual = torch.randn(case.tokens, case.out_features, generator=generator).bfloat16()
    expected = x.float() @ matrix.T + residual.float()
    x, tiles, scales, y = (gpu.tensor(a) for a in (x, tiles, scales, residual))
    w = gpu.module.Int4Matrix(
        gpu.ptr(tiles), gpu.ptr(scales), case.out_features, case.in_features, case.group
    )
    gpu.module.int4_linear_prefill(gpu.ptr(x), w, gpu.ptr(y), gpu.ptr(y), case.tokens, gpu.stream())
    gpu.synchronize()
    assert relative_error(y.cpu(), expected) < 1e-2


@pytest.mark.parametrize("case", [c for c in cases.CORRECTNESS if c.out_features % 16 == 0], ids=str)
def test_int4_swiglu(gpu: Gpu, generator: torch.Generator, case: cases.PrefillCase) -> None:
    skip_large(gpu, case, [*cases.EMULATED, cases.WIDE[0]])
    *arguments, matrix = cases.swiglu_arguments(case, generator)
    gate, up = (arguments[0].float() @ matrix.T).chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    x, tiles, scales = (gpu.tensor(a) for a in arguments)
    w = gpu.module.Int4Matrix(
        gpu.ptr(tiles), gpu.ptr(scales), case.out_features, case.in_features, case.group
    )
    outputs = []
    for _ in range(2):
        y = gpu.poisoned(case.tokens, case.out_features // 2, dtype=torch.bfloat16)
        gpu.module.int4_swiglu_prefill(gpu.ptr(x), w, gpu.ptr(y), case.tokens, gpu.stream())
        gpu.synchronize()
        outputs.append(y.cpu())
    assert torch.equal(outputs[0].view(torch.int16), outputs[1].view(torch.int16))
    assert relative_error(outputs[0], expected) < 1e-2


@pytest.mark.parametrize("case", cases.FLOAT_CORRECTNESS, ids=str)
def test_float_linear(gpu: Gpu, generator: torch.Generator, case: cases.PrefillCase) -> None:
    skip_large(gpu, case, cases.FLOAT_EMULATED)
    x, w = cases.float_arguments(case, generator)
    expected = x.float() @ w.float().T
    x, w = gpu.tensor(x), gpu.tensor(w)
    outputs = []
    for _ in range(2):
        y = gpu.poisoned(case.tokens, case.out_features, dtype=torch.float32)
        gpu.module.float_linear_prefill(
            gpu.ptr(x), gpu.ptr(w), gpu.ptr(y), case.tokens, case.in_features, case.out_features, gpu.stream()
        )
        gpu.synchronize()
        outputs.append(y.cpu())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[0].bfloat16().float())
    assert relative_error(outputs[0], expected) < 1e-2


@pytest.mark.parametrize("case", cases.FLOAT_CORRECTNESS, ids=str)
def test_router_logits(gpu: Gpu, generator: torch.Generator, case: cases.PrefillCase) -> None:
    """Both matrices' products are what each one's own call makes, to rounding."""
    skip_large(gpu, case, cases.FLOAT_EMULATED)
    x, w = cases.float_arguments(case, generator)
    gate = w[-1:] * 2
    expected = x.float() @ torch.cat([w, gate]).float().T
    x, w, gate = gpu.tensor(x), gpu.tensor(w), gpu.tensor(gate)
    outputs = []
    for _ in range(2):
        y = gpu.poisoned(case.tokens, case.out_features, dtype=torch.float32)
        last = gpu.poisoned(case.tokens, dtype=torch.float32)
        gpu.module.router_logits_prefill(
            gpu.ptr(x),
            gpu.ptr(w),
            gpu.ptr(gate),
            gpu.ptr(y),
            gpu.ptr(last),
            case.tokens,
            case.in_features,
            case.out_features,
            gpu.stream(),
        )
        gpu.synchronize()
        outputs.append(torch.cat([y.cpu(), last.cpu()[:, None]], dim=1))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[0].bfloat16().float())
    assert relative_error(outputs[0], expected) < 1e-2
