"""Takes a model's weights out of a checkpoint as the model asks for them: converted, concatenated, quantized.

One tensor is in memory at a time besides what is already packed. N out-features, K in-features, G group size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .linear import Embedding, FloatEmbedding, FloatLinear, Int4Linear, Int8Embedding, Int8Linear, frozen
from .moe import FloatExperts, Int4Experts
from .quantize import QuantizationConfig, quantize_int4, quantize_int8, weight_kind


class CheckpointWeights:
    """A `WeightSource` over the tensors of `checkpoint` whose names begin with `prefix`."""

    def __init__(
        self, checkpoint: Checkpoint, quantization: QuantizationConfig, dtype: torch.dtype, prefix: str = ""
    ) -> None:
        """`dtype` is that of every weight that `quantization` keeps in floating point."""
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.dtype = dtype
        self.prefix = prefix

    def scope(self, prefix: str) -> CheckpointWeights:
        return CheckpointWeights(self.checkpoint, self.quantization, self.dtype, self.prefix + prefix)

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        tensor = self._float(name)
        return frozen(tensor if shape is None else tensor.reshape(shape))

    def linear(self, *names: str) -> nn.Module:
        (kind,) = {weight_kind(self.prefix + name, self.quantization) for name in names}
        if kind == "keep":
            return FloatLinear(torch.cat([self._float(name) for name in names]))
        quantize = self._int4 if kind == "int4" else self._int8
        qweights, scales = zip(*(quantize(name) for name in names), strict=True)
        return (Int4Linear if kind == "int4" else Int8Linear)(torch.cat(qweights), torch.cat(scales))

    def experts(self, gate_up: str, down: str) -> nn.Module:
        if weight_kind(self.prefix + gate_up, self.quantization) == "keep":
            return FloatExperts(self._float(gate_up), self._float(down))
        return Int4Experts(*self._int4(gate_up), *self._int4(down))

    def embedding(self, name: str) -> Embedding:
        if weight_kind(self.prefix + name, self.quantization) == "keep":
            return FloatEmbedding(self._float(name))
        return Int8Embedding(*self._int8(name), self.dtype)

    def _float(self, name: str) -> Tensor:
        """A copy in `dtype`: what the checkpoint returns may be a mapped file."""
        return self.checkpoint.tensor(self.prefix + name).to(self.dtype, copy=True)

    def _int4(self, name: str) -> tuple[Tensor, Tensor]:
        """u8 [..., N, K/2] and bf16 [..., N, K/G]."""
        full_name, config = self.prefix + name, self.quantization
        return quantize_int4(
            self.checkpoint.tensor(full_name), config.group_size, config.method, name=full_name
        )

    def _int8(self, name: str) -> tuple[Tensor, Tensor]:
        """i8 [N, K] and bf16 [N, K/G]."""
        full_name = self.prefix + name
        return quantize_int8(self.checkpoint.tensor(full_name), self.quantization.group_size, name=full_name)
