"""Steps of a dense model and draws of tokens in turn on the CPU, as one op: `decode_step` and `sample_step`. Why: see
`decode_beams`.
"""

from collections.abc import Sequence

import torch

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.decode_step import decode_step_reference
from arfast.ops.sample_step import GOES_ON, NOT_FINITE, SampleState, sample_step_reference

_ops = torch.ops.arfast


def decode_samples(
    state: SampleState,
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
    beam_slots: torch.Tensor | None = None,
) -> int:
    """Feed the sequences' last tokens to the model and append those that follow, up to `steps` times.

    Args:
        state: of the sequences, after their first step.
        weights, cos, sin, k_cache, v_cache, num_heads, eps, windows, qkv_bias, o_bias, qk_norm, beam_slots: as for
            `decode_step`.
        seqlens: int32 [R], contiguous: the tokens of every sequence in the caches; the call counts those that it adds,
            padding after the end of a sequence too.
        steps: at least 1.

    Returns:
        How many steps were taken: fewer once all sequences have ended, or when logits were not finite (see
        `state.status`).

    Raises:
        RuntimeError: an argument does not fit: `decode_step: ...`, `sample_step: ...` or `decode_samples: steps must be
            at least 1, got <actual>`. Steps before the one that fails are done.

    The same bits as of `decode_step`, with advance and with_tile_sums, and `sample_step`.
    """
    if needs_grad(*weights, k_cache, v_cache):
        raise RuntimeError("decode_samples: inputs must not require a gradient (use torch.no_grad), got one that does")
    limits = [-1 if window is None else window for window in windows or [None] * len(k_cache)]
    return _ops.decode_samples(
        steps, weights, cos, sin, k_cache, v_cache, seqlens, beam_slots, limits, num_heads, eps, qkv_bias, o_bias,
        qk_norm, *state.arguments(),
    )  # fmt: skip


def decode_samples_reference(state, *arguments, steps, **options):
    """The specification of `decode_samples` in plain torch."""
    done, goes_on = 0, True
    while done < steps and goes_on:
        sample_step_reference(decode_step_reference(state.next_tokens, *arguments, advance=True, **options), state)
        flags = state.status.tolist()
        goes_on = any(row & GOES_ON for row in flags) and not any(row & NOT_FINITE for row in flags)
        done += 1
    return done


@register_fake("decode_samples")
def _(steps, *arguments):
    return steps
