"""The blocks in plain PyTorch, made of the operators' references: rounded where the exported model rounds.

x is bfloat16; each product, norm and mixer is float32 inside and rounded to bfloat16 once. Dimension letters
as in the package.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..attention.reference import attention, rotary
from ..gated_delta.reference import gated_delta
from ..linear.int4_tiles import deinterleave_gate_up, dequantize_tiles
from ..linear.reference import float_linear, int8_embedding, int8_linear
from ..moe.reference import float_moe, router
from ..norm.reference import gated_rms_norm, rms_norm
from ..rows import check_slots, row_positions

_TILE_ROWS, _TILE_COLUMNS = 16, 64


def embedding_block(ids: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    """ids i64 [T], qweight i8 [V, D], scales [V, D/G] -> [T, D]."""
    return int8_embedding(ids, qweight, scales).to(torch.bfloat16)


def deltanet_block(
    x: Tensor,
    norm: Tensor,
    qkvz_tiles: Tensor,
    qkvz_scales: Tensor,
    ab: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    gated_norm: Tensor,
    out_tiles: Tensor,
    out_scales: Tensor,
    slot: Tensor,
    num_key_heads: int,
    eps: float,
) -> Tensor:
    """x [T, D] -> x + out(gated_norm(delta(norm(x)))), [T, D].

    qkvz: N = C + Z rows, the channels' and the gate's; ab [2 Hv, D]: a's rows, then b's; the rest as of
    `gated_delta`. conv_state and recurrent_state are mutated.
    """
    _, value_heads, _, value_dim = recurrent_state.shape
    heads, channels = (value_heads, value_dim), conv_weight.shape[0]
    normed = rms_norm(x, norm, eps)
    qkvz = _tiled_linear(normed, qkvz_tiles, qkvz_scales, channels + value_heads * value_dim)
    mixed_qkv, z = qkvz.split([channels, value_heads * value_dim], dim=-1)
    a, b = float_linear(normed, ab).chunk(2, dim=-1)
    mixed = gated_delta(
        mixed_qkv, a, b, conv_weight, a_log, dt_bias, conv_state, recurrent_state, slot, num_key_heads
    )
    gated = gated_rms_norm(mixed.unflatten(1, heads), z.unflatten(1, heads), gated_norm, eps)
    return x + _tiled_linear(gated.flatten(1), out_tiles, out_scales, x.shape[1])


def attention_block(
    x: Tensor,
    norm: Tensor,
    qkv_tiles: Tensor,
    qkv_scales: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out_tiles: Tensor,
    out_scales: Tensor,
    position: Tensor,
    slot: Tensor,
    num_heads: int,
    rotary_dim: int,
    theta: float,
    eps: float,
) -> Tensor:
    """x [T, D] -> x + out(sigmoid(gate) * attention(norm(x))), [T, D].

    qkv's rows: for each head its query and its gate side by side, then the keys, then the values; q_norm,
    k_norm [Dh]; key_cache, value_cache [S, Hkv, L, Dh], mutated.
    """
    _, key_heads, limit, dim = key_cache.shape
    slots = check_slots(slot, x.shape[0], key_cache.shape[0])
    positions = torch.tensor(row_positions(position, slots, x.shape[0], limit), device=x.device)
    rows = _tiled_linear(rms_norm(x, norm, eps), qkv_tiles, qkv_scales, 2 * (num_heads + key_heads) * dim)
    q_and_gate, k, v = rows.split([2 * num_heads * dim, key_heads * dim, key_heads * dim], dim=-1)
    q, gate = q_and_gate.unflatten(1, (num_heads, 2 * dim)).chunk(2, dim=-1)
    q = rotary(rms_norm(q, q_norm, eps), positions, rotary_dim, theta)
    k = rotary(rms_norm(k.unflatten(1, (key_heads, dim)), k_norm, eps), positions, rotary_dim, theta)
    mixed = attention(q, k, v.unflatten(1, (key_heads, dim)), key_cache, value_cache, position, slot)
    return x + _tiled_linear((mixed * torch.sigmoid(gate)).flatten(1), out_tiles, out_scales, x.shape[1])


def moe_block(
    x: Tensor,
    norm: Tensor,
    router_weight: Tensor,
    shared_gate: Tensor,
    gate_up_tiles: Tensor,
    gate_up_scales: Tensor,
    down_tiles: Tensor,
    down_scales: Tensor,
    shared_gate_up_tiles: Tensor,
    shared_gate_up_scales: Tensor,
    shared_down_tiles: Tensor,
    shared_down_scales: Tensor,
    top_k: int,
    eps: float,
) -> Tensor:
    """x [T, D] -> x + the top A experts of norm(x) + sigmoid(shared_gate) * the shared expert, [T, D].

    router [E, D]; shared_gate [1, D]; gate_up: E of N = 2 I, K = D, interleaved by eights; down: E of N = D,
    K = I; the shared expert's likewise, without E.
    """
    normed = rms_norm(x, norm, eps)
    ids, weights = router(normed, router_weight, top_k)
    gate_up = _dequantize(gate_up_tiles, gate_up_scales, 2 * gate_up_width(gate_up_tiles), x.shape[1])
    down = _dequantize(down_tiles, down_scales, x.shape[1], gate_up_width(gate_up_tiles))
    routed = float_moe(normed, ids, weights, deinterleave_gate_up(gate_up), down)
    shared_width = gate_up_width(shared_gate_up_tiles)
    shared = _dequantize(shared_gate_up_tiles, shared_gate_up_scales, 2 * shared_width, x.shape[1])
    gate, up = float_linear(normed, deinterleave_gate_up(shared)).chunk(2, dim=-1)
    shared = _tiled_linear(functional.silu(gate) * up, shared_down_tiles, shared_down_scales, x.shape[1])
    return x + (routed + torch.sigmoid(float_linear(normed, shared_gate)) * shared)


def head_block(
    x: Tensor, norm: Tensor, qweight: Tensor, scales: Tensor, vocab_size: int, eps: float
) -> Tensor:
    """x [T, D], qweight tiles u8 [N16, K64, 512] or rows i8 [V, D] -> f32 [T, V], rounded to bfloat16."""
    normed = rms_norm(x, norm, eps)
    if qweight.dtype == torch.int8:
        return int8_linear(normed, qweight, scales).float()
    return _tiled_linear(normed, qweight, scales, vocab_size).float()


def gate_up_width(tiles: Tensor) -> int:
    """I, of a gate-up matrix [..., 2 I, D] in tiles: 8 rows of each of gate and up make a tile row."""
    return tiles.shape[-3] * _TILE_ROWS // 2


def _tiled_linear(x: Tensor, tiles: Tensor, scales: Tensor, n: int) -> Tensor:
    """x [T, K] -> [T, n] in x.dtype."""
    return float_linear(x, _dequantize(tiles, scales, n, x.shape[1]))


def _dequantize(tiles: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """f32 [..., n, k]."""
    group = tiles.shape[-2] * _TILE_COLUMNS // scales.shape[-2]
    return dequantize_tiles(tiles, scales, n, k, group)
