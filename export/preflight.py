"""Whether the machine has what an export is going to need, found out before it starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from . import contract
from .config import ModelConfig
from .errors import ExportError
from .options import ResolvedOptions
from .ptd import Layout
from .tensor_table import tensor_shapes

_GIB = 1 << 30
# Beside the weights: libraries, tokenizer, manifest, and what Inductor writes on its way.
_OTHER_FILES = 256 << 20
# PyTorch, ExecuTorch and the C++ compiler at work; measured 1.0 GiB at the 35B model's shape.
_BASE_MEMORY = 2 * _GIB


def quantizing_device(options: ResolvedOptions) -> str:
    """Where a checkpoint is quantized: on the GPU for one, on the CPU for programs of the CPU.

    A GPU's sums are not the CPU's to the last bit, and a cpu program shall not depend on the machine.
    """
    return "cuda" if options.target == contract.CUDA and torch.cuda.is_available() else "cpu"


def check_resources(
    output: Path, layout: Layout, config: ModelConfig, options: ResolvedOptions, device: str | None
) -> None:
    """Compares disk, memory and GPU memory with what the export needs.

    Args:
        output: the folder to be written. One that is there is replaced at the end: both must fit.
        layout: of the weights.
        device: where the weights are quantized; None if they are not.

    Raises:
        ExportError: something is too small; it says how much there is and how much it takes.
    """
    folder = next(parent for parent in output.parents if parent.exists())
    _require(f"{folder}: the disk has", _free_disk(folder), layout.size + _OTHER_FILES)
    largest = max(weight.nbytes for weight in layout.weights)
    # A matrix and its tiles; of a checkpoint also the floats it is made from, on whichever device that is.
    memory, gpu_memory = _BASE_MEMORY + 4 * largest, 0
    if device is not None:
        floats = 4 * max(map(math.prod, tensor_shapes(config).values()))
        memory += floats
        gpu_memory = _GIB + 4 * largest + floats if device == "cuda" else 0
    _require("this machine has", _available_memory(), memory, "of memory available")
    if gpu_memory:
        _require("the GPU has", torch.cuda.mem_get_info()[0], gpu_memory, "of memory free")


def _require(what: str, available: int | None, needed: int, kind: str = "free") -> None:
    if available is not None and available < needed:
        raise ExportError(
            f"{what} {available / _GIB:.1f} GiB {kind}, the export takes {needed / _GIB:.1f} GiB; make room"
        )


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _available_memory() -> int | None:
    """What Linux could give out without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024
