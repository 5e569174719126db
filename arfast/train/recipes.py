"""Named settings of `TrainConfig`: the published recipe of Llama 3, and one for a small model on two cores.

Llama 3: Grattafiori et al., arXiv:2407.21783, table 3 and section 3.4. AdamW, a warm-up of 8,000 steps, a cosine to 1 %
of the peak, and over the last 40 M tokens a straight line to zero. Batches of 4 M tokens in sequences of 4,096; after
252 M tokens 8 M in sequences of 8,192; after 2.87 T tokens 16 M. The last 800 B tokens take the length to 131,072. Here
every edge is moved to the nearest step, and the cosine ends where the line to zero begins: 15.6 T tokens are 1,100,927
such steps, while the cosine is said to take 1,200,000. Not published, and chosen here: the lengths on the way to
131,072 (each is twice the one before), the optimizer's betas, epsilon, weight decay and clipping (those of Llama 2,
arXiv:2307.09288, section 2.2), and the schedules of 8B and 70B but for their peaks (those of 405B).

The base of the rotary frequencies is 500,000 from the start, as in the model's preset. The mixture is a matter of the
data set: `LLAMA3_MIXTURE` has its shares of tokens.
"""

from __future__ import annotations

from typing import Any

LLAMA3_MIXTURE = {"general knowledge": 0.50, "mathematics and reasoning": 0.25, "code": 0.17, "multilingual": 0.08}

_LONGEST = 131_072
_MILLION = 1 << 20  # of the batch sizes, which are powers of two
_SHORT = 60 * 4 * _MILLION  # 252 M tokens in whole steps of 4 M
_LARGER_BATCHES = _SHORT + 342_101 * 8 * _MILLION  # 2.87 T
_LONG_CONTEXT = _LARGER_BATCHES + 711_083 * 16 * _MILLION  # 14.8 T: 800 B before the end
_LONG_CONTEXT_STEPS = 47_683  # of 16 M tokens: 800 B


def _long_context(seqlens: tuple[int, ...]) -> list[list[int]]:
    """Equal shares of the long-context tokens."""
    steps = _LONG_CONTEXT_STEPS // len(seqlens)
    return [[_LONG_CONTEXT + i * steps * 16 * _MILLION, seqlen] for i, seqlen in enumerate(seqlens)]


def _llama3(peak: float) -> dict[str, Any]:
    return dict(
        max_tokens=_LONG_CONTEXT + _LONG_CONTEXT_STEPS * 16 * _MILLION,
        seqlen=_LONGEST,
        batch_size=16 * _MILLION // _LONGEST,
        micro_batch_size=1,
        batch_ramp=[
            [0, 4 * _MILLION // _LONGEST],
            [_SHORT, 8 * _MILLION // _LONGEST],
            [_LARGER_BATCHES, 16 * _MILLION // _LONGEST],
        ],
        seqlen_ramp=[[0, 4096], [_SHORT, 8192], *_long_context((16_384, 32_768, 65_536, _LONGEST))],
        packing="documents",
        learning_rate=peak,
        warmup_tokens=_SHORT + (8000 - 60) * 8 * _MILLION,
        final_lr_ratio=0.01,
        decay_tokens=3 * 16 * _MILLION,  # 40 M tokens, in whole steps
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-5,
        max_grad_norm=1.0,
        dtype="bfloat16",
        activation_checkpointing=True,
        on_nonfinite="rewind",
        on_spike="rewind",
        rewind_steps=100,
        save_every=500,
        eval_every=5000,
    )


RECIPES: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama3(3e-4),
    "llama3-70b": _llama3(1.5e-4),
    "llama3-405b": _llama3(8e-5),
    # The same shape for a model of some 10 M parameters on the standard library: shorter sequences and smaller batches
    # first, a cosine to 1 % of the peak, a line to zero at the end. Muon, which learns more from as many tokens there
    # (benchmarks/results/training-sweep.md); its own work per step is why batches grow to 8.
    "small": dict(
        max_tokens=10_240_000,
        seqlen=512,
        batch_size=8,
        micro_batch_size=4,
        batch_ramp=[[0, 4], [4_096_000, 8]],
        seqlen_ramp=[[0, 256], [2_048_000, 512]],
        optimizer="muon",
        learning_rate=1e-3,
        warmup_tokens=204_800,
        final_lr_ratio=0.01,
        decay_tokens=409_600,
        on_nonfinite="rewind",
        on_spike="rewind",
        save_every=200,
        eval_every=400,
        eval_tokens=50_000,
        log_every=10,
    ),
}
