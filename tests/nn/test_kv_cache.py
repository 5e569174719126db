"""StaticKVCache: slots, lengths, and what callers may do between forward passes."""

import pytest
import torch
from host_waits import no_host_waits
from tiny_models import TINY

from arfast.models import CausalLM
from arfast.nn import BranchedKVCache, StaticKVCache

CONFIG = TINY.replace(num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def model() -> CausalLM:
    return CausalLM(CONFIG)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(0))


def test_shapes():
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=16, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 16, 1, 16)
    assert cache.k.dtype == torch.bfloat16
    assert (cache.lengths.dtype, cache.lengths.tolist()) == (torch.int32, [0, 0, 0])


def test_slots():
    cache = StaticKVCache(CONFIG, batch_size=2, max_length=4)
    cache.lengths = torch.tensor([1, 0], dtype=torch.int32)
    assert cache.begin(2).tolist() == [[1, 2], [0, 1]]
    k = torch.arange(1.0, 5.0).view(2, 2, 1, 1).expand(2, 2, 1, 16)
    cache.update(1, k, -k)
    assert cache.k[1, :, :, 0, 0].tolist() == [[0, 1, 2, 0], [3, 4, 0, 0]]
    assert torch.equal(cache.v, -cache.k)
    assert not cache.k[0].any()
    assert (cache.lengths.tolist(), cache.seqlens.tolist()) == ([1, 0], [3, 2])
    cache.commit()
    assert cache.lengths.tolist() == [3, 2]


@torch.no_grad()
def test_rollback(model, ids):
    """Tokens past set_lengths are forgotten: what speculative decoding needs, with a different length per sequence."""
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=13)
    model(ids, cache=cache)
    cache.set_lengths(torch.tensor([12, 7, 9]))
    token = torch.tensor([[1], [2], [3]])
    logits = model(token, cache=cache).logits
    for row, length in enumerate((12, 7, 9)):
        expected = model(torch.cat((ids[row, :length], token[row]))[None]).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("parents", [[2, 0, 2], [1], [0, 0, 1, 1, 2, 2]], ids=["reordered", "fewer", "more"])
def test_select(model, ids, parents):
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=16)
    model(ids, cache=cache)
    parents = torch.tensor(parents)
    cache.select(parents)
    token = torch.arange(1, len(parents) + 1)[:, None]
    logits = model(token, cache=cache).logits
    expected = model(torch.cat((ids[parents], token), dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_reset(model, ids):
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=12)
    first = model(ids, cache=cache).logits
    cache.reset()
    assert torch.equal(model(ids, cache=cache).logits, first)


@torch.no_grad()
def test_failed_pass_stores_nothing(model, ids):
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=14)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 15 for this, got 14"):
        model(ids[:, :3], cache=cache)
    assert cache.lengths.tolist() == [12] * 3
    model(ids[:, :2], cache=cache)
    assert cache.lengths.tolist() == [14] * 3


@torch.no_grad()
def test_packed_arguments(model, ids):
    cache = StaticKVCache(CONFIG, batch_size=3, max_length=14)
    offsets = torch.tensor([0, 6, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must hold one document per sequence, 3, got 2"):
        model(ids[:1], cu_seqlens=offsets, cache=cache)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="a packed batch must come first, got a cache of length 12"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4, 8, 12], dtype=torch.int32), cache=cache)


@pytest.mark.parametrize(
    ("options", "message"), [((0, 4), "batch_size must be a positive"), ((2, 1.5), "max_length must be")]
)
def test_sizes(options, message):
    with pytest.raises(ValueError, match=f"StaticKVCache: {message}"):
        StaticKVCache(CONFIG, *options)


def test_set_lengths_with_a_known_maximum_does_not_wait(model):
    caches = [StaticKVCache(CONFIG, batch_size=2, max_length=12) for _ in range(2)]
    ids, more = torch.randint(CONFIG.vocab_size, (2, 9)), torch.randint(CONFIG.vocab_size, (2, 5))
    lengths = torch.tensor([7, 4], dtype=torch.int32)
    with torch.no_grad():
        for cache in caches:
            model(ids, cache=cache)
        caches[0].set_lengths(lengths)
        with no_host_waits():
            caches[1].set_lengths(lengths, longest=7)
        assert torch.equal(*(model(more, cache=cache).logits for cache in caches))
    assert caches[1].lengths.tolist() == [12, 9]
    with pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 13"):
        caches[1].begin(1)


