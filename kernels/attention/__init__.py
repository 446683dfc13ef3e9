"""Causal grouped-query attention over a slot's key-value cache.

T rows, S slots, L cache length, Hq query heads, Hkv key-value heads, Dh head dimension.
"""

import torch

from ..registration import register
from . import reference
from .reference import rotary

__all__ = ["reference", "rotary"]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
) -> torch.Tensor:
    torch._check(
        q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0,
        lambda: "attention: q is not [T, Hq, Dh] with Hq a multiple of k's heads",
    )
    torch._check(
        key_cache.shape == value_cache.shape
        and key_cache.shape[1] == k.shape[1]
        and key_cache.shape[3] == k.shape[2],
        lambda: "attention: the caches are not [S, Hkv, L, Dh]",
    )
    torch._check(
        key_cache.dtype == q.dtype and value_cache.dtype == q.dtype,
        lambda: "attention: the caches are not in q.dtype",
    )
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor position, "
    "Tensor slot) -> Tensor",
    reference.attention,
    _attention,
)
