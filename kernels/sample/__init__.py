"""Penalties, filters and the draw of the next token, from the logits and what the slot has seen.

B sessions, T tokens of the call, S slots, V vocabulary.
"""

import torch

from ..registration import register
from . import reference

__all__ = ["reference"]


def _sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    seen: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    presence_penalty: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seed: torch.Tensor,
    generated_from: torch.Tensor,
) -> torch.Tensor:
    torch._check(logits.dtype == torch.float32, lambda: "sample: logits are not float32")
    torch._check(seen.dtype == torch.uint8, lambda: "sample: seen is not uint8")
    torch._check(seen.shape[1] == logits.shape[1], lambda: "sample: seen is not [S, V]")
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


register(
    "sample(Tensor logits, Tensor tokens, Tensor position, Tensor slot, Tensor(a!) seen, Tensor temperature, "
    "Tensor top_k, Tensor top_p, Tensor min_p, Tensor presence_penalty, Tensor repetition_penalty, "
    "Tensor seed, Tensor generated_from) -> Tensor",
    reference.sample,
    _sample,
)
