"""Fused ops for autoregressive language models: one file per op, each with its reference in plain torch."""

from arfast.ops.attention import attention, attention_reference
from arfast.ops.attention_decode import attention_decode, attention_decode_reference
from arfast.ops.beam_hypotheses import beam_hypotheses, beam_hypotheses_reference
from arfast.ops.beam_prune import beam_prune, beam_prune_reference
from arfast.ops.beam_step import BeamState, beam_step, beam_step_reference
from arfast.ops.cross_entropy import cross_entropy, cross_entropy_reference
from arfast.ops.decode_beams import decode_beams, decode_beams_reference
from arfast.ops.decode_samples import decode_samples, decode_samples_reference
from arfast.ops.decode_step import decode_step, decode_step_reference
from arfast.ops.grouped_mm import grouped_mm, grouped_mm_reference
from arfast.ops.kv_append import kv_append, kv_append_reference
from arfast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from arfast.ops.moe_experts import moe_experts, moe_experts_reference
from arfast.ops.moe_permute import moe_combine, moe_combine_reference, moe_permute, moe_permute_reference
from arfast.ops.moe_routing import Routing, moe_route, moe_route_reference
from arfast.ops.rms_norm import rms_norm, rms_norm_reference
from arfast.ops.rotary import rotary, rotary_reference
from arfast.ops.router_losses import (
    load_balancing_loss,
    load_balancing_loss_reference,
    router_losses,
    router_z_loss,
    router_z_loss_reference,
)
from arfast.ops.sample import sample, sample_reference
from arfast.ops.sample_step import SampleState, sample_step, sample_step_reference
from arfast.ops.speculative_verify import speculative_verify, speculative_verify_reference
from arfast.ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "BeamState",
    "Routing",
    "SampleState",
    "attention",
    "attention_decode",
    "attention_decode_reference",
    "attention_reference",
    "beam_hypotheses",
    "beam_hypotheses_reference",
    "beam_prune",
    "beam_prune_reference",
    "beam_step",
    "beam_step_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "decode_beams",
    "decode_beams_reference",
    "decode_samples",
    "decode_samples_reference",
    "decode_step",
    "decode_step_reference",
    "grouped_mm",
    "grouped_mm_reference",
    "kv_append",
    "kv_append_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "load_balancing_loss",
    "load_balancing_loss_reference",
    "moe_combine",
    "moe_combine_reference",
    "moe_experts",
    "moe_experts_reference",
    "moe_permute",
    "moe_permute_reference",
    "moe_route",
    "moe_route_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_reference",
    "router_losses",
    "router_z_loss",
    "router_z_loss_reference",
    "sample",
    "sample_reference",
    "sample_step",
    "sample_step_reference",
    "speculative_verify",
    "speculative_verify_reference",
    "swiglu",
    "swiglu_reference",
]
