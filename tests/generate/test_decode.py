"""Decode steps that wait for nothing, and their replay as a CUDA graph: recorded on the CPU, real on a GPU."""

import contextlib
from unittest import mock

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from host_waits import no_host_waits, pretended_gpu
from recorded_graphs import capture, recorded_graphs
from tiny_models import TINY, TINY_EXPERTS

from arfast.generate import DecodeStep, generate
from arfast.generate.decode import decode_one_token
from arfast.generate.dense_step import DenseStep
from arfast.generate.sampling import Sampler
from arfast.models import CausalLM
from arfast.nn import StaticKVCache

CONFIGS = {
    "dense": TINY,
    "window, norms": TINY.replace(sliding_window=5, qk_norm=True, qkv_bias=True),
    "experts": TINY_EXPERTS.replace(router_score="sigmoid"),
}


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request):
    """Where graphs are captured: for real on a GPU, else by a recorder, of tensors that say they are on a GPU."""
    if request.param == "cuda":
        yield "cuda"
        return
    with recorded_graphs():
        yield "cpu"


@contextlib.contextmanager
def on_gpu(device):
    """Around calls that shall go the way of a GPU; on a real one it does nothing."""
    with pretended_gpu() if device == "cpu" else contextlib.nullcontext():
        yield


def make(device="cpu", name="dense", **options):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return CausalLM(CONFIGS[name].replace(**options), seed=3, dtype=dtype, device=device)


def with_prompt(model, batch, length, max_length):
    """A cache that holds random prompts."""
    cache = StaticKVCache(model.config, batch, max_length, model.head_weight.dtype, model.head_weight.device)
    ids = torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        model(ids.to(model.head_weight.device), cache=cache)
    return cache


def eager(model, cache, tokens):
    """The logits of every step by forward passes, for tokens [steps, B]."""
    with torch.no_grad():
        return torch.stack([decode_one_token(model, step, cache) for step in tokens])


def tokens_for(steps, batch, device):
    return torch.randint(61, (steps, batch), generator=torch.Generator().manual_seed(7)).to(device)


def state(cache):
    return cache.k, cache.v, cache.lengths, cache.seqlens


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_does_not_wait_for_the_gpu(name, num_tokens):
    model = make(name=name)
    cache, expected = with_prompt(model, 3, 6, 32), with_prompt(model, 3, 6, 32)
    tokens = torch.randint(61, (3, num_tokens))
    sampler = Sampler([(1, 0), (2, 0), (3, 0)], top_k=5)
    with no_host_waits(), torch.no_grad():
        logits = model(tokens, cache=cache).logits
        logits[:, -1].argmax(-1)
        sampler(logits[:, -1])
    with pretended_gpu(), torch.no_grad():  # experts go another way on a GPU
        assert_bitwise_equal(logits, model(tokens, cache=expected).logits)
    assert cache.lengths.tolist() == [6 + num_tokens] * 3


def test_the_state_stays_where_it_is():
    model = make()
    cache = with_prompt(model, 3, 6, 32)
    before = [(id(tensor), tensor.data_ptr()) for tensor in state(cache)]
    with torch.no_grad():
        model(torch.ones(3, 2, dtype=torch.int64), cache=cache)
        cache.set_lengths(torch.tensor([7, 8, 3]))
        cache.select(torch.tensor([2, 0, 2]))
        assert cache.lengths.tolist() == [3, 7, 3]
        model(torch.ones(3, 1, dtype=torch.int64), cache=cache)
        assert cache.lengths.tolist() == [4, 8, 4]
        cache.reset()
        model(torch.ones(1, 6, dtype=torch.int64), cu_seqlens=torch.tensor([0, 1, 4, 6]).int(), cache=cache)
    assert cache.lengths.tolist() == [1, 3, 2]
    assert [(id(tensor), tensor.data_ptr()) for tensor in state(cache)] == before


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_replays_equal_forward_passes(batch, name, target):
    """Over the border of 512 keys, where attention_decode begins to divide a sequence."""
    model = make(target, name)
    cache, other = with_prompt(model, batch, 505, 540), with_prompt(model, batch, 505, 540)
    tokens = tokens_for(20, batch, target)
    step = DecodeStep(model, cache)
    with on_gpu(target), mock.patch("arfast.generate.decode.decode_one_token", side_effect=decode_one_token) as calls:
        expected = eager(model, other, tokens)
        for i in range(20):
            assert_bitwise_equal(step(tokens[i]), expected[i], name=f"step {i}")
    assert calls.call_count == 2 and step.graph is not None
    for name, a, b in zip(("k", "v", "lengths"), state(cache), state(other)):
        assert_bitwise_equal(a, b, name=name)
    assert cache.lengths.tolist() == [525] * batch


