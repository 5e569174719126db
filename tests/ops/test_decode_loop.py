"""What decode_step does for a loop: it counts the tokens, and leaves of its logits what beam_step and sample_step can
choose from; and loops without Python."""

import copy
import dataclasses
import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from test_beam_step import start, step_logits, tensors
from test_decode_step import DTYPES, run
from test_decode_step import make as make_step
from threads import same_for_any_threads

from arfast.ops import (
    SampleState,
    beam_step,
    beam_step_reference,
    decode_beams,
    decode_beams_reference,
    decode_samples,
    decode_samples_reference,
    decode_step,
    sample_step,
)
from arfast.ops.decode_step import tile_sums_reference

NAN, INF = math.nan, math.inf


def test_advance():
    """seqlens that do not count the new tokens yet do so after the call, unless it fails."""
    arguments, options = make_step("grouped", torch.float32, 3)
    expected = run(decode_step, arguments, options)
    after = arguments[6].clone()
    arguments[6] -= 1
    for actual, wanted in zip(run(decode_step, arguments, options | dict(advance=True)), expected, strict=True):
        assert_bitwise_equal(actual, wanted)
    assert_bitwise_equal(arguments[6], after)
    full, options = torch.full((3,), 72, dtype=torch.int32), options | dict(advance=True)
    for bad in (full, torch.full_like(full, 2**31 - 1)):
        with pytest.raises(RuntimeError, match=r"decode_step: seqlens must be in \[1, 72\], .*, got \d+ at position 0"):
            decode_step(*arguments[:6], bad, **options)
    assert full.tolist() == [72] * 3
    with pytest.raises(RuntimeError, match="decode_step: seqlens must be contiguous with advance"):
        decode_step(*arguments[:6], torch.ones(6, dtype=torch.int32)[::2], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("vocab", [1, 256, 700])
def test_tile_sums(vocab, shape, dtype):
    """Of the logits as they are returned, whose bits do not change; the same for any threads, alone or in a batch."""
    arguments, options = make_step("grouped", dtype, shape[0])
    arguments[0] = torch.randint(vocab, shape)
    arguments[1][0], arguments[1][2] = (torch.randn(vocab, 32).to(dtype) for _ in range(2))
    arguments[6].clamp_(min=3)

    def tile_sums(arguments):
        (logits, sums), *_ = run(decode_step, arguments, options | dict(with_tile_sums=True))
        return logits, sums

    logits, sums = tile_sums(arguments)
    assert_bitwise_equal(logits, run(decode_step, arguments, options)[0])
    assert_bitwise_equal(sums[0], tile_sums_reference(logits)[0])
    assert_accurate(sums, tile_sums_reference(logits.double()), tile_sums_reference(logits))
    same_for_any_threads(lambda: tile_sums(arguments))
    tokens, weights, cos, sin, *caches, seqlens = arguments
    _, alone = tile_sums([tokens[1:2], weights, cos, sin, *(cache[:, 1:2] for cache in caches), seqlens[1:2]])
    assert_bitwise_equal(alone, sums[:, :, 1:2])


def test_infinite_logits_in_tiles():
    """An infinite logit, with or without a NaN beside it, and NaN alone."""
    arguments, options = make_step("grouped", torch.float32, 1)
    arguments[1][0] = torch.ones(700, 32)
    arguments[1][1].fill_(0)[0] = 1
    for values in ([INF], [INF, NAN], [NAN], [-INF]):
        head = arguments[1][2] = torch.ones(700, 32)
        head[300 : 300 + len(values), 0] = torch.tensor(values)
        (logits, sums), *_ = run(decode_step, arguments, options | dict(with_tile_sums=True))
        assert bool(sums[1, 1, 0].isnan()) == bool(logits.isnan().any()), values
        assert sums[:, ::2, 0].isfinite().all()
        assert sums[0, 1, 0] == logits.nan_to_num(-INF, INF, -INF)[0, 256:512].max()


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_tiles_of_any_spread(rows):
    """The first logits of a tile far below its maximum, far above its others, or -infinity: sums are as accurate."""
    arguments, options = make_step("grouped", torch.float32, rows)
    arguments[1][0] = torch.ones(1024, 32)
    arguments[1][1].fill_(0)[0] = 1
    head = arguments[1][2] = torch.zeros(1024, 32)
    head[:, 0] = 3 * torch.randn(1024)
    first = head.view(4, 256, 32)[:, :16, 0]
    first[:] = torch.tensor([[-7.0], [-20.0], [80.0], [-1e30]])
    (logits, sums), *_ = run(decode_step, arguments, options | dict(with_tile_sums=True))
    assert_bitwise_equal(sums[0], tile_sums_reference(logits)[0])
    assert_accurate(sums, tile_sums_reference(logits.double()), tile_sums_reference(logits))
    first[:] = torch.tensor([[-INF], [NAN], [INF], [500.0]])
    (logits, sums), *_ = run(decode_step, arguments, options | dict(with_tile_sums=True))
    assert sums[0, 0].isfinite().all() and (sums[0, 2] == INF).all()
    assert sums.isnan().any(0).any(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(sums[:, 3], tile_sums_reference(logits)[:, 3])


TILED = [(2, 3, 257, 5, 0), (1, 4, 5000, 6, 3), (3, 8, 700, 5, 1), (2, 5, 40, 4, 8), (1, 128, 300, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", TILED, ids=str)
def test_from_tile_sums(size, dtype):
    """The same choice as from the logits, with scores as accurate."""
    ours = start(size, "cpu", cache=size[3] + 9)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours)
    for name in ("running", "scores", "log_probs", "length_powers"):
        setattr(exact, name, getattr(exact, name).double())
    for step in range(size[3]):
        logits = (3 * torch.randn(size[0] * (1 if step == 0 else size[1]), size[2])).to(dtype)
        beam_step(logits, ours, tile_sums=None if step == 0 else tile_sums_reference(logits))
        beam_step(logits, plain)
        beam_step_reference(logits, exact)
        for name, value in tensors(plain).items():
            if not value.is_floating_point():
                assert torch.equal(getattr(ours, name), value), (step, name)
        for name in ("running", "scores", "log_probs"):
            assert_accurate(*(getattr(state, name) for state in (ours, exact, plain)), name=name)


def test_ties_within_tiles():
    """Of equal scores the smaller beam and token first, as without tile_sums: rows that are all the same."""
    for size in ((2, 1, 900, 4, 1), (1, 6, 900, 4, 2)):
        state = start(size, "cpu")
        beam_step(step_logits(size, state, True), state)
        state.running.fill_(-1.5)
        expected = copy.deepcopy(state)
        logits = step_logits(size, state, False)
        logits[:] = logits[0]
        beam_step(logits, state, tile_sums=tile_sums_reference(logits))
        beam_step(logits, expected)
        for name in ("tokens", "parents", "endings", "next_tokens"):
            assert torch.equal(getattr(state, name), getattr(expected, name)), name


@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [INF, NAN], "-inf everywhere", "NaN everywhere"], ids=str)
def test_broken_rows_in_tiles(bad):
    size = (2, 3, 600, 5, 1)
    state = start(size, "cpu")
    beam_step(torch.randn(2, 600), state)
    expected, logits = copy.deepcopy(state), torch.randn(6, 600)
    if isinstance(bad, str):
        logits[1] = -INF if bad.startswith("-") else NAN
    else:
        logits[1, 300 : 300 + len(bad)] = torch.tensor(bad)
    sums = tile_sums_reference(logits)
    sums[0] = torch.stack([tile.nan_to_num(-INF, INF, -INF).amax(-1) for tile in logits.split(256, 1)])
    sums[1] = torch.where(sums[0] == INF, torch.where(logits.isnan().any(-1), NAN, 1.0), sums[1])
    beam_step(logits, state, tile_sums=sums)
    beam_step(logits, expected)
    for name in ("status", "next_tokens", "parents"):
        assert torch.equal(getattr(state, name), getattr(expected, name)), name


def test_tile_sums_for_any_threads_and_batch():
    size = (5, 4, 20000, 3, 2)
    first = start(size, "cpu")
    beam_step(torch.randn(5, 20000), first)
    logits = torch.randn(20, 20000)
    sums = tile_sums_reference(logits)

    def run(items=slice(0, 5)):
        state, rows = start((items.stop - items.start, *size[1:]), "cpu"), slice(4 * items.start, 4 * items.stop)
        state.ends, state.lengths = first.ends, first.lengths[items].clone()
        state.running = first.running[items].clone()
        beam_step(logits[rows], state, tile_sums=sums[..., rows].contiguous())
        return state.running, state.next_tokens, state.tokens

    same_for_any_threads(run)
    for part, whole in zip(run(slice(3, 4)), run(), strict=True):
        wanted = whole[12:16] if whole.dim() == 1 else whole[..., 3:4, :]
        assert_bitwise_equal(part, wanted)


def test_tile_sums_errors():
    def refused(message, min_length=0, sums=(2, 1, 6), rows=6, **options):
        state = start((2, 3, 9, 4, 1), "cpu", min_length=min_length)
        with pytest.raises(RuntimeError, match="beam_step: tile_sums must " + message):
            beam_step(torch.randn(rows, 9), state, tile_sums=torch.zeros(sums), **options)

    for options in (
        dict(banned=torch.zeros(9, dtype=torch.bool)),
        dict(log_probs=True),
        dict(generator_state=torch.zeros(2, 3, dtype=torch.int64)),
        dict(min_length=1),
    ):
        refused("come without banned, log_probs, generator_state and min_length", **options)
    refused(r"have shape \[2, tiles, B\*K\] = \[2, 1, 6\], got \[2, 2, 6\]", sums=(2, 2, 6))
    refused(r"have shape", rows=2)


def search(name, dtype, items, beams, max_length, ends=(), **options):
    """A search after its first step, its model and its caches: prompts of 3 tokens, in a slot for each item."""
    (_, weights, cos, sin, k_cache, v_cache, _), model = make_step(name, dtype, items * (beams + 1), length=20)
    state = start((items, beams, weights[0].shape[0], max_length, 0), "cpu", **options)
    state.ends = torch.tensor(ends, dtype=torch.int64)
    beam_step(torch.randn(items, weights[0].shape[0]), state)
    rows = items * beams
    prompts = torch.arange(rows, rows + items, dtype=torch.int32).repeat_interleave(beams)
    state.slots = prompts[:, None].repeat(1, k_cache.shape[2])
    state.slots[:, 3:] = torch.arange(rows, dtype=torch.int32)[:, None]
    state.prompt_lengths = torch.full((items,), 3, dtype=torch.int32)
    seqlens = torch.full((rows,), 3, dtype=torch.int32)
    caches = [torch.randn(cache.shape).to(dtype) for cache in (k_cache, v_cache)]
    return state, [weights, cos, sin, *caches, seqlens], model


def after(function, state, arguments, options, **changes):
    """What it gives, and everything that it changes, on copies."""
    state, (weights, cos, sin, *changed) = copy.deepcopy(state), arguments
    changed = [tensor.clone() for tensor in changed]
    return function(state, weights, cos, sin, *changed, **options | changes), [*tensors(state).values(), *changed]


def step_by_step(state, weights, cos, sin, *cached, steps, **options):
    done = 0
    while done < steps and any(flags & 3 == 3 for flags in state.status.tolist()) and not (state.status & 4).any():
        options |= dict(beam_slots=state.slots, advance=True, with_tile_sums=True)
        logits, sums = decode_step(state.next_tokens, weights, cos, sin, *cached, **options)
        beam_step(logits, state, tile_sums=sums)
        done += 1
    return done


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["grouped", "norms, biases", "window"])
def test_decode_beams(name, dtype):
    """The bits of its two ops in turn, for any number of threads and however the steps are divided."""
    state, arguments, options = search(name, dtype, 2, 3, 9, ends=(5, 6), mode="never", length_penalty=0.7)
    done, expected = after(step_by_step, state, arguments, options, steps=20)
    assert 2 <= done <= 8
    taken, actual = after(decode_beams, state, arguments, options, steps=20)
    assert taken == done
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, e)
    same_for_any_threads(lambda: after(decode_beams, state, arguments, options, steps=20)[1])
    for steps in [2] + [1] * (done - 2):
        assert decode_beams(state, *arguments, steps=steps, **options) == steps
    for a, e in zip([*tensors(state).values(), *arguments[3:]], expected, strict=True):
        assert_bitwise_equal(a, e)


