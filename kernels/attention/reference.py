"""Rotary embedding and causal grouped-query attention in plain PyTorch: Qwen3_5MoeAttention's core.

T rows, S slots, L cache length, Hq query heads, Hkv key-value heads (Hq a multiple), Dh head dimension, R
rotary dimension. Inputs are float32 or bfloat16.
"""

import torch

from ..rows import check_slots, row_positions


def rotary(x: torch.Tensor, positions: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    """Rotates the first R dimensions of each head, halves paired; the others pass.

    x [T, H, Dh], positions i64 [T], rotary_dim = R (even, <= Dh) -> [T, H, Dh] in x.dtype. A text token has
    the same position on the three axes of the multimodal RoPE, so its interleaving of axes falls away. Angles
    are float32; cosine and sine are rounded to x.dtype before the products, as Hugging Face does.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=x.device) / rotary_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cosine + torch.cat((-second, first), dim=-1) * sine, passed), dim=-1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
) -> torch.Tensor:
    """Stores k and v at their positions, then attends from each row to positions 0 up to its own.

    Args:
        q: [T, Hq, Dh]; k, v: [T, Hkv, Dh], normalized and rotated.
        key_cache, value_cache: [S, Hkv, L, Dh] in q.dtype; mutated.
        position, slot: i64 [1] or [T], see `rows`.

    Returns:
        [T, Hq, Dh] in q.dtype: softmax(q k / sqrt(Dh)) v in float32; query head h reads key head
        h // (Hq / Hkv).

    Raises:
        IndexError: a slot or a position is out of range.
    """
    num_rows, num_heads, head_dim = q.shape
    num_slots, num_key_heads, limit, _ = key_cache.shape
    slots = check_slots(slot, num_rows, num_slots)
    positions = row_positions(position, slots, num_rows, limit)
    row_slots = slots * num_rows if len(slots) == 1 else slots
    key_cache[row_slots, :, positions] = k
    value_cache[row_slots, :, positions] = v
    grouped = q.unflatten(1, (num_key_heads, -1)).float() * head_dim**-0.5  # [T, Hkv, Hq/Hkv, Dh]
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, (s, p) in enumerate(zip(row_slots, positions, strict=True)):
        keys, values = key_cache[s, :, : p + 1].float(), value_cache[s, :, : p + 1].float()
        weights = (grouped[row] @ keys.transpose(1, 2)).softmax(dim=-1)
        output[row] = (weights @ values).reshape(num_heads, head_dim).to(q.dtype)
    return output