def test_set_lengths_only_shortens():
    cache = StaticKVCache(CONFIG, batch_size=2, max_length=4)
    with pytest.raises(ValueError, match=r"StaticKVCache: lengths must be in \[0, \[0, 0\]\], got \[1, 0\]"):
        cache.set_lengths(torch.tensor([1, 0]))


PROMPT_LENGTHS = [5, 2, 7]


def branched(model, ids, prompt_of, max_new_tokens):
    """A cache with prompts of different lengths, branched."""
    cache = BranchedKVCache(CONFIG, 3, 7, len(prompt_of), max_new_tokens, shortest_prompt=2)
    packed = torch.cat([row[:length] for row, length in zip(ids, PROMPT_LENGTHS, strict=True)])
    offsets = torch.tensor([0, *PROMPT_LENGTHS]).cumsum(0).int()
    model(packed[None], cu_seqlens=offsets, cache=cache.prompts)
    cache.branch(torch.tensor(prompt_of))
    return cache


@torch.no_grad()
@pytest.mark.parametrize("prompt_of", [[0, 1, 2], [0, 0, 1, 1, 2, 2], [2, 0, 2, 2, 1]], ids=str)
def test_branches(model, ids, prompt_of):
    """Rows continue their prompts, which are there once, to the last slot."""
    cache = branched(model, ids, prompt_of, max_new_tokens=4)
    tokens = torch.randint(0, 31, (len(prompt_of), 4), generator=torch.Generator().manual_seed(1))
    for step in range(4):
        logits = model(tokens[:, step : step + 1], cache=cache).logits[:, -1]
    for row, prompt in enumerate(prompt_of):
        whole = torch.cat([ids[prompt, : PROMPT_LENGTHS[prompt]], tokens[row]])
        torch.testing.assert_close(logits[row], model(whole[None]).logits[0, -1], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == [PROMPT_LENGTHS[prompt] + 4 for prompt in prompt_of]
    with pytest.raises(ValueError, match="BranchedKVCache: max_length must be at least 12 for this, got 11"):
        model(tokens[:, :1], cache=cache)


@torch.no_grad()
def test_a_branch_takes_over_the_past_of_another(model, ids):
    """As in a step of beam search: slots change, keys and values stay."""
    cache = branched(model, ids, [0, 0, 1, 1], max_new_tokens=5)
    sequences = [ids[prompt, : PROMPT_LENGTHS[prompt]] for prompt in (0, 0, 1, 1)]
    generator = torch.Generator().manual_seed(2)
    for parents in ([0, 1, 2, 3], [1, 0, 3, 3], [0, 0, 2, 3], [1, 1, 3, 2], [0, 1, 2, 3]):
        for row, start in enumerate(cache.lengths.tolist()):
            cache.slots[row, start:] = cache.own_slots[row]
        cache.slots.copy_(cache.slots[parents])
        for row, start in enumerate(cache.lengths.tolist()):
            cache.slots[row, start] = cache.own_slots[row]
        tokens = torch.randint(0, 31, (4, 1), generator=generator)
        sequences = [torch.cat([sequences[parent], token]) for parent, token in zip(parents, tokens, strict=True)]
        logits = model(tokens, cache=cache).logits[:, -1]
        for row, sequence in enumerate(sequences):
            torch.testing.assert_close(logits[row], model(sequence[None]).logits[0, -1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_come_first(model):
    cache = BranchedKVCache(CONFIG, 1, 4, num_rows=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="BranchedKVCache: prompts must be stored and branched first, got an empty"):
        model(torch.ones(2, 1, dtype=torch.int64), cache=cache)


def test_memory_of_branches():
    """The prompts once, and a continuation per row."""
    cache = BranchedKVCache(CONFIG, 2, 100, num_rows=16, max_new_tokens=8, shortest_prompt=99)
    token_bytes = 2 * 16 * 4  # layers, channels, float32
    assert cache.k.untyped_storage().nbytes() == (2 * 100 + 16 * 8 + 1) * token_bytes
    assert cache.prompts.k.untyped_storage().data_ptr() == cache.k.untyped_storage().data_ptr()
