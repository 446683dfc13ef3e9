"""Top-k routing and the experts' SwiGLU in plain PyTorch (Qwen3_5MoeTopKRouter and Qwen3_5MoeExperts).

T tokens, D hidden size, E experts, I intermediate size of one expert, A experts a token (top_k), G group
size. x is float32 or bfloat16; everything between the input and the one rounding of the output is float32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from ..linear.reference import dequantize_int4, float_linear


def router(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D], weight [E, D] -> ids i64 [T, A], weights f32 [T, A], by descending weight.

    The logits and the weights are rounded to x.dtype, as Hugging Face does; the weights of a token sum to 1
    (before that rounding). Of equal logits the lowest expert comes first.
    """
    logits = float_linear(x, weight).float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    values = logits.softmax(dim=-1).gather(1, ids)
    return ids, (values / values.sum(dim=-1, keepdim=True)).to(x.dtype).float()


def float_moe(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Sums weight * down_e(silu(gate_e(x)) * up_e(x)) over each token's experts.

    x [T, D], ids i64 [T, A] in [0, E), weights f32 [T, A], gate_up [E, 2I, D] (gate rows, then up rows), down
    [E, D, I] -> [T, D] in x.dtype.

    Raises:
        IndexError: an id is out of range.
    """
    return _experts(x, ids, weights, gate_up.shape[0], lambda e: (gate_up[e].float(), down[e].float()))


def int4_moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_qweight: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_qweight: torch.Tensor,
    down_scales: torch.Tensor,
) -> torch.Tensor:
    """As `float_moe`, with qweights u8 [E, 2I, D/2], [E, D, I/2] and scales bf16 [E, 2I, D/G], [E, D, I/G].

    Raises:
        IndexError: an id is out of range.
    """

    def matrices(e: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            dequantize_int4(gate_up_qweight[e], gate_up_scales[e]),
            dequantize_int4(down_qweight[e], down_scales[e]),
        )

    return _experts(x, ids, weights, gate_up_qweight.shape[0], matrices)


def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    matrices: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    per_choice = x.new_empty((*ids.shape, x.shape[1]), dtype=torch.float32)
    for e in torch.unique(ids).tolist():
        if not 0 <= e < num_experts:
            raise IndexError(f"moe: expert {e} is not in [0, {num_experts})")
        token, choice = torch.where(ids == e)
        gate_up, down = matrices(e)
        gate, up = (x[token].float() @ gate_up.T).chunk(2, dim=-1)
        per_choice[token, choice] = (functional.silu(gate) * up) @ down.T
    return (per_choice * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
