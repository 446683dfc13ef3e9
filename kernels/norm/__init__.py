"""Root-mean-square norms. No operator: the model calls these and Inductor fuses them with what is around."""

from .reference import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
