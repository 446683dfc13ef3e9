"""How near a kernel must come to its reference."""

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the expected value or, where that is small, the root mean square.

    NaN if either holds a NaN.
    """
    wide = expected.double()
    scale = wide.abs().clamp(min=wide.pow(2).mean().sqrt().item() + 1e-30)
    return ((actual.double() - wide).abs() / scale).max().item() if expected.numel() else 0.0


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||. NaN if either holds a NaN."""
    wide = expected.double()
    return float((actual.double() - wide).norm() / wide.norm())
