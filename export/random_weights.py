"""Weights without a checkpoint: random ones of a known model's shape, for benchmarks and tests.

What they compute means nothing, but stays in bounds: each product's outputs are about as large as its inputs,
and the logits are spread as a model's are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from qwen_runner.kernels.linear.int4_tiles import TILE_COLUMNS, TILE_ROWS
from torch import Tensor

from .config import ModelConfig, load_config
from .errors import ExportError
from .linear import Int4Tiles
from .quantize import QuantizationConfig
from .tensor_table import EMBEDDING, HEAD
from .weights import MetaWeights

# A folder a model, each with what `load_config` reads.
KNOWN_MODELS = Path(__file__).parent / "known_models"

# Every matrix is a part of one random block: drawing 18 GB takes minutes, copying them seconds.
_BLOCK_BYTES = 64 << 20
_BLOCK_SCALES = 1 << 22
_INT4_DEVIATION, _INT8_DEVIATION = 4.61, 73.6  # of codes drawn uniformly
_LOGIT_DEVIATION = 3.0


def known_models() -> list[str]:
    return sorted(path.name for path in KNOWN_MODELS.iterdir() if path.is_dir())


def load_known_config(name: str) -> ModelConfig:
    """Raises ExportError: no such model."""
    if name not in known_models():
        raise ExportError(f"--random {name}: known models: {', '.join(known_models())}")
    return load_config(KNOWN_MODELS / name)


class RandomWeights(MetaWeights):
    """The same at every call with the same `seed`, whatever else is asked for."""

    def __init__(
        self, config: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype, seed: int = 0
    ) -> None:
        super().__init__(config, quantization, dtype)
        self.seed = seed
        generator = self._generator("blocks")
        self.codes = torch.randint(256, (_BLOCK_BYTES,), dtype=torch.uint8, generator=generator)
        # Of either sign: int4 codes are not symmetric, and their mean shall not add up.
        sizes = torch.rand(_BLOCK_SCALES, generator=generator).mul_(0.5).add_(0.75)
        self.scales = sizes * torch.randint(2, sizes.shape, generator=generator).mul_(2).sub_(1)

    def _float(self, name: str) -> Tensor:
        shape = self.shapes[name]
        deviation, mean = _distribution(name, shape)
        return (torch.randn(shape, generator=self._generator(name)) * deviation + mean).to(self.dtype)

    def _int4(self, name: str) -> tuple[Tensor, Tensor]:
        codes, scales = super()._int4(name)
        return self._codes(name, codes), self._scales(name, scales, _INT4_DEVIATION)

    def _int8(self, name: str) -> tuple[Tensor, Tensor]:
        codes, scales = super()._int8(name)
        return self._codes(name, codes).clamp_(min=-127), self._scales(name, scales, _INT8_DEVIATION)

    def _tiles(self, names: list[str], gate_up: bool) -> Int4Tiles:
        """Random bytes are random codes in any order: only padding has to be put in its place."""
        rows, columns = sum(self.shapes[name][-2] for name in names), self.shapes[names[0]][-1]
        if rows % TILE_ROWS or columns % TILE_COLUMNS:
            return super(MetaWeights, self)._tiles(names, gate_up)
        part = super()._tiles(names, gate_up)
        return Int4Tiles(
            self._codes(names[0], part.tiles), self._scales(names[0], part.scales, _INT4_DEVIATION)
        )

    def _codes(self, name: str, like: Tensor) -> Tensor:
        """Random bytes of the shape and type of `like`."""
        codes = torch.empty(like.shape, dtype=like.dtype)
        for target, source in self._pieces(name, codes.view(-1).view(torch.uint8), self.codes):
            target.copy_(source)
        return codes

    def _scales(self, name: str, like: Tensor, code_deviation: float) -> Tensor:
        deviation, _ = _distribution(name, self.shapes[name])
        scales = torch.empty(like.shape, dtype=like.dtype)
        for target, source in self._pieces(name, scales.view(-1), self.scales):
            target.copy_(source * (deviation / code_deviation))
        return scales

    def _pieces(self, name: str, target: Tensor, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`target` in pieces, each with its like of the block: from where the name says, round and round."""
        begin, done = self._hash(name) % block.numel(), 0
        while done < target.numel():
            source = block[begin : begin + target.numel() - done]
            yield target[done : done + source.numel()], source
            done, begin = done + source.numel(), 0

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._hash(name))

    def _hash(self, name: str) -> int:
        return zlib.crc32(f"{self.seed} {name}".encode())


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(standard deviation, mean) of a tensor's weights."""
    if name == EMBEDDING:
        return 1.0, 0.0
    if name == HEAD:
        return _LOGIT_DEVIATION / math.sqrt(shape[-1]), 0.0
    if name.endswith("linear_attn.norm.weight"):  # a factor; the other norms' weights are added to 1
        return 0.1, 1.0
    if name.endswith("norm.weight"):
        return 0.1, 0.0
    if name.endswith("A_log"):  # a forgetting rate from 1 % to 70 % a token
        return 1.0, -1.5
    if name.endswith("dt_bias"):
        return 1.0, -0.5
    return 1.0 / math.sqrt(shape[-1]), 0.0