@pytest.mark.parametrize("mode", [False, True, "never"], ids=str)
def test_decode_beams_equals_its_reference(mode):
    state, arguments, options = search("long rows", torch.float32, 2, 4, 12, ends=tuple(range(20)[:8]), mode=mode)
    done, expected = after(decode_beams_reference, state, arguments, options, steps=11)
    taken, actual = after(decode_beams, state, arguments, options, steps=11)
    assert taken == done
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_decode_beams_stops():
    """When no item can change, and at logits that are not finite."""
    state, arguments, options = search("grouped", torch.float32, 2, 2, 4)
    assert decode_beams(state, *arguments, steps=9, **options) == 3
    assert state.lengths.tolist() == [4, 4] and arguments[-1].tolist() == [6] * 4
    state, arguments, options = search("grouped", torch.float32, 2, 2, 9)
    arguments[0][1][0] = NAN
    assert decode_beams(state, *arguments, steps=8, **options) == 1
    assert (state.status & 4).all()


def test_decode_beams_errors():
    state, arguments, options = search("grouped", torch.float32, 2, 2, 30)
    with pytest.raises(RuntimeError, match="decode_beams: steps must be at least 1, got 0"):
        decode_beams(state, *arguments, steps=0, **options)
    full = [*arguments[:-1], torch.full_like(arguments[-1], 20)]
    with pytest.raises(RuntimeError, match=r"decode_step: seqlens must be in \[1, 22\], .*, got 23 at position 0"):
        decode_beams(state, *full, steps=8, **options)
    assert full[-1].tolist() == [22] * 4 and state.lengths.tolist() == [3, 3]  # what was done before
    with pytest.raises(RuntimeError, match="beam_step: running must have shape"):
        decode_beams(dataclasses.replace(state, running=torch.zeros(4)), *arguments, steps=1, **options)
    for changes in (dict(min_length=2), dict(slots=None)):
        with pytest.raises(RuntimeError, match="decode_beams: state must have no minimum length, but slots, got"):
            decode_beams(dataclasses.replace(state, **changes), *arguments, steps=1, **options)
    with pytest.raises(RuntimeError, match="decode_beams: inputs must not require a gradient"):
        decode_beams(state, [arguments[0][0].requires_grad_(), *arguments[0][1:]], *arguments[1:], steps=1, **options)


