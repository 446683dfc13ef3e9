"""The CUDA norms against the reference."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.norm import cuda_cases as cases
from qwen_runner.kernels.norm import gated_rms_norm, rms_norm

EPSILON = 1e-6


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", cases.NORM + cases.NORM_BENCHMARK, ids=str)
def test_cuda_rms_norm(gpu: Gpu, generator: torch.Generator, case: cases.NormCase, in_place: bool) -> None:
    scale = torch.logspace(-4, 3, case.tokens)[:, None]
    x = (torch.randn(case.tokens, case.d, generator=generator) * scale).bfloat16()
    weight = torch.randn(case.d, generator=generator).bfloat16()
    expected = rms_norm(x, weight, EPSILON)
    results = []
    for _ in range(2):
        on_device, on_device_weight = gpu.tensor(x), gpu.tensor(weight)
        y = on_device if in_place else gpu.poisoned(case.tokens, case.d, dtype=torch.bfloat16)
        norm = gpu.module.RmsNorm(gpu.ptr(on_device_weight), EPSILON)
        gpu.module.rms_norm(gpu.ptr(on_device), norm, gpu.ptr(y), case.tokens, case.d, gpu.stream())
        gpu.synchronize()
        results.append(y.cpu())
    assert _difference(results[0], expected) < 1e-3
    assert torch.equal(*results)


@pytest.mark.parametrize("case", cases.GATED_NORM + cases.GATED_NORM_BENCHMARK, ids=str)
def test_cuda_gated_rms_norm(gpu: Gpu, generator: torch.Generator, case: cases.GatedNormCase) -> None:
    if gpu.emulated and case in cases.GATED_NORM_BENCHMARK:
        pytest.skip("slow without a GPU")
    size = case.heads * case.dim
    x = torch.randn(case.tokens, case.heads, case.dim, generator=generator) * 3
    gate = torch.randn(case.tokens, size + case.other, generator=generator).bfloat16() * 20
    gate[:, size:] = torch.nan
    weight = (1 + 0.1 * torch.randn(case.dim, generator=generator)).bfloat16()
    expected = gated_rms_norm(
        x.bfloat16(), gate[:, :size].unflatten(1, (case.heads, case.dim)), weight, EPSILON
    )
    results = []
    for _ in range(2):
        inputs = [gpu.tensor(t) for t in (x, gate, weight)]
        y = gpu.poisoned(case.tokens, size, dtype=torch.bfloat16)
        gpu.module.gated_rms_norm(
            gpu.ptr(inputs[0]),
            gpu.ptr(inputs[1]),
            gate.shape[1],
            gpu.ptr(inputs[2]),
            EPSILON,
            gpu.ptr(y),
            case.tokens,
            case.heads,
            case.dim,
            gpu.stream(),
        )
        gpu.synchronize()
        results.append(y.cpu())
    assert _difference(results[0], expected.flatten(1)) < 1e-3
    assert torch.equal(*results)
