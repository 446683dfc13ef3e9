"""Weights as a model asks for them: converted, concatenated, quantized, in tiles.

One matrix is in memory at a time besides what is already packed. N out-features, K in-features, G group size.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

import torch
from qwen_runner.kernels.linear.int4_tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    interleave_gate_up,
    pack_scales,
    tiles_of_rows,
)
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .config import ModelConfig
from .linear import (
    Embedding,
    FloatEmbedding,
    FloatLinear,
    Int4Linear,
    Int4Tiles,
    Int8Embedding,
    Int8Linear,
    frozen,
)
from .moe import FloatExperts, Int4Experts
from .quantize import QuantizationConfig, quantize_int4, quantize_int8, weight_kind
from .tensor_table import tensor_shapes

TILE_BYTES = TILE_ROWS * TILE_COLUMNS // 2


class Weights(ABC):
    """A `WeightSource` over tensors whose names begin with `prefix`; a subclass says where they come from."""

    def __init__(self, quantization: QuantizationConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of every weight that `quantization` keeps in floating point."""
        self.quantization = quantization
        self.dtype = dtype
        self.prefix = ""

    @abstractmethod
    def _float(self, name: str) -> Tensor:
        """The tensor of the full name `name` in `dtype`, the caller's own."""

    @abstractmethod
    def _int4(self, name: str) -> tuple[Tensor, Tensor]:
        """u8 [..., N, K/2] and bf16 [..., N, K/G]."""

    @abstractmethod
    def _int8(self, name: str) -> tuple[Tensor, Tensor]:
        """i8 [N, K] and bf16 [N, K/G]."""

    def scope(self, prefix: str) -> Self:
        scoped = copy.copy(self)
        scoped.prefix = self.prefix + prefix
        return scoped

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        tensor = self._float(self.prefix + name)
        return frozen(tensor if shape is None else tensor.reshape(shape))

    def linear(self, *names: str) -> nn.Module:
        full_names = [self.prefix + name for name in names]
        (kind,) = {weight_kind(name, self.quantization) for name in full_names}
        if kind == "keep":
            return FloatLinear(torch.cat([self._float(name) for name in full_names]))
        quantize = self._int4 if kind == "int4" else self._int8
        qweights, scales = zip(*(quantize(name) for name in full_names), strict=True)
        return (Int4Linear if kind == "int4" else Int8Linear)(torch.cat(qweights), torch.cat(scales))

    def experts(self, gate_up: str, down: str) -> nn.Module:
        gate_up, down = self.prefix + gate_up, self.prefix + down
        if weight_kind(gate_up, self.quantization) == "keep":
            return FloatExperts(self._float(gate_up), self._float(down))
        return Int4Experts(*self._int4(gate_up), *self._int4(down))

    def embedding(self, name: str) -> Embedding:
        name = self.prefix + name
        if weight_kind(name, self.quantization) == "keep":
            return FloatEmbedding(self._float(name))
        return Int8Embedding(*self._int8(name), self.dtype)

    def head(self, name: str) -> Int4Tiles | Int8Linear:
        if weight_kind(self.prefix + name, self.quantization) == "int4":
            return self.tiles(name)
        return Int8Linear(*self._int8(self.prefix + name))

    def tiles(self, *names: str) -> Int4Tiles:
        return self._tiles([self.prefix + name for name in names], gate_up=False)

    def gate_up_tiles(self, *names: str) -> Int4Tiles:
        return self._tiles([self.prefix + name for name in names], gate_up=True)

    def _tiles(self, names: list[str], gate_up: bool) -> Int4Tiles:
        parts = [self._int4(name) for name in names]
        qweight, scales = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        if gate_up:
            qweight, scales = interleave_gate_up(qweight), interleave_gate_up(scales)
        return Int4Tiles(tiles_of_rows(qweight), pack_scales(scales, 2 * qweight.shape[-1]))


class CheckpointWeights(Weights):
    """The weights of a checkpoint, quantized as they are read.

    device: computes there, and leaves what it quantizes there; by default on the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: QuantizationConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(quantization, dtype)
        self.checkpoint = checkpoint
        self.device = device

    def _float(self, name: str) -> Tensor:
        """A copy in `dtype`: what the checkpoint returns may be a mapped file."""
        return self.checkpoint.tensor(name).to(self.dtype, copy=True)

    def _int4(self, name: str) -> tuple[Tensor, Tensor]:
        config = self.quantization
        weight = self.checkpoint.tensor(name).to(self.device)
        return quantize_int4(weight, config.group_size, config.method, name=name)

    def _int8(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.checkpoint.tensor(name).to(self.device)
        return quantize_int8(weight, self.quantization.group_size, name=name)


class MetaWeights(Weights):
    """The weights of no checkpoint: tensors of the right shapes and types without data."""

    def __init__(self, config: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype) -> None:
        super().__init__(quantization, dtype)
        self.shapes = tensor_shapes(config)

    def _float(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtype, device="meta")

    def _int4(self, name: str) -> tuple[Tensor, Tensor]:
        return self._quantized(name, torch.uint8, codes_per_element=2)

    def _int8(self, name: str) -> tuple[Tensor, Tensor]:
        return self._quantized(name, torch.int8, codes_per_element=1)

    def _quantized(self, name: str, dtype: torch.dtype, codes_per_element: int) -> tuple[Tensor, Tensor]:
        *rows, columns = self.shapes[name]
        codes = torch.empty((*rows, columns // codes_per_element), dtype=dtype, device="meta")
        groups = columns // self.quantization.group_size
        return codes, torch.empty((*rows, groups), dtype=torch.bfloat16, device="meta")

    def _tiles(self, names: list[str], gate_up: bool) -> Int4Tiles:
        """The shapes alone: packing data that is not there takes seconds."""
        *experts, _, columns = self.shapes[names[0]]
        row_tiles = -(-sum(self.shapes[name][-2] for name in names) // TILE_ROWS)
        column_tiles = -(-columns // TILE_COLUMNS)
        tiles = torch.empty((*experts, row_tiles, column_tiles, TILE_BYTES), dtype=torch.uint8, device="meta")
        groups = column_tiles * TILE_COLUMNS // self.quantization.group_size
        scales = torch.empty((*experts, row_tiles, groups, TILE_ROWS), dtype=torch.bfloat16, device="meta")
        return Int4Tiles(tiles, scales)
