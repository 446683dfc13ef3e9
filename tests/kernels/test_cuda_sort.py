"""The CUDA sort against PyTorch's."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.sort import cuda_cases as cases


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _check(gpu: Gpu, values: torch.Tensor, descending: bool) -> None:
    outer, length, inner = values.shape
    sort_type = getattr(gpu.module.SortType, cases.DTYPES[values.dtype])
    expected, expected_indices = values.sort(dim=1, descending=descending, stable=True)
    for _ in range(2):
        on_device = gpu.tensor(values)
        out = gpu.poisoned(outer, length, inner, dtype=values.dtype)
        indices = gpu.poisoned(outer, length, inner, dtype=torch.int64)
        scratch = gpu.scratch(gpu.module.sort_scratch(sort_type, outer, length, inner))
        gpu.module.sort_stable(
            *map(gpu.ptr, (on_device, out, indices, scratch)),
            sort_type,
            outer,
            length,
            inner,
            descending,
            gpu.stream(),
        )
        gpu.synchronize()
        assert torch.equal(indices.cpu(), expected_indices)
        assert torch.equal(_bits(out.cpu()), _bits(expected))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
def test_cuda_sort_is_pytorchs(
    gpu: Gpu, generator: torch.Generator, case: cases.SortCase, dtype: torch.dtype, descending: bool
) -> None:
    _check(gpu, cases.values(case, dtype, generator), descending)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.BENCHMARK, ids=str)
def test_cuda_sort_of_long_lines(
    gpu: Gpu, generator: torch.Generator, case: cases.SortCase, dtype: torch.dtype
) -> None:
    if gpu.emulated:
        pytest.skip("slow without a GPU")
    _check(gpu, cases.values(case, dtype, generator), descending=True)


def test_cuda_sort_of_nothing(gpu: Gpu) -> None:
    for shape in ((0, 3, 1), (2, 0, 1), (2, 3, 0)):
        _check(gpu, torch.empty(shape), descending=False)
