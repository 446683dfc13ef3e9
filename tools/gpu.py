"""Ends with one line and status 1 unless tests can use a GPU here: `python tools/gpu.py`."""

import importlib.util
import sys

import torch


def problem() -> str | None:
    """What keeps the tests from a GPU, and what to do about it."""
    version, cuda = torch.__version__, torch.version.cuda
    if cuda is None:
        return f"PyTorch {version} in .venv is without CUDA: make distclean, then again where the GPU is"
    if not torch.cuda.is_available():
        return f"PyTorch {version} finds no GPU: is the driver new enough for CUDA {cuda}?"
    if importlib.util.find_spec("qwen_runner._cuda_kernels") is None:
        return "the kernels were built without CUDA, which has to be 12.8 or newer: see build/log/build.txt"
    return None


if __name__ == "__main__":
    found = problem()
    if found is None:
        print(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    sys.exit(f"make test-gpu: {found}" if found else 0)