def samples(name, dtype, rows, max_length, ends=(), slots=False, **filters):
    """Sequences after their first token, their model and their caches, which hold prompts of 1 to 3 tokens."""
    arguments, options = make_step(name, dtype, rows + slots, length=20)
    _, weights, cos, sin, k_cache, v_cache, _ = arguments
    generator = torch.arange(3 * rows).view(rows, 3)
    state = SampleState.start(generator, max_length, ends=ends, pad_token=1, **filters)
    sample_step(torch.randn(rows, weights[0].shape[0]), state)
    seqlens = torch.arange(rows, dtype=torch.int32) % 3 + 1
    if slots:  # every sequence in the slot before its own
        options["beam_slots"] = torch.arange(rows, dtype=torch.int32)[:, None].repeat(1, k_cache.shape[2]) + 1
    caches = [torch.randn(cache.shape).to(dtype) for cache in (k_cache, v_cache)]
    return state, [weights, cos, sin, *caches, seqlens], options


def draw_by_draw(state, weights, cos, sin, *cached, steps, **options):
    done = 0
    while done < steps and any(flags & 1 for flags in state.status.tolist()) and not (state.status & 2).any():
        options |= dict(advance=True, with_tile_sums=True)
        logits, sums = decode_step(state.next_tokens, weights, cos, sin, *cached, **options)
        sample_step(logits, state, tile_sums=sums)
        done += 1
    return done


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name,slots", [("grouped", True), ("norms, biases", False), ("window", False)])
def test_decode_samples(name, slots, dtype):
    """The bits of its two ops in turn, for any number of threads and however the steps are divided; some sequences end
    before the others."""
    state, arguments, options = samples(name, dtype, 4, 9, range(0, 300, 7), slots, temperature=1.5, top_k=60)
    state.status.fill_(1)
    done, expected = after(draw_by_draw, state, arguments, options, steps=20)
    taken, actual = after(decode_samples, state, arguments, options, steps=20)
    assert 3 <= taken == done <= 8
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, e)
    same_for_any_threads(lambda: after(decode_samples, state, arguments, options, steps=20)[1])
    for steps in [2] + [1] * (done - 2):
        assert decode_samples(state, *arguments, steps=steps, **options) == steps
    for a, e in zip([*tensors(state).values(), *arguments[3:]], expected, strict=True):
        assert_bitwise_equal(a, e)
    assert len(set(state.lengths.tolist())) > 1


