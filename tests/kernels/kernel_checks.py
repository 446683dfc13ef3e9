"""How the kernel tests compare a kernel with its reference."""

from collections.abc import Callable
from typing import Any

import torch
from qwen_runner.kernels.tolerance import TOLERANCE, error

Kernel = Callable[..., Any]


def copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert error(actual, expected) <= TOLERANCE[dtype]


def assert_kernel_matches(
    kernel: Kernel, name: str, arguments: tuple[Any, ...], dtype: torch.dtype, mutated: tuple[int, ...] = ()
) -> None:
    """Outputs and mutated arguments of the kernel are within the dtype's tolerance of the reference's."""
    for_reference, for_kernel = copies(arguments), copies(arguments)
    expected = getattr(torch.ops.qwen, name)(*for_reference)
    actual = kernel(name, *for_kernel)
    if isinstance(expected, torch.Tensor):
        expected, actual = (expected,), (actual,)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, dtype)
    for i in mutated:
        assert_close(for_kernel[i], for_reference[i], dtype)
