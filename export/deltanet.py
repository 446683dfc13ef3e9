"""The token mixer of the linear-attention layers: short convolution, gated delta rule, gated norm.

T rows, D hidden size, S slots, Hk key heads, Hv value heads, Dk and Dv their dimensions,
C = 2*Hk*Dk + Hv*Dv channels, W convolution taps.
"""

import torch
from qwen_runner.kernels.norm import gated_rms_norm
from torch import Tensor, nn

from .config import ModelConfig
from .linear import WeightSource


class GatedDeltaNet(nn.Module):
    """x [T, D] -> [T, D]. State: conv_state [S, C, W-1] and recurrent_state f32 [S, Hv, Dk, Dv]."""

    def __init__(self, config: ModelConfig, source: WeightSource, *, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.in_proj_qkvz = source.linear("in_proj_qkv.weight", "in_proj_z.weight")
        self.in_proj_ab = source.linear("in_proj_a.weight", "in_proj_b.weight")
        self.out_proj = source.linear("out_proj.weight")
        self.conv_weight = source.parameter("conv1d.weight", shape=(config.linear_conv_size, -1))
        self.A_log = source.parameter("A_log")
        self.dt_bias = source.parameter("dt_bias")
        self.norm = source.parameter("norm.weight")
        taps, heads = config.linear_conv_kernel_dim, config.linear_num_value_heads
        self.conv_state = nn.Buffer(torch.zeros(slots, config.linear_conv_size, taps - 1, dtype=dtype))
        self.recurrent_state = nn.Buffer(
            torch.zeros(slots, heads, config.linear_key_head_dim, config.linear_value_head_dim)
        )

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        config = self.config
        heads = (config.linear_num_value_heads, config.linear_value_head_dim)
        mixed_qkv, z = self.in_proj_qkvz(x).split([config.linear_conv_size, config.linear_value_size], dim=-1)
        a, b = self.in_proj_ab(x).chunk(2, dim=-1)
        mixed = torch.ops.qwen.gated_delta(
            mixed_qkv,
            a,
            b,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            self.conv_state,
            self.recurrent_state,
            slot,
            config.linear_num_key_heads,
        )
        mixed = gated_rms_norm(
            mixed.unflatten(1, heads), z.unflatten(1, heads), self.norm, config.rms_norm_eps
        )
        return self.out_proj(mixed.flatten(1))
