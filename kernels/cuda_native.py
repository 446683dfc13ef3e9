"""The CUDA launchers from Python: on a GPU (`qwen_runner._cuda_kernels`), or on the CPU through the emulation
(`qwen_runner._emulated_kernels`). For tests and benchmarks."""

from importlib import import_module
from types import ModuleType

import torch


class Gpu:
    """One of the two, and tensors where its launchers can reach them.

    `module` has a function a launcher, with the launcher's arguments: pointers and the stream as integers,
    structs as its classes; a CUDA error raises RuntimeError.
    """

    def __init__(self, emulated: bool) -> None:
        """
        Raises:
            ModuleNotFoundError: the module is not built.
            RuntimeError: there is no GPU that torch can use.
        """
        if not emulated and not torch.cuda.is_available():
            raise RuntimeError("no GPU that torch can use")
        self.emulated = emulated
        self.device = torch.device("cpu" if emulated else "cuda")
        name = "_emulated_kernels" if emulated else "_cuda_kernels"
        self.module: ModuleType = import_module(f"qwen_runner.{name}")

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy on the device."""
        return tensor.detach().to(self.device, copy=True).contiguous()

    def poisoned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An output: NaN, or -1 where it is of integers (255 for bytes)."""
        if dtype.is_floating_point:
            return torch.full(shape, float("nan"), dtype=dtype, device=self.device)
        return torch.full(shape, 255 if dtype == torch.uint8 else -1, dtype=dtype, device=self.device)

    def scratch(self, size: int) -> torch.Tensor:
        """So many bytes, all ones: NaN in every float type."""
        return torch.full((max(size, 16),), 255, dtype=torch.uint8, device=self.device)

    def counters(self) -> torch.Tensor:
        """What launchers call `counters`."""
        return torch.zeros(self.module.COUNTERS, dtype=torch.int32, device=self.device)

    def ptr(self, tensor: torch.Tensor | None) -> int:
        """The address of a contiguous tensor on the device; 0 for None."""
        if tensor is None:
            return 0
        if tensor.device.type != self.device.type or not tensor.is_contiguous():
            raise ValueError(f"not a contiguous tensor on {self.device}")
        return tensor.data_ptr()

    def stream(self) -> int:
        """torch's current stream."""
        return 0 if self.emulated else torch.cuda.current_stream().cuda_stream

    def synchronize(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize()
