"""The token mixer of the full-attention layers: gated grouped-query attention over a key-value cache.

T rows, D hidden size, S slots, L cache length, Hq query heads, Hkv key-value heads, Dh head dimension.
"""

import torch
from qwen_runner.kernels.attention import rotary
from qwen_runner.kernels.norm import rms_norm
from torch import Tensor, nn

from .config import ModelConfig
from .linear import WeightSource


class Attention(nn.Module):
    """x [T, D] -> [T, D]. State: key_cache and value_cache, [S, Hkv, L, Dh]."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, *, slots: int, max_seq_len: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = source.linear("q_proj.weight", "k_proj.weight", "v_proj.weight")
        self.o_proj = source.linear("o_proj.weight")
        self.q_norm = source.parameter("q_norm.weight")
        self.k_norm = source.parameter("k_norm.weight")
        cache = (slots, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.key_cache = nn.Buffer(torch.zeros(cache, dtype=dtype))
        self.value_cache = nn.Buffer(torch.zeros(cache, dtype=dtype))

    def forward(self, x: Tensor, positions: Tensor, position: Tensor, slot: Tensor) -> Tensor:
        """positions i64 [T] are the rows' own; position and slot are the program's inputs."""
        config = self.config
        heads, key_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q_and_gate, k, v = self.qkv_proj(x).split([2 * heads * dim, key_heads * dim, key_heads * dim], dim=-1)
        # A head's query and its output gate lie side by side.
        q, gate = q_and_gate.unflatten(1, (heads, 2 * dim)).chunk(2, dim=-1)
        q = self._rotated(rms_norm(q, self.q_norm, config.rms_norm_eps), positions)
        k = self._rotated(
            rms_norm(k.unflatten(1, (key_heads, dim)), self.k_norm, config.rms_norm_eps), positions
        )
        mixed = torch.ops.qwen.attention(
            q, k, v.unflatten(1, (key_heads, dim)), self.key_cache, self.value_cache, position, slot
        )
        return self.o_proj((mixed * torch.sigmoid(gate)).flatten(1))

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary(x, positions, self.config.rotary_dim, self.config.rope_theta)
