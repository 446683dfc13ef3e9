"""Shapes for tests and benchmarks of the CUDA attention kernels, and what they compute, in PyTorch.

B rows of a decode step, T tokens of a prefill chunk, S slots, L cache length, Hq query heads, Hkv key-value
heads, Dh head dimension, R rotary dimensions.
"""

from dataclasses import dataclass

import torch

from ..norm import rms_norm
from .reference import attention, rotary


@dataclass(frozen=True)
class Heads:
    query_heads: int
    key_heads: int
    head_dim: int
    rotary_dim: int
    theta: float = 1e7
    eps: float = 1e-6


FULL = Heads(16, 2, 256, 64)  # Qwen3.5-35B-A3B
HEADS = [
    FULL,
    Heads(4, 2, 64, 16),  # the demo model
    Heads(6, 3, 16, 16),
    Heads(1, 1, 32, 0),
    Heads(8, 1, 32, 8),
    Heads(12, 1, 128, 32),
    Heads(3, 1, 96, 24),
]
DECODE_POSITIONS = [
    [0],
    [1],
    [63],
    [64],
    [65],
    [200],
    [3, 150, 64],
    [0, 1, 63, 64, 65, 200, 130, 17],
]
LONG_DECODE = [
    (Heads(2, 2, 16, 8), [19999]),
    (Heads(1, 1, 32, 8), [8999, 0, 5000, 8191, 70, 4000, 1, 8998]),
    (FULL, [4100, 511]),
    (FULL, [1023]),
    # About where a context becomes another part, and a part another chunk.
    (Heads(4, 2, 64, 16), [511, 512, 1023, 1024, 1025, 1535]),
    (Heads(12, 1, 128, 32), [2047, 1040]),
    (Heads(20, 1, 32, 16), [1100, 33]),  # three groups of query heads
    (Heads(17, 17, 16, 8), [300]),  # too many key heads for clusters
]
PREFILL = [(2, 0), (2, 37), (15, 37), (63, 0), (65, 37), (130, 0), (130, 37)]  # tokens, position
FULL_PREFILL = [(500, 0), (1000, 63), (1642, 0), (2048, 2048)]
# Few tokens after many: the context is cut.
CONTINUED_PREFILL = [
    (FULL, 2, 3001),
    (FULL, 33, 700),
    (FULL, 300, 1900),
    (Heads(12, 1, 128, 32), 40, 1500),
    (Heads(4, 2, 64, 16), 130, 1000),
]


@dataclass
class Inputs:
    qkv: torch.Tensor  # [B or T, (2 Hq + 2 Hkv) Dh] bf16
    q_norm: torch.Tensor  # [Dh] bf16
    k_norm: torch.Tensor
    key_cache: torch.Tensor  # [S, Hkv, L, Dh] bf16
    value_cache: torch.Tensor
    position: torch.Tensor  # i64 [B] or [1]
    slot: torch.Tensor


def inputs(
    heads: Heads,
    rows: int,
    positions: list[int],
    cache_length: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs, rows in the slots B, B - 1, ..., 1; what must not be read of the cache is NaN."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    slots = len(positions) + 1
    slot = torch.arange(len(positions), 0, -1)
    cache = (slots, heads.key_heads, cache_length, heads.head_dim)
    key_cache = torch.full(cache, torch.nan, dtype=torch.bfloat16)
    value_cache = key_cache.clone()
    for s, p in zip(slot.tolist(), positions, strict=True):
        key_cache[s, :, :p] = normal(heads.key_heads, p, heads.head_dim)
        value_cache[s, :, :p] = normal(heads.key_heads, p, heads.head_dim)
    return Inputs(
        normal(rows, 2 * (heads.query_heads + heads.key_heads) * heads.head_dim).to(device),
        normal(heads.head_dim, scale=0.3).to(device),
        normal(heads.head_dim, scale=0.3).to(device),
        key_cache.to(device),
        value_cache.to(device),
        torch.tensor(positions).to(device),
        slot.to(device),
    )


def expected(heads: Heads, given: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [B or T, Hq Dh], key_cache, value_cache) as export/attention.py computes them, in bfloat16."""
    key_cache, value_cache = given.key_cache.clone(), given.value_cache.clone()
    sizes = [2 * heads.query_heads * heads.head_dim] + [heads.key_heads * heads.head_dim] * 2
    q_and_gate, k, v = given.qkv.split(sizes, dim=-1)
    q, gate = q_and_gate.unflatten(1, (heads.query_heads, -1)).chunk(2, dim=-1)
    k, v = k.unflatten(1, (heads.key_heads, -1)), v.unflatten(1, (heads.key_heads, -1))
    rows = len(given.qkv)
    positions = given.position
    if len(positions) != rows:
        positions = positions + torch.arange(rows, device=positions.device)

    def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rotary(rms_norm(x, weight, heads.eps), positions, heads.rotary_dim, heads.theta)

    mixed = attention(
        rotated(q, given.q_norm),
        rotated(k, given.k_norm),
        v,
        key_cache,
        value_cache,
        given.position,
        given.slot,
    )
    return (mixed * torch.sigmoid(gate)).flatten(1), key_cache, value_cache
