"""Fixtures of the runner's tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_script import SMALLEST, Gpu


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """The runner with an emulated GPU and, where there is one, with a real one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        return Gpu("_core", emulated=False)
    if importlib.util.find_spec("qwen_runner._emulated_core") is None:
        pytest.skip("needs qwen_runner._emulated_core: build with QWEN_BUILD_TESTS and the CUDA toolkit")
    return Gpu("_emulated_core", emulated=True)


@pytest.fixture(scope="module")
def program(exported: Callable[..., Path]) -> Path:
    """A small random model for cuda."""
    return exported(SMALLEST, target="cuda", quantize="int4")
