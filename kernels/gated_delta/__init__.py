"""The token mixer of the linear-attention layers: short convolution and gated delta rule over a slot's state.

T rows, S slots, Hk key heads, Hv value heads, Dk and Dv their dimensions, C = 2*Hk*Dk + Hv*Dv channels,
W taps.
"""

import torch

from ..registration import register
from . import reference

__all__ = ["reference"]


def _gated_delta(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    slot: torch.Tensor,
    num_key_heads: int,
) -> torch.Tensor:
    _, value_heads, key_dim, value_dim = recurrent_state.shape
    channels = 2 * num_key_heads * key_dim + value_heads * value_dim
    torch._check(
        value_heads % num_key_heads == 0, lambda: "gated_delta: value heads are no multiple of key heads"
    )
    torch._check(mixed_qkv.shape[1] == channels, lambda: f"gated_delta: mixed_qkv is not [T, {channels}]")
    torch._check(
        conv_weight.shape[0] == channels and conv_state.shape[1:] == (channels, conv_weight.shape[1] - 1),
        lambda: "gated_delta: conv_weight is not [C, W] or conv_state is not [S, C, W-1]",
    )
    torch._check(conv_state.dtype == mixed_qkv.dtype, lambda: "gated_delta: conv_state is not in x.dtype")
    torch._check(
        recurrent_state.dtype == torch.float32, lambda: "gated_delta: recurrent_state is not float32"
    )
    return mixed_qkv.new_empty((mixed_qkv.shape[0], value_heads * value_dim))


register(
    "gated_delta(Tensor mixed_qkv, Tensor a, Tensor b, Tensor conv_weight, Tensor a_log, Tensor dt_bias, "
    "Tensor(a!) conv_state, Tensor(b!) recurrent_state, Tensor slot, int num_key_heads) -> Tensor",
    reference.gated_delta,
    _gated_delta,
)