def test_sequences_of_different_lengths(target):
    model = make(target)
    caches = [StaticKVCache(model.config, 3, 24, model.head_weight.dtype, target) for _ in range(2)]
    ids, offsets = torch.arange(14, device=target)[None], torch.tensor([0, 3, 4, 14], device=target).int()
    with torch.no_grad():
        for cache in caches:
            model(ids, cu_seqlens=offsets, cache=cache)
    tokens = tokens_for(10, 3, target)
    expected, step = eager(model, caches[1], tokens), DecodeStep(model, caches[0])
    with on_gpu(target):
        for i in range(10):
            assert_bitwise_equal(step(tokens[i]), expected[i], name=f"step {i}")
    assert caches[0].lengths.tolist() == [13, 11, 20]


def test_a_graph_of_the_whole_loop(target):
    """Captured by the caller: the choice of the token is in the graph, and nothing comes from the host."""
    model = make(target)
    cache, other = with_prompt(model, 2, 6, 32), with_prompt(model, 2, 6, 32)
    token = torch.tensor([3, 4], device=target)

    def step(cache):
        token.copy_(decode_one_token(model, token, cache).argmax(-1))

    expected = []
    with torch.no_grad():
        for _ in range(20):
            step(other)
            expected.append(token.tolist())
        token.copy_(torch.tensor([3, 4]))
        step(cache)  # so that everything is loaded before the capture
        actual, graph = [token.tolist()], torch.cuda.CUDAGraph()
        with on_gpu(target), torch.cuda.graph(graph):
            step(cache)
        cache.advance(18)  # and one that the capture has counted
        for _ in range(19):
            graph.replay()
            actual.append(token.tolist())
    assert actual == expected
    assert cache.lengths.tolist() == [26, 26]
    with pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 33 for this, got 32"):
        cache.advance(7)


def test_what_changes_between_replays(target):
    """The cache is rolled back and filled anew, parameters change in place, rotary tables are replaced."""
    model = make(target)
    cache, other = with_prompt(model, 2, 6, 64), with_prompt(model, 2, 6, 64)
    tokens = tokens_for(4, 2, target)
    step = DecodeStep(model, cache)

    def check(message):
        expected = eager(model, other, tokens)
        with on_gpu(target):
            for i in range(4):
                assert_bitwise_equal(step(tokens[i]), expected[i], name=message)

    check("at first")
    for each in (cache, other):
        each.set_lengths(torch.tensor([7, 3], device=target))
    check("rolled back")
    for each in (cache, other):
        each.select(torch.tensor([1, 1], device=target))
    check("reordered")
    for each in (cache, other):
        each.reset()
        with torch.no_grad():
            model(torch.arange(10, device=target).view(2, 5), cache=each)
    check("another prompt")
    with torch.no_grad():
        model.head_weight.mul_(0.5)
        model.model.rotary(None, 5000)
    check("other parameters")
    assert cache.lengths.tolist() == other.lengths.tolist() == [13, 13]


def test_no_room(target):
    """Refused before the replay: the cache is what it was."""
    model = make(target)
    step = DecodeStep(model, with_prompt(model, 2, 6, 9))
    tokens = torch.tensor([1, 2], device=target)
    with on_gpu(target):
        for _ in range(3):
            step(tokens)
        before = [tensor.clone() for tensor in state(step.cache)]
        with pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 10 for this, got 9"):
            step(tokens)
    for a, b in zip(state(step.cache), before):
        assert_bitwise_equal(a, b)


def test_what_is_not_captured(target):
    """A replay would not call hooks, and would read autocast's copies of the weights when they are gone."""

    def steps(model, function=None):
        step = DecodeStep(function or model, with_prompt(model, 1, 4, 16))
        with on_gpu(target):
            for _ in range(4):
                step(torch.tensor([1], device=target))
        return step.graph

    assert steps(make(target)) is not None
    hooked = make(target)
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert steps(hooked) is None
    model = make(target)
    assert steps(model, function=lambda *args, **options: model(*args, **options)) is None
    step = DecodeStep(model, with_prompt(model, 1, 4, 16))
    with on_gpu(target):
        assert step._can_capture()
        with mock.patch("torch.is_autocast_enabled", lambda device_type: device_type == "cuda"):
            assert not step._can_capture()