@pytest.mark.parametrize("filters", [dict(temperature=0.0), dict(top_k=9), {}], ids=str)
def test_decode_samples_equals_its_reference(filters):
    state, arguments, options = samples("long rows", torch.float32, 3, 12, range(0, 300, 9), **filters)
    state.status.fill_(1)
    done, expected = after(decode_samples_reference, state, arguments, options, steps=11)
    taken, actual = after(decode_samples, state, arguments, options, steps=11)
    assert taken == done
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_decode_samples_stops():
    """When all sequences have ended, and at logits that are not finite."""
    state, arguments, options = samples("grouped", torch.float32, 2, 4)
    assert decode_samples(state, *arguments, steps=9, **options) == 3
    assert state.lengths.tolist() == [4, 4] and arguments[-1].tolist() == [4, 5]
    state, arguments, options = samples("grouped", torch.float32, 2, 9)
    arguments[0][1][0] = NAN
    assert decode_samples(state, *arguments, steps=8, **options) == 1
    assert state.status.tolist() == [2, 2]


def test_decode_samples_errors():
    state, arguments, options = samples("grouped", torch.float32, 2, 30)
    with pytest.raises(RuntimeError, match="decode_samples: steps must be at least 1, got 0"):
        decode_samples(state, *arguments, steps=0, **options)
    full = [*arguments[:-1], torch.full_like(arguments[-1], 20)]
    with pytest.raises(RuntimeError, match=r"decode_step: seqlens must be in \[1, 22\], .*, got 23 at position 0"):
        decode_samples(state, *full, steps=8, **options)
    assert full[-1].tolist() == [22, 22] and state.lengths.tolist() == [3, 3]  # what was done before
    with pytest.raises(RuntimeError, match="sample_step: lengths must have shape"):
        decode_samples(dataclasses.replace(state, lengths=state.lengths[:1]), *arguments, steps=1, **options)
    with pytest.raises(RuntimeError, match="decode_samples: inputs must not require a gradient"):
        decode_samples(state, [arguments[0][0].requires_grad_(), *arguments[0][1:]], *arguments[1:], steps=1, **options)


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    run_on_target(target, [__file__], chosen="tile or decode_beams or decode_samples")
