"""The CPU kernels on torch tensors: for tests and benchmarks, where `qwen_runner._kernels` is built."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from qwen_runner import _kernels


def call(name: str, *arguments: Any) -> Any:
    """Runs the kernel of `qwen::<name>` on contiguous CPU tensors; returns what the operator returns.

    Outputs are poisoned before the call: NaN, or -1 where they are integers. Mutated arguments are mutated in
    place.

    Raises:
        IndexError: an id, slot or position is out of range.
        ValueError: sizes contradict each other.
        MemoryError: there is no memory for scratch.
    """
    single, outputs = _outputs(name, arguments)
    status = getattr(_kernels, name)(*(_array(a) for a in (*arguments, *outputs)))
    if status == _kernels.OUT_OF_RANGE:
        raise IndexError(f"{name}: out of range")
    if status == _kernels.BAD_SHAPE:
        raise ValueError(f"{name}: bad shape")
    if status == _kernels.OUT_OF_MEMORY:
        raise MemoryError(f"{name}: no memory for scratch")
    return outputs[0] if single else tuple(outputs)


def bind(name: str, *arguments: Any) -> Callable[[], int]:
    """The kernel of `qwen::<name>` on these arguments and new outputs; a call returns its status."""
    arrays = [_array(a) for a in (*arguments, *_outputs(name, arguments)[1])]
    return partial(getattr(_kernels, name), *arrays)


def _outputs(name: str, arguments: tuple[Any, ...]) -> tuple[bool, list[torch.Tensor]]:
    """Whether the operator returns one tensor, and its outputs, poisoned."""
    shapes = getattr(torch.ops.qwen, name)(*(_on_meta(a) for a in arguments))
    single = isinstance(shapes, torch.Tensor)
    return single, [_poisoned(shape) for shape in ([shapes] if single else shapes)]


def _on_meta(argument: Any) -> Any:
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


def _poisoned(shape: torch.Tensor) -> torch.Tensor:
    return torch.full(shape.shape, float("nan") if shape.is_floating_point() else -1, dtype=shape.dtype)


def _array(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    plain = argument.detach()
    array: np.ndarray[Any, Any] = (
        plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
    )
    return array