def test_on_the_emulated_gpu(request):
    """The bindings as they are on a GPU: they do not look at lengths, which only it knows."""
    model = make().bfloat16()
    tokens = tokens_for(4, 2, "cpu")
    wide = make().bfloat16().double()
    exact, baseline = (eager(m, with_prompt(m, 2, 6, 12), tokens) for m in (wide, model))
    request.getfixturevalue("emulator")
    step = DecodeStep(model, with_prompt(model, 2, 6, 12))
    with pretended_gpu(), recorded_graphs():
        actual = torch.stack([step(token).clone() for token in tokens])
    assert step.graph is not None
    assert_accurate(actual, exact, baseline)


def test_a_capture_that_fails():
    """A warning, once, and the same logits without a graph."""

    @contextlib.contextmanager
    def failing_capture(graph, **options):
        with capture(graph):
            yield
        raise RuntimeError("operation not permitted when stream is capturing")

    model, tokens = make(), tokens_for(4, 2, "cpu")
    cache = with_prompt(model, 2, 5, 9)
    expected = eager(model, with_prompt(model, 2, 5, 9), tokens)
    step = DecodeStep(model, cache)
    with recorded_graphs(), mock.patch("torch.cuda.graph", failing_capture), pretended_gpu():
        actual = [step(tokens[0])]
        with pytest.warns(UserWarning, match="DecodeStep: decoding goes on without a CUDA graph: operation not"):
            actual.append(step(tokens[1]))
        actual += [step(column) for column in tokens[2:]]
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, b)


BEAMS = dict(num_beams=4)
GROUPS = BEAMS | dict(num_beam_groups=2, diversity_penalty=0.7)
WAYS = [
    {},
    dict(do_sample=True, seed=4, num_return_sequences=3, temperature=0.4),
    BEAMS,
    BEAMS | dict(num_beam_groups=2),
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_generate_replays(options, target):
    model = make(target)
    prompts = torch.tensor([[1, 2, 3], [1, 5, 6]], device=target)
    options = dict(max_new_tokens=20, eos_token_id=[17], pad_token_id=1) | options
    with mock.patch.object(DecodeStep, "_can_capture", return_value=False):
        expected = generate(model, prompts, **options)
    with on_gpu(target), mock.patch("arfast.generate.decode.decode_one_token", side_effect=decode_one_token) as calls:
        actual = generate(model, prompts, **options)
    assert torch.equal(actual, expected)
    assert calls.call_count == 2 and actual.shape[1] > 8


@torch.no_grad()
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_step_of_the_loop_does_not_wait(options):
    """Choosing tokens, one at a time or in beams, from the second step on."""
    steps = []

    class Watched(DecodeStep):
        dense = None  # one step at a time, as on a GPU

        def __call__(self, tokens):
            steps.append(1)
            if len(steps) == 1:
                return super().__call__(tokens)
            with no_host_waits():
                return self._step(tokens)

    model, prompts = make(), torch.tensor([[1, 2, 3], [1, 5, 6]])
    with (
        mock.patch("arfast.generate.loop.DecodeStep", Watched),
        mock.patch("arfast.generate.beam.DecodeStep", Watched),
    ):
        generate(model, prompts, max_new_tokens=6, eos_token_id=[17], pad_token_id=1, **options)
    assert len(steps) >= 5


def test_errors(target):
    model = make(target)
    cache = with_prompt(model, 2, 6, 32)
    step = DecodeStep(model, cache)
    with pytest.raises(ValueError, match=r"DecodeStep: tokens must be one per sequence of the cache, \[2\], got \[1\]"):
        step(torch.tensor([1], device=target))
    with on_gpu(target):
        for _ in range(2):
            step(torch.tensor([1, 2], device=target))
        cache.select(torch.tensor([0, 1, 1], device=target))
        cache.select(torch.tensor([0, 1], device=target))
        with pytest.raises(ValueError, match="DecodeStep: cache must keep its memory, got another one"):
            step(torch.tensor([1, 2], device=target))


@pytest.mark.parametrize("options", WAYS + [dict(repetition_penalty=1.3, min_new_tokens=9), GROUPS], ids=str)
def test_generate_on_the_emulated_gpu(options, request):
    """The whole loop, prompts padded, captured where it can be: the tokens of the CPU by the same ops, which round as
    those of the GPU do."""
    model = make(initializer_range=0.6).bfloat16()
    prompts, mask = torch.tensor([[1, 1, 2, 3], [7, 5, 6, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = dict(max_new_tokens=10, eos_token_id=[17], pad_token_id=1, attention_mask=mask) | options
    with mock.patch.object(DenseStep, "serves", return_value=False):
        expected = generate(model, prompts, **options)
    request.getfixturevalue("emulator")
    with pretended_gpu(), recorded_graphs():
        actual = generate(model, prompts, **options)
    assert torch.equal(actual, expected) and actual.shape[1] > 9
