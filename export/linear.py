"""Weights as modules: matrix products and the embedding, in floating point or quantized, and their source.

T tokens, K in-features, N out-features, G group size, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightSource(Protocol):
    """Hands out the weights of one scope of a checkpoint, as the modules that compute with them."""

    def scope(self, prefix: str) -> WeightSource:
        """The same source, with names relative to `prefix`."""

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        """The tensor `name` in the model's floating point type, viewed as `shape` if given."""

    def linear(self, *names: str) -> nn.Module:
        """Maps [T, K] to [T, N]: the matrices `names` ([N_i, K]), one below the other, as one product."""

    def experts(self, gate_up: str, down: str) -> nn.Module:
        """Maps (x [T, D], ids i64 [T, A], weights f32 [T, A]) to [T, D]: the routed experts."""

    def embedding(self, name: str) -> Embedding:
        """The embedding table `name`, [V, D]."""

    def head(self, name: str) -> Int4Tiles | Int8Linear:
        """The matrix `name`, [V, D], quantized as a head is: int4 in tiles, or int8."""

    def tiles(self, *names: str) -> Int4Tiles:
        """The matrices `names`, each [..., N_i, K], one below the other, in int4 tiles."""

    def gate_up_tiles(self, *names: str) -> Int4Tiles:
        """The same with the first half of the rows, gate, and the second, up, interleaved by eights."""


def frozen(weight: Tensor) -> nn.Parameter:
    """A parameter that is not trained, so that integers may be one too."""
    return nn.Parameter(weight, requires_grad=False)


class FloatLinear(nn.Module):
    """x [T, K] -> [T, N] with weight [N, K] in x.dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.float_linear(x, self.weight)


class Int8Linear(nn.Module):
    """x [T, K] -> [T, N] with qweight i8 [N, K] and scales bf16 [N, K/G]."""

    def __init__(self, qweight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.qweight, self.scales = frozen(qweight), frozen(scales)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.int8_linear(x, self.qweight, self.scales)


class Int4Linear(nn.Module):
    """x [T, K] -> [T, N] with qweight u8 [N, K/2] and scales bf16 [N, K/G]."""

    def __init__(self, qweight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.qweight, self.scales = frozen(qweight), frozen(scales)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.int4_linear(x, self.qweight, self.scales)


class Int4Tiles(nn.Module):
    """Weights for a block: tiles u8 [..., N16, K64, 512] and scales bf16 [..., N16, groups, 16]."""

    def __init__(self, tiles: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.tiles, self.scales = frozen(tiles), frozen(scales)


class Embedding(nn.Module):
    """ids i64 [T] -> [T, D]; `project` is the head of a model whose embedding is tied to it."""

    def project(self, x: Tensor) -> Tensor:
        """x [T, D] -> logits [T, V] in x.dtype."""
        raise NotImplementedError


class FloatEmbedding(Embedding):
    """A table weight [V, D], in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)

    def project(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.float_linear(x, self.weight)


class Int8Embedding(Embedding):
    """A table qweight i8 [V, D] with scales bf16 [V, D/G]; rows come out in `dtype`."""

    def __init__(self, qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.qweight, self.scales = frozen(qweight), frozen(scales)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.ops.qwen.int8_embedding(ids, self.qweight, self.scales).to(self.dtype)

    def project(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.int8_linear(x, self.qweight, self.scales)
