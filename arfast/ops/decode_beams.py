"""Steps of a dense model and of a beam search in turn on the CPU, as one op: `decode_step` and `beam_step`.

After a step the processor's caches hold weights, and Python, which comes back to cold ones, takes several times as long
as in a loop of its own.
"""

from collections.abc import Sequence

import torch

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.beam_step import CAN_CHANGE, EARLY_STOPPING, GO_ON, NOT_FINITE, BeamState, beam_step_reference
from arfast.ops.decode_step import decode_step_reference

_ops = torch.ops.arfast


def decode_beams(
    state: BeamState,
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens: torch.Tensor,
    *,
    steps: int,
    num_heads: int,
    eps: float,
    windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
) -> int:
    """Feed the beams' last tokens to the model and advance the search by the logits that follow, up to `steps` times.

    Args:
        state: of the search, after its first step; with slots and prompt_lengths, without a minimum length.
        weights, cos, sin, k_cache, v_cache, num_heads, eps, windows, qkv_bias, o_bias, qk_norm: as for `decode_step`.
        seqlens: int32 [B*K], contiguous: the tokens of every beam in the caches; the call counts those that it adds.
        steps: at least 1.

    Returns:
        How many steps were taken: fewer once no item can change, or when logits were not finite (see `state.status`).

    Raises:
        RuntimeError: an argument does not fit: `decode_step: ...`, `beam_step: ...` or `decode_beams: steps must be at
            least 1, got <actual>`. Steps before the one that fails are done.

    The same bits as of `decode_step`, with advance and with_tile_sums, and `beam_step`.
    """
    if needs_grad(*weights, k_cache, v_cache):
        raise RuntimeError("decode_beams: inputs must not require a gradient (use torch.no_grad), got one that does")
    if state.min_length > 0 or state.slots is None:
        got = f"{state.min_length} and {'none' if state.slots is None else 'slots'}"
        raise RuntimeError(f"decode_beams: state must have no minimum length, but slots, got {got}")
    limits = [-1 if window is None else window for window in windows or [None] * len(k_cache)]
    s = state
    return _ops.decode_beams(
        steps, weights, cos, sin, k_cache, v_cache, seqlens, limits, num_heads, eps, qkv_bias, o_bias, qk_norm,
        s.ends, s.length_powers, EARLY_STOPPING[s.early_stopping], s.longest_counts, s.lengths, s.running, s.parents,
        s.tokens, s.log_probs, s.scores, s.endings, s.ending_log_probs, s.improvable, s.status, s.next_tokens, s.rows,
        s.slots, s.prompt_lengths, s.own_slots,
    )  # fmt: skip


def decode_beams_reference(state, *arguments, steps, **options):
    """The specification of `decode_beams` in plain torch."""
    done, goes_on = 0, True
    while done < steps and goes_on:
        options |= dict(beam_slots=state.slots, advance=True)
        beam_step_reference(decode_step_reference(state.next_tokens, *arguments, **options), state)
        flags = state.status.tolist()
        goes_on = any(item & CAN_CHANGE and item & GO_ON for item in flags)
        goes_on &= not any(item & NOT_FINITE for item in flags)
        done += 1
    return done


@register_fake("decode_beams")
def _(steps, *arguments):
    return steps
