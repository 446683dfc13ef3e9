"""The two norms of the model (Qwen3_5MoeRMSNorm and Qwen3_5MoeRMSNormGated), over the last dimension."""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] around zero -> x / rms(x) * (1 + weight) in float32, rounded to x.dtype."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normalized * (1.0 + weight.float())).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x, gate [..., D], weight [D] around one -> x / rms(x) * weight * silu(gate), rounded to x.dtype.

    The normalized value is rounded to x.dtype before the weight, and weighted in their common dtype, as
    Hugging Face does.
    """
    wide = x.float()
    normalized = (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
    return (weight * normalized * functional.silu(gate.float())).to(x.dtype)
