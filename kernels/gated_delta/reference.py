"""Short convolution and gated delta rule in plain PyTorch (Qwen3_5MoeGatedDeltaNet between its projections).

T rows, S slots, Hk key heads, Hv value heads (a multiple of Hk), Dk and Dv their dimensions, W convolution
taps, C = 2*Hk*Dk + Hv*Dv channels. Inputs are float32 or bfloat16; everything between them and the one
rounding of the output is float32.
"""

import torch
from torch.nn import functional

from ..rows import check_slots

L2_EPSILON = 1e-6


def gated_delta(
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
    """Mixes each row with its slot's past and advances the slot's state in place.

    Args:
        mixed_qkv: [T, C], the projections q, k, v of a token side by side.
        a, b: [T, Hv], inputs of decay and write strength.
        conv_weight: [C, W], depthwise causal filter, the last tap is the current token.
        a_log, dt_bias: [Hv], float32 or bfloat16.
        conv_state: [S, C, W-1] in x.dtype, the last W-1 rows of mixed_qkv; mutated.
        recurrent_state: f32 [S, Hv, Dk, Dv]; mutated.
        slot: i64 [1] or [T], see `rows`.
        num_key_heads: Hk; value head h reads key head h // (Hv / Hk).

    Returns:
        [T, Hv*Dv] in x.dtype, before the gated norm.

    Raises:
        IndexError: a slot is out of range.
    """
    num_rows = mixed_qkv.shape[0]
    slots = check_slots(slot, num_rows, recurrent_state.shape[0])
    if len(slots) == 1:
        spans = [(slots[0], 0, num_rows)]
    else:
        spans = [(s, row, row + 1) for row, s in enumerate(slots)]
    rate = a_log.float().exp()
    outputs = []
    for s, begin, end in spans:
        mixed = _convolve(mixed_qkv[begin:end], conv_weight, conv_state[s])
        decay = (-rate * functional.softplus(a[begin:end].float() + dt_bias.float())).exp()
        beta = b[begin:end].float().sigmoid()
        outputs.append(_recur(mixed, decay, beta, recurrent_state[s], num_key_heads))
    return torch.cat(outputs).to(mixed_qkv.dtype)


def _convolve(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """x [T, C], weight [C, W], state [C, W-1] (mutated) -> SiLU of the causal convolution, f32 [T, C]."""
    channels, taps = weight.shape
    history = torch.cat((state, x.T), dim=1)  # [C, W-1+T]
    state.copy_(history[:, history.shape[1] - (taps - 1) :])
    mixed = functional.conv1d(history.float()[None], weight.float()[:, None], groups=channels)
    return functional.silu(mixed[0].T)


def _recur(
    mixed: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor, num_key_heads: int
) -> torch.Tensor:
    """mixed f32 [T, C], decay and beta f32 [T, Hv], state f32 [Hv, Dk, Dv] (mutated) -> f32 [T, Hv*Dv]."""
    value_heads, key_dim, value_dim = state.shape
    q, k, v = mixed.split([num_key_heads * key_dim] * 2 + [value_heads * value_dim], dim=-1)
    repeats = value_heads // num_key_heads
    q = (
        _l2_normalize(q.unflatten(-1, (num_key_heads, key_dim))).repeat_interleave(repeats, dim=1)
        * key_dim**-0.5
    )
    k = _l2_normalize(k.unflatten(-1, (num_key_heads, key_dim))).repeat_interleave(repeats, dim=1)
    v = v.unflatten(-1, (value_heads, value_dim))
    outputs = torch.empty_like(v)
    for t in range(mixed.shape[0]):
        state.mul_(decay[t, :, None, None])
        predicted = (state * k[t, :, :, None]).sum(dim=1)
        delta = (v[t] - predicted) * beta[t, :, None]
        state.add_(k[t, :, :, None] * delta[:, None, :])
        outputs[t] = (state * q[t, :, :, None]).sum(dim=1)
    return outputs.flatten(1)


def _l2_normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_EPSILON)
