"""Takes a model's weights out of a checkpoint, as it asks for them: converted, concatenated, quantized.

One module's tensors are in memory at a time besides what is already packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .linear import Embedding, FloatEmbedding, FloatLinear, frozen
from .moe import FloatExperts
from .options import ExportOptions


class CheckpointWeights:
    """A `WeightSource` over the tensors of `checkpoint` whose names begin with `prefix`."""

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, prefix: str = "") -> None:
        """`options` are resolved."""
        self.checkpoint = checkpoint
        self.options = options
        self.prefix = prefix
        self.dtype: torch.dtype = getattr(torch, str(options.dtype))

    def scope(self, prefix: str) -> CheckpointWeights:
        return CheckpointWeights(self.checkpoint, self.options, self.prefix + prefix)

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        tensor = self._float(name)
        return frozen(tensor if shape is None else tensor.reshape(shape))

    def linear(self, *names: str) -> nn.Module:
        return FloatLinear(torch.cat([self._float(name) for name in names]))

    def experts(self, gate_up: str, down: str) -> nn.Module:
        return FloatExperts(self._float(gate_up), self._float(down))

    def embedding(self, name: str) -> Embedding:
        return FloatEmbedding(self._float(name))

    def _float(self, name: str) -> Tensor:
        """Copies: what the checkpoint returns may be a mapped file."""
        return self.checkpoint.tensor(self.prefix + name).to(self.dtype, copy=True)
