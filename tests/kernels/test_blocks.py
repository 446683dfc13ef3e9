"""The block operators' references and shape rules, against the operators that they are made of."""

from dataclasses import dataclass

import pytest
import torch
from qwen_runner.kernels.linear.int4_tiles import (
    interleave_gate_up,
    pack_int4_tiles,
    pack_scales,
    unpack_int4_tiles,
)
from qwen_runner.kernels.linear.reference import pack_int4
from qwen_runner.kernels.norm import gated_rms_norm, rms_norm
from torch import Tensor
from torch.nn import functional

BF16 = torch.bfloat16
EPS = 1e-6


@dataclass
class Matrix:
    """An int4 matrix as the small operators take it and in tiles."""

    qweight: Tensor
    scales: Tensor
    tiles: Tensor
    tile_scales: Tensor


def matrix(generator: torch.Generator, *shape: int, group: int = 32, gate_up: bool = False) -> Matrix:
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = torch.randn((*shape[:-1], shape[-1] // group), generator=generator).mul(0.2 * shape[-1] ** -0.5)
    scales = scales.to(BF16)
    rows = (interleave_gate_up(codes), interleave_gate_up(scales)) if gate_up else (codes, scales)
    return Matrix(pack_int4(codes), scales, pack_int4_tiles(rows[0]), pack_scales(rows[1], shape[-1]))


def normal(generator: torch.Generator, *shape: int, deviation: float = 1.0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * deviation + mean).to(BF16)


def int4(x: Tensor, weight: Matrix) -> Tensor:
    return torch.ops.qwen.int4_linear(x, weight.qweight, weight.scales)


def close(actual: Tensor, expected: Tensor) -> None:
    """Both are bfloat16 or float32 of it: equal but for a sum in another order."""
    assert actual.shape == expected.shape
    assert float((actual - expected).float().norm() / expected.float().norm()) < 1e-3


@pytest.mark.parametrize("slot", [[1], [2, 0, 1, 3, 4]])
@pytest.mark.parametrize("hidden", [96, 128])
def test_deltanet_block(slot: list[int], hidden: int, generator: torch.Generator) -> None:
    rows, key_heads, heads, dim, taps = 5, 2, 4, 16, 4
    channels, z_size = 2 * key_heads * dim + heads * dim, heads * dim
    x, norm = normal(generator, rows, hidden), normal(generator, hidden, deviation=0.2)
    qkvz, out = matrix(generator, channels + z_size, hidden), matrix(generator, hidden, z_size)
    ab = normal(generator, 2 * heads, hidden, deviation=hidden**-0.5)
    small = [normal(generator, channels, taps), normal(generator, heads), normal(generator, heads)]
    gated = normal(generator, dim, deviation=0.2, mean=1)
    conv = normal(generator, 5, channels, taps - 1)
    state = torch.randn(5, heads, dim, dim, generator=generator)
    own, slots = (conv.clone(), state.clone()), torch.tensor(slot)
    actual = torch.ops.qwen.deltanet_block(
        x, norm, qkvz.tiles, qkvz.tile_scales, ab, *small, conv, state, gated, out.tiles, out.tile_scales,
        slots, key_heads, EPS,
    )  # fmt: skip
    normed = rms_norm(x, norm, EPS)
    mixed_qkv, z = int4(normed, qkvz).split([channels, z_size], dim=-1)
    a, b = torch.ops.qwen.float_linear(normed, ab).chunk(2, dim=-1)
    mixed = torch.ops.qwen.gated_delta(mixed_qkv, a, b, *small, *own, slots, key_heads)
    mixed = gated_rms_norm(mixed.unflatten(1, (heads, dim)), z.unflatten(1, (heads, dim)), gated, EPS)
    close(actual, x + int4(mixed.flatten(1), out))
    close(conv, own[0])
    close(state, own[1])
    untouched = sorted(set(range(5)) - set(slot))
    assert torch.equal(state[untouched], own[1][untouched])


@pytest.mark.parametrize(("slot", "position"), [([1], [3]), ([2, 0, 1], [0, 11, 5])])
def test_attention_block(slot: list[int], position: list[int], generator: torch.Generator) -> None:
    rows, hidden, heads, key_heads, dim, limit, rotary_dim, theta = 3, 96, 4, 2, 32, 12, 8, 1e4
    x, norm = normal(generator, rows, hidden), normal(generator, hidden, deviation=0.2)
    qkv = matrix(generator, 2 * (heads + key_heads) * dim, hidden)
    out = matrix(generator, hidden, heads * dim)
    norms = [normal(generator, dim, deviation=0.2) for _ in range(2)]
    caches = [normal(generator, 3, key_heads, limit, dim) for _ in range(2)]
    own, slots, positions = [c.clone() for c in caches], torch.tensor(slot), torch.tensor(position)
    actual = torch.ops.qwen.attention_block(
        x, norm, qkv.tiles, qkv.tile_scales, *norms, *caches, out.tiles, out.tile_scales, positions, slots,
        heads, rotary_dim, theta, EPS,
    )  # fmt: skip
    from qwen_runner.kernels.attention import rotary

    each = positions if len(position) == rows else positions + torch.arange(rows)
    parts = int4(rms_norm(x, norm, EPS), qkv).split(
        [2 * heads * dim, key_heads * dim, key_heads * dim], dim=-1
    )
    q, gate = parts[0].unflatten(1, (heads, 2 * dim)).chunk(2, dim=-1)
    k, v = (part.unflatten(1, (key_heads, dim)) for part in parts[1:])
    q, k = (rotary(rms_norm(h, n, EPS), each, rotary_dim, theta) for h, n in zip((q, k), norms, strict=True))
    mixed = torch.ops.qwen.attention(q, k, v, *own, positions, slots)
    close(actual, x + int4((mixed * torch.sigmoid(gate)).flatten(1), out))
    for cache, expected in zip(caches, own, strict=True):
        close(cache, expected)


@pytest.mark.parametrize("group", [32, 64])
def test_moe_block(group: int, generator: torch.Generator) -> None:
    rows, hidden, experts, width, shared_width, top_k = 5, 192, 6, 64, 128, 3
    x, norm = normal(generator, rows, hidden), normal(generator, hidden, deviation=0.2)
    router = normal(generator, experts, hidden, deviation=hidden**-0.5)
    shared_gate = normal(generator, 1, hidden, deviation=hidden**-0.5)
    gate_up = matrix(generator, experts, 2 * width, hidden, group=group, gate_up=True)
    down = matrix(generator, experts, hidden, width, group=group)
    shared_gate_up = matrix(generator, 2 * shared_width, hidden, group=group, gate_up=True)
    shared_down = matrix(generator, hidden, shared_width, group=group)
    tiled = [t for m in (gate_up, down, shared_gate_up, shared_down) for t in (m.tiles, m.tile_scales)]
    actual = torch.ops.qwen.moe_block(x, norm, router, shared_gate, *tiled, top_k, EPS)
    normed = rms_norm(x, norm, EPS)
    ids, weights = torch.ops.qwen.router(normed, router, top_k)
    routed = torch.ops.qwen.int4_moe(
        normed, ids, weights, gate_up.qweight, gate_up.scales, down.qweight, down.scales
    )
    gate, up = int4(normed, shared_gate_up).chunk(2, dim=-1)
    shared = int4(functional.silu(gate) * up, shared_down)
    close(actual, x + (routed + torch.sigmoid(torch.ops.qwen.float_linear(normed, shared_gate)) * shared))


@pytest.mark.parametrize("vocabulary", [320, 333])
def test_the_ends(vocabulary: int, generator: torch.Generator) -> None:
    rows, hidden = 3, 96
    table = torch.randint(-127, 128, (vocabulary, hidden), generator=generator, dtype=torch.int8)
    scales = normal(generator, vocabulary, hidden // 32, deviation=0.01)
    ids = torch.tensor([0, vocabulary - 1, 7])
    x = torch.ops.qwen.embedding_block(ids, table, scales)
    assert x.dtype == BF16
    close(x, torch.ops.qwen.int8_embedding(ids, table, scales).to(BF16))
    norm, head = normal(generator, hidden, deviation=0.2), matrix(generator, vocabulary, hidden)
    for weights, expected in (
        ((table, scales), torch.ops.qwen.int8_linear(rms_norm(x, norm, EPS), table, scales)),
        ((head.tiles, head.tile_scales), int4(rms_norm(x, norm, EPS), head)),
    ):
        logits = torch.ops.qwen.head_block(x, norm, *weights, vocabulary, EPS)
        assert (logits.dtype, logits.shape) == (torch.float32, (rows, vocabulary))
        assert torch.equal(logits, logits.to(BF16).float())
        close(logits, expected.float())


def test_wrong_shapes_are_refused_when_a_model_is_traced(generator: torch.Generator) -> None:
    head = matrix(generator, 64, 96)
    assert unpack_int4_tiles(head.tiles, 64, 96).shape == (64, 96)
    x, norm = torch.empty(2, 96, dtype=BF16, device="meta"), torch.empty(96, dtype=BF16, device="meta")
    tiles, scales = head.tiles.to("meta"), head.tile_scales.to("meta")
    assert torch.ops.qwen.head_block(x, norm, tiles, scales, 64, EPS).shape == (2, 64)
    for arguments, named in (
        ((x, norm, tiles, scales, 100), "not u8 tiles of"),
        ((x, norm, tiles, scales[..., :8], 64), "scales"),
        ((x.float(), norm, tiles, scales, 64), "x is not bfloat16"),
        ((x, norm[:3], tiles, scales, 64), "norm is not"),
    ):
        with pytest.raises(RuntimeError, match=named):
            torch.ops.qwen.head_block(*arguments, EPS)
