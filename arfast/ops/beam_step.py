"""A whole step of beam search: `beam_prune` and the update of the search's state, in one launch on a GPU.

The rules are those of transformers' beam search: the score of a finished hypothesis is the sum of its log-probabilities
/ length^length_penalty.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arfast.ops._gumbel import gumbel_noise
from arfast.ops._library import needs_grad, register_fake
from arfast.ops.beam_prune import beam_prune_reference

_ops = torch.ops.arfast

NO_HYPOTHESIS = -1e9  # the score of one that does not exist, as in transformers
CAN_CHANGE, GO_ON, NOT_FINITE = 1, 2, 4  # the bits of BeamState.status
EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@dataclass
class BeamState:
    """B searches with K beams each, all of it in the memory of the device: no step waits for the host.

    Beams are append-only back-pointers (parent, token), and a finished hypothesis is the place in them where it ended:
    a step writes O(K), and no sequence is copied while the search runs.

    Attributes:
        ends: int64 [at most 8], the tokens that end a hypothesis.
        length_powers: float32 [L + 1], length^length_penalty; L is the largest length.
        early_stopping: True: an item is finished with its K-th hypothesis. False: when its best beam, at its present
            length, would not beat its worst hypothesis. "never": the same at the length that suits the beam best.
        longest_counts: whether that length is L.
        min_length: tokens in `ends` are no candidates of an item that has fewer than this; they still count in lse.
        lengths: int32 [B], tokens generated so far. At L a step changes nothing.
        running: float32 [B, K], the scores of the beams, descending: sums of log-probabilities.
        parents, tokens: int32 [L, B, K], per step the beam that a beam continues, and with which token.
        log_probs: float32 [L, B, K], of the tokens.
        scores: float32 [B, K], of the finished hypotheses, descending; -1e9 for none.
        endings: int32 [B, K, 3], where they ended: (the last step or -1 for none, the beam it continues, the token).
        ending_log_probs: float32 [B, K], of these tokens.
        improvable: bool [B], once false an item accepts no more.
        status: int32 [B], a sum of 1: the item's hypotheses can still change; 2: some candidate of the last step did
            not end; 4: a row of its logits had no finite log-sum-exp: NaN, infinity or nothing but -inf, which with
            `log_probs` is no error but a beam that cannot go on.
        next_tokens: int64 [B*K], to be fed to the model.
        rows: int64 [B*K], the row of the step's logits that each beam continues.
        slots: int32 [B*K, S] or None, `beam_slots` of `attention_decode`: the slot of the caches that holds a position
            of a beam. The caller fills in where the prompts are.
        prompt_lengths: int32 [B] or None: the first generated token of an item is at this position of the caches.
        own_slots: int32 [B*K] or None, the slot at which a beam stores its own next token; by default its row.
    """

    ends: Tensor
    length_powers: Tensor
    early_stopping: bool | str
    longest_counts: bool
    lengths: Tensor
    running: Tensor
    parents: Tensor
    tokens: Tensor
    log_probs: Tensor
    scores: Tensor
    endings: Tensor
    ending_log_probs: Tensor
    improvable: Tensor
    status: Tensor
    next_tokens: Tensor
    rows: Tensor
    slots: Tensor | None = None
    prompt_lengths: Tensor | None = None
    own_slots: Tensor | None = None
    min_length: int = 0

    @classmethod
    def start(
        cls,
        batch: int,
        num_beams: int,
        max_length: int,
        *,
        ends: tuple[int, ...] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        min_length: int = 0,
        device: torch.device | str = "cpu",
    ) -> "BeamState":
        """The state before the first step, in which an item has one row of logits and no beams yet."""
        beams = (batch, num_beams)

        def integers(*shape):
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            ends=torch.tensor(ends, dtype=torch.int64, device=device),
            length_powers=(torch.arange(max_length + 1, dtype=torch.float64) ** length_penalty).float().to(device),
            early_stopping=early_stopping,
            longest_counts=early_stopping == "never" and length_penalty > 0,
            lengths=integers(batch),
            running=torch.zeros(beams, device=device),
            parents=integers(max_length, *beams),
            tokens=integers(max_length, *beams),
            log_probs=torch.zeros(max_length, *beams, device=device),
            scores=torch.full(beams, NO_HYPOTHESIS, device=device),
            endings=torch.tensor([-1, 0, 0], dtype=torch.int32, device=device).repeat(*beams, 1),
            ending_log_probs=torch.zeros(beams, device=device),
            improvable=torch.ones(batch, dtype=torch.bool, device=device),
            status=integers(batch).fill_(CAN_CHANGE | GO_ON),
            next_tokens=torch.zeros(batch * num_beams, dtype=torch.int64, device=device),
            rows=torch.zeros(batch * num_beams, dtype=torch.int64, device=device),
            min_length=min_length,
        )


def beam_step(
    logits: Tensor,
    state: BeamState,
    *,
    banned: Tensor | None = None,
    log_probs: bool = False,
    generator_state: Tensor | None = None,
    tile_sums: Tensor | None = None,
) -> None:
    """Advance `state`, in place, by the best continuations of its beams: see `beam_prune` for their order.

    The candidates are the M = max(2, 1 + number of end tokens) * K best continuations of an item, which always leaves K
    that do not end. Those of them among the K best that end, or that reach the largest length, become hypotheses.

    Args:
        logits: [B*K, V], float32, bfloat16 or float16, or float64 on the CPU; [B, V] in the first step.
        state: see BeamState; K <= 128, at most 8 end tokens, every tensor contiguous.
        banned, log_probs: as for `beam_prune`.
        generator_state: int64 [B, 3], an item's (seed, sample, step): its candidates are then drawn without replacement
            from the softmax of all their scores, in this order, by the M largest sums of logit and Gumbel noise (Kool
            et al. 2019, arXiv 1903.06059), which is a function of this state and of k * V + v. Those that end and are
            among the K drawn first become hypotheses, the K best by score of the others the beams: transformers'
            `do_sample`. The call adds 1 to the step, on the device. The draw does not depend on the batch or the number
            of threads; nor on the device, but for the last bit of lse, which `log_probs` makes exact.
        tile_sums: float32 [2, tiles, B*K], those of `decode_step` for these logits, of which then only the few tiles
            are read that can hold a candidate. On the CPU, without banned, log_probs, generator_state and a minimum
            length.

    Raises:
        RuntimeError: an argument does not fit: `beam_step: <argument> must <rule>, got <actual>`.

    The result of an item has the same bits for every number of threads and whatever the other items are.

    Example:
        >>> state = BeamState.start(2, 4, max_length=10, ends=(0,))
        >>> beam_step(torch.randn(2, 1000), state)
        >>> beam_step(torch.randn(2 * 4, 1000), state)
        >>> state.lengths, state.next_tokens.shape
        (tensor([2, 2], dtype=torch.int32), torch.Size([8]))
    """
    if state.early_stopping not in EARLY_STOPPING:
        raise RuntimeError(f"beam_step: early_stopping must be True, False or 'never', got {state.early_stopping!r}")
    if needs_grad(logits):
        logits = logits.detach()
    s = state
    _ops.beam_step(
        logits, banned, log_probs, s.ends, s.length_powers, EARLY_STOPPING[s.early_stopping],
        s.longest_counts, s.min_length, s.lengths, s.running, s.parents, s.tokens, s.log_probs, s.scores, s.endings,
        s.ending_log_probs, s.improvable, s.status, s.next_tokens, s.rows, s.slots, s.prompt_lengths, s.own_slots,
        generator_state, tile_sums,
    )  # fmt: skip


def beam_step_reference(
    logits, state, *, banned=None, log_probs=False, generator_state=None, tile_sums=None, prune=beam_prune_reference
):
    """The specification of `beam_step` in plain torch, for items that are all equally far."""
    (batch, beams), step = state.running.shape, int(state.lengths[0])
    if step == len(state.parents):
        return
    per_item = len(logits) // batch
    count = max(2, 1 + len(state.ends)) * beams
    so_far = state.running[:, :per_item]
    if step < state.min_length and len(state.ends) > 0:
        banned = torch.zeros_like(logits, dtype=torch.bool) if banned is None else banned.expand(logits.shape).clone()
        banned[:, state.ends] = True
    options = dict(num_candidates=count, banned=banned, log_probs=log_probs)
    if generator_state is not None:
        options["noise"] = gumbel_noise(generator_state, per_item * logits.shape[1]).view(logits.shape)
        generator_state[:, 2] += 1
    scores, parents, tokens, lse = prune(logits, so_far, **options)
    exists = scores > -torch.inf
    ends = (torch.isin(tokens, state.ends) | (step + 1 == len(state.parents))) & exists

    full = (state.endings[:, :, 0] >= 0).all(-1)
    closed = full if state.early_stopping is True else torch.zeros_like(full)
    accepted = ends & (state.improvable & ~closed)[:, None]
    new = (scores / state.length_powers[step + 1]).masked_fill(~accepted, -torch.inf)[:, :beams]
    merged, order = torch.cat([state.scores, new], dim=1).sort(dim=1, descending=True, stable=True)
    endings = torch.stack([torch.full_like(parents, step), parents, tokens], dim=-1)[:, :beams]
    endings = torch.cat([state.endings, endings], dim=1).gather(1, order[:, :beams, None].expand(-1, -1, 3))
    gained = scores - so_far.gather(1, parents.long())
    state.ending_log_probs.copy_(torch.cat([state.ending_log_probs, gained], dim=1).gather(1, order[:, :beams]))

    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    by_end = ends.gather(1, by_score).sort(dim=-1, stable=True).indices
    going = by_score.gather(1, by_end)[:, :beams]  # the K best that do not end, then those that do
    scores, parents, tokens, gained = (x.gather(1, going) for x in (scores, parents, tokens, gained))
    first_row = torch.arange(batch, device=logits.device)[:, None]
    _move_slots(state, step, parents)
    state.parents[step], state.tokens[step] = parents, tokens
    state.log_probs[step] = gained
    state.next_tokens.copy_(tokens.flatten())
    state.rows.copy_((first_row * per_item + parents).flatten())
    state.running.copy_(scores.masked_fill(ends.gather(1, going), -torch.inf))  # what ended goes nowhere
    state.scores.copy_(merged[:, :beams])
    state.endings.copy_(endings)
    state.lengths += 1

    length = len(state.parents) if state.longest_counts else step + 1
    full = (endings[:, :, 0] >= 0).all(-1)
    state.improvable &= ~full | (state.running[:, 0] / state.length_powers[length] > state.scores[:, -1])
    can_change = state.improvable & ~full if state.early_stopping is True else state.improvable
    usable = lse < torch.inf if log_probs else lse.isfinite()
    goes_on, finite = (exists & ~ends).any(-1), usable.all(-1)
    state.status.copy_(CAN_CHANGE * can_change + GO_ON * goes_on + NOT_FINITE * ~finite)


def _move_slots(state, step, parents):
    if state.slots is None:
        return
    slots = state.slots.view(*parents.shape, -1)
    for item, prompt in enumerate(state.prompt_lengths.tolist()):
        generated = slice(prompt, prompt + step)
        slots[item, :, generated] = slots[item, parents[item].long(), generated]
        rows = torch.arange(len(state.slots), device=slots.device)
        own = (rows if state.own_slots is None else state.own_slots).view(len(slots), -1)
        slots[item, :, prompt + step : prompt + step + 1] = own[item, :, None]


@register_fake("beam_step")
def _(*arguments):
    return None
