"""The int8 head and embedding on CUDA against the reference."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear import cuda_int8_cases as cases
from qwen_runner.kernels.linear.reference import dequantize, int8_embedding
from qwen_runner.kernels.norm import rms_norm

EPSILON = 1e-6


def _head(
    gpu: Gpu,
    x: torch.Tensor,
    norm: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """y f32 [B, N], the same twice."""
    rows, (n, k) = len(x), codes.shape
    results = []
    for _ in range(2):
        inputs = [gpu.tensor(t) if t is not None else None for t in (x, norm, codes, scales)]
        x_address, norm_address, codes_address, scales_address = map(gpu.ptr, inputs)
        y = gpu.poisoned(rows, n, dtype=torch.float32)
        matrix = gpu.module.Int8Matrix(codes_address, scales_address, n, k, group)
        gpu.module.int8_head(
            x_address, gpu.module.RmsNorm(norm_address, EPSILON), matrix, gpu.ptr(y), rows, gpu.stream()
        )
        gpu.synchronize()
        results.append(y.cpu())
    assert torch.equal(*results)
    return results[0]


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("case", cases.HEAD + cases.HEAD_BENCHMARK, ids=str)
def test_cuda_int8_head(gpu: Gpu, generator: torch.Generator, case: cases.Int8Case, with_norm: bool) -> None:
    if gpu.emulated and case in cases.HEAD_BENCHMARK:
        pytest.skip("slow without a GPU")
    x, codes, scales = cases.head_arguments(case, generator)
    norm = torch.randn(case.in_features, generator=generator).bfloat16() * 0.3 if with_norm else None
    actual = _head(gpu, x, norm, codes, scales, case.group)
    normed = x if norm is None else rms_norm(x, norm, EPSILON)
    expected = (normed.float() @ dequantize(codes, scales).T).bfloat16().float()
    assert ((actual - expected).norm() / expected.norm()).item() < 3e-3
    assert torch.equal(actual, actual.bfloat16().float())
    for row in {0, case.tokens - 1}:
        alone = _head(gpu, x[row : row + 1].clone(), norm, codes, scales, case.group)
        assert torch.equal(alone[0], actual[row])


def test_cuda_int8_head_is_exact_in_every_code(gpu: Gpu) -> None:
    codes = torch.arange(256 * 96).view(256, 96).remainder(256).sub(128).to(torch.int8)
    scales = torch.ones(256, 3).bfloat16()
    for column in (0, 1, 2, 3, 17, 31, 32, 63, 64, 95):
        x = torch.zeros(1, 96, dtype=torch.bfloat16)
        x[0, column] = 1
        assert torch.equal(_head(gpu, x, None, codes, scales, 32)[0], codes[:, column].float())


@pytest.mark.parametrize("case", cases.EMBEDDING, ids=str)
def test_cuda_int8_embedding(gpu: Gpu, generator: torch.Generator, case: cases.Int8Case) -> None:
    _, codes, scales = cases.head_arguments(case, generator)
    ids = torch.randint(case.out_features, (case.tokens,), generator=generator)
    expected = int8_embedding(ids, codes, scales).bfloat16()
    ids[:: max(2, case.tokens // 5)] = -1
    ids[-1] = case.out_features
    on_device = [gpu.tensor(t) for t in (ids, codes, scales)]
    table = gpu.module.Int8Matrix(
        gpu.ptr(on_device[1]), gpu.ptr(on_device[2]), case.out_features, case.in_features, case.group
    )
    y = gpu.poisoned(case.tokens, case.in_features, dtype=torch.bfloat16)
    gpu.module.int8_embedding(gpu.ptr(on_device[0]), table, gpu.ptr(y), case.tokens, gpu.stream())
    gpu.synchronize()
    exists = (ids >= 0) & (ids < case.out_features)
    assert torch.equal(y.cpu()[exists], expected[exists])
    assert y.cpu()[~exists].isnan().all()
