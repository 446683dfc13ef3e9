"""Fixtures of the kernel tests."""

from collections.abc import Callable, Iterator

import pytest
import qwen_runner.kernels  # noqa: F401 - registers the operators
import torch
from kernel_checks import Kernel
from qwen_runner.kernels.cuda_native import Gpu


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def kernel() -> Kernel:
    """The CPU kernel of an operator: kernel(name, *arguments), its outputs poisoned before the call."""
    pytest.importorskip("qwen_runner._kernels", reason="qwen_runner._kernels is not built (QWEN_BUILD_TESTS)")
    from qwen_runner.kernels.native import call

    return call


@pytest.fixture
def set_threads(kernel: Kernel) -> Iterator[Callable[[int], None]]:
    """Sets how many threads the kernels use, until the test ends."""
    from qwen_runner import _kernels

    before = _kernels.max_threads()
    yield _kernels.set_max_threads
    _kernels.set_max_threads(before)


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """The CUDA launchers, emulated on the CPU and, where there is one, on a GPU."""
    try:
        return Gpu(emulated=request.param == "emulated")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error} (QWEN_BUILD_TESTS, CUDA)")
    except RuntimeError as error:
        pytest.skip(str(error))
