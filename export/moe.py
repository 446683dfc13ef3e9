"""The feed-forward half of a layer: routed experts beside one shared expert.

T tokens, D hidden size, E experts, I intermediate size of one expert, A experts a token, G group size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import ModelConfig
from .linear import WeightSource, frozen


class FloatExperts(nn.Module):
    """gate_up [E, 2I, D] (gate rows, then up rows) and down [E, D, I], in the model's dtype."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = frozen(gate_up), frozen(down)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], ids i64 [T, A], weights f32 [T, A] -> [T, D]."""
        return torch.ops.qwen.float_moe(x, ids, weights, self.gate_up, self.down)


class Int4Experts(nn.Module):
    """gate_up u8 [E, 2I, D/2], bf16 [E, 2I, D/G] and down u8 [E, D, I/2], bf16 [E, D, I/G]."""

    def __init__(
        self, gate_up_qweight: Tensor, gate_up_scales: Tensor, down_qweight: Tensor, down_scales: Tensor
    ) -> None:
        super().__init__()
        self.gate_up_qweight, self.gate_up_scales = frozen(gate_up_qweight), frozen(gate_up_scales)
        self.down_qweight, self.down_scales = frozen(down_qweight), frozen(down_scales)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], ids i64 [T, A], weights f32 [T, A] -> [T, D]."""
        return torch.ops.qwen.int4_moe(
            x,
            ids,
            weights,
            self.gate_up_qweight,
            self.gate_up_scales,
            self.down_qweight,
            self.down_scales,
        )


class SparseMoe(nn.Module):
    """x [T, D] -> [T, D]: each token's top A experts, and the shared expert behind its own gate."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = source.parameter("gate.weight")
        self.experts = source.experts("experts.gate_up_proj", "experts.down_proj")
        self.shared_gate_up_proj = source.linear(
            "shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"
        )
        self.shared_down_proj = source.linear("shared_expert.down_proj.weight")
        self.shared_expert_gate = source.linear("shared_expert_gate.weight")

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = torch.ops.qwen.router(x, self.gate, self.top_k)
        routed = self.experts(x, ids, weights)
        gate, up = self.shared_gate_up_proj(x).chunk(2, dim=-1)
        shared = self.shared_down_proj(functional.silu(gate) * up)
        return routed + torch.sigmoid(self.shared_expert_gate(x)) * shared
