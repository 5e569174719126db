"""Fused ops for autoregressive language models: one file per op, each with its reference in plain torch."""

from arfast.ops.rms_norm import rms_norm, rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
