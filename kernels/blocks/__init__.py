"""A decoder layer's halves, the embedding and the head, each as one operator: what a cuda program calls.

A block takes the residual stream x and returns the new one; its input norm and its residual are inside. All
activations and weights are bfloat16; int4 matrices are in tiles (`linear/int4_tiles.py`), gate and up
interleaved.

T rows, D hidden size, S slots, V vocabulary, G group size, N16 = ceil(N / 16), K64 = ceil(K / 64). As many
slot ids as rows: each row is one token of its own slot (decode). One: the rows are consecutive tokens of it.
"""

import torch
from torch import Tensor

from ..registration import register
from . import reference

__all__ = ["reference"]

_TILE_ROWS, _TILE_COLUMNS, _TILE_BYTES = 16, 64, 512


def _check_tiles(op: str, name: str, tiles: Tensor, scales: Tensor, n: int, k: int) -> None:
    row_tiles, column_tiles = -(-n // _TILE_ROWS), -(-k // _TILE_COLUMNS)
    torch._check(
        tiles.dtype == torch.uint8 and tiles.shape[-3:] == (row_tiles, column_tiles, _TILE_BYTES),
        lambda: f"{op}: {name} {list(tiles.shape)} are not u8 tiles of [{n}, {k}]",
    )
    torch._check(
        scales.dtype == torch.bfloat16
        and scales.shape[:-2] == tiles.shape[:-2]
        and scales.shape[-1] == _TILE_ROWS
        and column_tiles * _TILE_COLUMNS // scales.shape[-2] in (32, 64, 128),
        lambda: f"{op}: {name}'s scales {list(scales.shape)} are not bf16 [..., {row_tiles}, groups, 16]",
    )


def _check_table(op: str, qweight: Tensor, scales: Tensor) -> None:
    torch._check(qweight.dtype == torch.int8, lambda: f"{op}: qweight is not int8")
    torch._check(
        scales.dtype == torch.bfloat16
        and scales.shape[0] == qweight.shape[0]
        and qweight.shape[1] % scales.shape[1] == 0,
        lambda: f"{op}: scales {list(scales.shape)} are not bf16 [V, D/G]",
    )


def _check_x(op: str, x: Tensor, norm: Tensor) -> None:
    torch._check(x.dtype == torch.bfloat16, lambda: f"{op}: x is not bfloat16")
    torch._check(norm.shape == x.shape[1:], lambda: f"{op}: norm is not [D]")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _embedding_block(ids: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    _check_table("embedding_block", qweight, scales)
    return qweight.new_empty((ids.shape[0], qweight.shape[1]), dtype=torch.bfloat16)


def _deltanet_block(
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
    op, hidden = "deltanet_block", x.shape[1]
    _, value_heads, key_dim, value_dim = recurrent_state.shape
    channels, value_size = 2 * num_key_heads * key_dim + value_heads * value_dim, value_heads * value_dim
    _check_x(op, x, norm)
    _check_tiles(op, "qkvz_tiles", qkvz_tiles, qkvz_scales, channels + value_size, hidden)
    _check_tiles(op, "out_tiles", out_tiles, out_scales, hidden, value_size)
    torch._check(ab.shape == (2 * value_heads, hidden), lambda: f"{op}: ab is not [2 Hv, D]")
    torch._check(
        conv_weight.shape[0] == channels and conv_state.shape[1:] == (channels, conv_weight.shape[1] - 1),
        lambda: f"{op}: conv_weight is not [C, W] or conv_state is not [S, C, W-1]",
    )
    torch._check(
        conv_state.dtype == x.dtype and recurrent_state.dtype == torch.float32,
        lambda: f"{op}: conv_state is not bfloat16 or recurrent_state not float32",
    )
    return _like(x)


def _attention_block(
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
    op, hidden = "attention_block", x.shape[1]
    _, key_heads, _, dim = key_cache.shape
    _check_x(op, x, norm)
    _check_tiles(op, "qkv_tiles", qkv_tiles, qkv_scales, 2 * (num_heads + key_heads) * dim, hidden)
    _check_tiles(op, "out_tiles", out_tiles, out_scales, hidden, num_heads * dim)
    torch._check(
        key_cache.shape == value_cache.shape and num_heads % key_heads == 0,
        lambda: f"{op}: the caches are not [S, Hkv, L, Dh] with Hq a multiple of Hkv",
    )
    torch._check(
        key_cache.dtype == x.dtype and value_cache.dtype == x.dtype,
        lambda: f"{op}: the caches are not bfloat16",
    )
    torch._check(q_norm.shape == k_norm.shape == (dim,), lambda: f"{op}: q_norm or k_norm is not [Dh]")
    torch._check(
        rotary_dim % 2 == 0 and rotary_dim <= dim,
        lambda: f"{op}: rotary_dim {rotary_dim} of {dim} dimensions",
    )
    return _like(x)


def _moe_block(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
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
    op, hidden = "moe_block", x.shape[1]
    _check_x(op, x, norm)
    torch._check(router.shape[1:] == x.shape[1:], lambda: f"{op}: router is not [E, D]")
    torch._check(0 < top_k <= router.shape[0], lambda: f"{op}: top_k {top_k} of {router.shape[0]} experts")
    torch._check(shared_gate.shape == (1, hidden), lambda: f"{op}: shared_gate is not [1, D]")
    torch._check(
        gate_up_tiles.shape[0] == down_tiles.shape[0] == router.shape[0], lambda: f"{op}: not E experts"
    )
    for name, gate_up, gate_up_scale, down, down_scale in (
        ("", gate_up_tiles, gate_up_scales, down_tiles, down_scales),
        ("shared_", shared_gate_up_tiles, shared_gate_up_scales, shared_down_tiles, shared_down_scales),
    ):
        width = reference.gate_up_width(gate_up)
        _check_tiles(op, f"{name}gate_up_tiles", gate_up, gate_up_scale, 2 * width, hidden)
        _check_tiles(op, f"{name}down_tiles", down, down_scale, hidden, width)
    return _like(x)


def _head_block(
    x: Tensor, norm: Tensor, qweight: Tensor, scales: Tensor, vocab_size: int, eps: float
) -> Tensor:
    _check_x("head_block", x, norm)
    if qweight.dtype == torch.int8:
        _check_table("head_block", qweight, scales)
        torch._check(qweight.shape == (vocab_size, x.shape[1]), lambda: "head_block: qweight is not [V, D]")
    else:
        _check_tiles("head_block", "qweight", qweight, scales, vocab_size, x.shape[1])
    return x.new_empty((x.shape[0], vocab_size), dtype=torch.float32)


register(
    "embedding_block(Tensor ids, Tensor qweight, Tensor scales) -> Tensor",
    reference.embedding_block,
    _embedding_block,
)
register(
    "deltanet_block(Tensor x, Tensor norm, Tensor qkvz_tiles, Tensor qkvz_scales, Tensor ab, "
    "Tensor conv_weight, Tensor a_log, Tensor dt_bias, Tensor(a!) conv_state, Tensor(b!) recurrent_state, "
    "Tensor gated_norm, Tensor out_tiles, Tensor out_scales, Tensor slot, int num_key_heads, float eps) "
    "-> Tensor",
    reference.deltanet_block,
    _deltanet_block,
)
register(
    "attention_block(Tensor x, Tensor norm, Tensor qkv_tiles, Tensor qkv_scales, Tensor q_norm, "
    "Tensor k_norm, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor out_tiles, Tensor out_scales, "
    "Tensor position, Tensor slot, int num_heads, int rotary_dim, float theta, float eps) -> Tensor",
    reference.attention_block,
    _attention_block,
)
register(
    "moe_block(Tensor x, Tensor norm, Tensor router, Tensor shared_gate, Tensor gate_up_tiles, "
    "Tensor gate_up_scales, Tensor down_tiles, Tensor down_scales, Tensor shared_gate_up_tiles, "
    "Tensor shared_gate_up_scales, Tensor shared_down_tiles, Tensor shared_down_scales, int top_k, "
    "float eps) -> Tensor",
    reference.moe_block,
    _moe_block,
)
register(
    "head_block(Tensor x, Tensor norm, Tensor qweight, Tensor scales, int vocab_size, float eps) -> Tensor",
    reference.head_block,
    _head_block,
)
