"""The router and the routed experts.

T tokens, D hidden size, E experts, I intermediate size of an expert, A experts a token (top_k), G group size.
"""

import torch

from ..registration import register
from . import reference

__all__ = ["reference"]


def _router(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(weight.shape[1] == x.shape[1], lambda: "router: weight is not [E, D]")
    torch._check(0 < top_k <= weight.shape[0], lambda: f"router: top_k {top_k} of {weight.shape[0]} experts")
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


def _float_moe(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    torch._check(gate_up.shape[2] == x.shape[1], lambda: "float_moe: gate_up is not [E, 2I, D]")
    torch._check(
        down.shape[1] == x.shape[1] and down.shape[2] * 2 == gate_up.shape[1],
        lambda: "float_moe: down is not [E, D, I]",
    )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _int4_moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_qweight: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_qweight: torch.Tensor,
    down_scales: torch.Tensor,
) -> torch.Tensor:
    torch._check(
        gate_up_qweight.shape[2] * 2 == x.shape[1], lambda: "int4_moe: gate_up_qweight is not [E, 2I, D/2]"
    )
    torch._check(
        down_qweight.shape[1] == x.shape[1] and down_qweight.shape[2] * 4 == gate_up_qweight.shape[1],
        lambda: "int4_moe: down_qweight is not [E, D, I/2]",
    )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register("router(Tensor x, Tensor weight, int top_k) -> (Tensor, Tensor)", reference.router, _router)
register(
    "float_moe(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down) -> Tensor",
    reference.float_moe,
    _float_moe,
)
register(
    "int4_moe(Tensor x, Tensor ids, Tensor weights, Tensor gate_up_qweight, Tensor gate_up_scales, "
    "Tensor down_qweight, Tensor down_scales) -> Tensor",
    reference.int4_moe,
    _int4_moe,
)
