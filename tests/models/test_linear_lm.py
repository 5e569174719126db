"""LinearLM: its hidden states against a plain loop, no leaks, caches, generation, files, training that resumes."""

import doctest
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import NoRepeatNGramLogitsProcessor

from arfast.data import Document, prepare_dataset
from arfast.generate import generate, rank, score
from arfast.generate.perplexity import corpus_perplexity
from arfast.hub import from_pretrained
from arfast.models import CausalLM, LinearLM, LinearLMConfig, linear_lm
from arfast.models.causal_lm import shift_labels
from arfast.nn import BranchedKVCache, StaticKVCache
from arfast.nn import trailing_sums as trailing_sums_module
from arfast.nn.trailing_sums import shift, trailing_sums
from arfast.train import TrainConfig, Trainer
from arfast.train.manifest import CheckpointError

KINDS = {
    "mean": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "ngram": {"window": 3, "ngram": True},
    "wide ngram": {"window": 20, "ngram": True},
}
V, D = 53, 24
OFFSETS = torch.tensor([0, 4, 4, 15, 16, 34], dtype=torch.int32)


def make(kind, **options) -> LinearLM:
    return LinearLM(V, D, seed=1, initializer_range=0.5, **KINDS[kind], **options)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))


def hidden_by_loop(model, document):
    """[T, d] float64, one position after the other."""
    tables, config = [table.weight.double() for table in model.model.embed_tokens], model.config
    rows = []
    for t in range(len(document)):
        seen = document[max(0, t + 1 - (config.window or len(document))) : t + 1]
        if config.ngram:
            rows.append(sum(tables[k][token] for k, token in enumerate(reversed(seen))))
        else:
            rows.append(sum(tables[0][token] for token in seen) / len(seen))
    return torch.stack(rows)


def logits_by_loop(model, documents):
    rows = [hidden_by_loop(model, document.tolist()) for document in documents]
    return torch.cat(rows) @ model.lm_head.weight.double().T


def error_of(found, exact):
    return float(((found.double() - exact).abs().max() / exact.abs().max()).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits(kind, ids, dtype):
    model = make(kind, dtype=dtype)
    limit = 4 * torch.finfo(dtype).eps
    assert error_of(model(ids).logits.flatten(0, 1), logits_by_loop(model, ids)) < limit
    packed = logits_by_loop(model, [x for x in ids.flatten().tensor_split(OFFSETS[1:-1].long()) if len(x)])
    assert error_of(model(ids, cu_seqlens=OFFSETS).logits.flatten(0, 1), packed) < limit


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients(kind, ids, packed):
    model = make(kind, dtype=torch.float64)
    offsets = OFFSETS if packed else None
    options = dict(label_smoothing=0.1, z_loss=0.01)
    model(ids, labels=ids, cu_seqlens=offsets, num_items=7, **options).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    documents = [x for x in ids.flatten().tensor_split(OFFSETS[1:-1].long()) if len(x)] if packed else ids
    logits, targets = logits_by_loop(model, documents), shift_labels(ids, offsets).flatten()
    loss = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    loss = loss + 0.01 * (logits.logsumexp(-1) ** 2)[targets != -100].sum()
    (loss / 7).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected)


def test_examples():
    for module in (linear_lm, trailing_sums_module):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0


def test_trailing_sums():
    """Every window and every cut into documents, against the sums of slices; and the gradient."""
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    for window in (None, *range(1, 14)):
        expected = [x[:, max(0, t + 1 - (window or 11)) : t + 1].sum(1) for t in range(11)]
        torch.testing.assert_close(trailing_sums(x, window), torch.stack(expected, 1))
        assert torch.autograd.gradcheck(lambda y, w=window: trailing_sums(y, w), x)
    with torch.no_grad():
        assert [shift(torch.ones(1, 3, 1), n).sum() for n in range(5)] == [3, 2, 1, 0, 0]


@pytest.mark.parametrize("window", [None, 100])
def test_long_sums_keep_their_digits(window):
    """Where a difference of running totals has lost them."""
    x = torch.rand(1, 1 << 17, 1) + 1e3
    exact = x.double().cumsum(1)
    if window:
        exact[:, window:] -= x.double().cumsum(1)[:, :-window]
    totals = x.cumsum(1)
    naive = totals.clone()
    if window:
        naive[:, window:] -= totals[:, :-window]
    error, naive_error = (float(((y - exact) / exact).abs().max()) for y in (trailing_sums(x, window), naive))
    assert error < 3e-7 and (window is None or naive_error > 100 * error)


def test_nothing_leaks(kind, ids):
    """To the last bit: not from the future, not from another document, not from before the window."""
    model = make(kind).model

    def hidden(tokens, offsets=None):
        return model(tokens.view(1, -1), offsets, None, None, False)[0]

    row, other = ids[0], (ids[0] + 1) % V
    for t in range(1, 17):
        assert torch.equal(hidden(torch.cat([row[:t], other[t:]]))[:t], hidden(row)[:t])
        offsets = torch.tensor([0, t, 17], dtype=torch.int32)
        packed = hidden(torch.cat([other[:t], row[t:]]), offsets)
        assert torch.equal(packed[t:], hidden(row, offsets)[t:])
        assert torch.equal(packed[t:], hidden(row[t:]))
        if (window := KINDS[kind].get("window", 17)) < t:
            assert torch.equal(hidden(torch.cat([other[: t - window], row[t - window :]]))[t - 1], hidden(row)[t - 1])


def test_parameters_are_a_function_of_seed_name_and_index(kind):
    one, again = make(kind), make(kind)
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    other = LinearLM(V, D, seed=2, **KINDS[kind])
    assert not any(map(torch.equal, one.parameters(), other.parameters()))
    tables = 1 if "ngram" not in kind else KINDS[kind]["window"]
    assert one.num_parameters() == (tables + 1) * V * D
    assert one.config.flops_per_token(9) == 6 * V * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(kind, ids, dtype):
    """Prompts of different lengths at once, then several tokens, then one by one: the logits of the whole pass."""
    model = make(kind, dtype=dtype)
    lengths = [11, 3]
    cache = StaticKVCache(model.config, 2, 20, dtype)
    offsets = torch.tensor([0, 11, 14], dtype=torch.int32)
    packed = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        out = [model(packed, cu_seqlens=offsets, cache=cache).logits[0].tensor_split([11])]
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            new = torch.stack([ids[i, n + start : n + stop] for i, n in enumerate(lengths)])
            out.append(model(new, cache=cache).logits)
    for i, n in enumerate(lengths):
        found = torch.cat([part[i] for part in out])
        assert error_of(found, logits_by_loop(model, ids[i : i + 1, : n + 5])) < 4 * torch.finfo(dtype).eps


def test_branches_share_the_prompt(kind, ids):
    model = make(kind)
    cache = BranchedKVCache(model.config, 1, 9, 3, 4)
    with torch.no_grad():
        model(ids[:1, :9], cache=cache.prompts)
        cache.branch(torch.zeros(3, dtype=torch.int64))
        new = torch.arange(12).view(3, 4)
        found = torch.stack([model(new[:, t : t + 1], cache=cache).logits[:, 0] for t in range(4)], 1)
        expected = model(torch.cat([ids[:1, :9].expand(3, -1), new], 1)).logits[:, 9:]
    torch.testing.assert_close(found, expected)


def greedy(model, row, count):
    for _ in range(count):
        row = [*row, int(model(torch.tensor([row])).logits[0, -1].argmax())]
    return row


def test_generate(kind, ids):
    model = make(kind)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found = generate(model, ids, max_new_tokens=9, attention_mask=mask)
    assert found[0].tolist() == greedy(model, ids[0].tolist(), 9)
    assert found[1, 9:].tolist() == greedy(model, ids[1, 9:].tolist(), 9)
    lookup = model.generate(ids, max_new_tokens=9, attention_mask=mask, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, found)
    draft = LinearLM(V, D, window=2, seed=1, initializer_range=0.5)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=9, draft_model=draft, num_draft_tokens=3), found[:1])


def test_sampling_follows_the_distribution():
    model = make("window")
    prompt = torch.tensor([[3, 1, 4]])
    draws = model.generate(prompt, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=4000, seed=0)[:, -1]
    shares = torch.bincount(draws, minlength=V) / 4000
    expected = model(prompt).logits[0, -1].softmax(-1)
    assert float((shares - expected.detach()).abs().sum()) < 0.15


def test_beams(kind):
    """As many beams as there are sequences: the best sequence of all."""
    model = LinearLM(9, 8, seed=3, initializer_range=1.0, **KINDS[kind])
    prompt = torch.tensor([[1, 2, 3, 2]])
    every = torch.tensor(list(itertools.product(range(9), repeat=3)))
    scores = score(model, torch.cat([prompt.expand(len(every), -1), every], 1), [4] * len(every))
    found = model.generate(prompt, max_new_tokens=3, num_beams=81, return_dict_in_generate=True)
    assert found.sequences[0, 4:].tolist() == every[scores.sums.argmax()].tolist()
    processors = [NoRepeatNGramLogitsProcessor(1)]
    free = model.generate(prompt, max_new_tokens=3, num_beams=4, logits_processor=processors)
    assert len(set(free[0, 3:].tolist())) == 4


def test_score(kind, ids):
    model = make(kind)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    found = score(model, ids, attention_mask=mask)
    expected = logits_by_loop(model, ids).view(2, 17, V).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected[1, 11:] = 0
    torch.testing.assert_close(found.token_logprobs[:, 1:], expected.float())
    text = ids.flatten().tolist()
    assert corpus_perplexity(model, text).num_tokens == 33
    assert len(rank(model, CharacterIds(), "ab", ["c", "de"])) == 2


class CharacterIds:
    bos_token_id, eos_token_id = 0, 1

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) % 50 + 2 for c in text]


def test_files(kind, tmp_path):
    model = make(kind, eos_token_id=[1, 2], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for read in (from_pretrained, CausalLM.from_pretrained, LinearLM.from_pretrained):
        again = read(tmp_path)
        assert type(again) is LinearLM and again.config == model.config and again.family == "arfast_linear"
        assert all(map(torch.equal, model.parameters(), again.parameters()))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "arfast_linear" and raw["hidden_size"] == D


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": None}, "config.json: vocab_size must be present"),
        ({"window": 1000, "ngram": True}, "num_hidden_layers must fit the 2 stored tensors, got 1000"),
        ({"window": 2, "ngram": True}, "num_hidden_layers|must be those of ArfastLinearLM, got missing: .*tokens.1"),
        ({"hidden_size": 32}, "wrong shape"),
        ({"window": -1}, "LinearLMConfig: window must be None or an integer"),
        ({"model_type": "linear"}, "model_type must be one of"),
    ],
)
def test_foreign_files(tmp_path, changes, message):
    make("mean").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("linear") / "data"
    texts = [f"def function_{i}(x):\n    return x + {i % 7}\n" * 5 for i in range(60)]
    prepare_dataset([Document(text, "") for text in texts], path, vocab_size=280)
    return path


def train(data, path, kind, max_steps=8, **options):
    settings = dict(max_tokens=8 * 128, seqlen=32, batch_size=4, save_every=4, dtype="bfloat16", progress=False)
    config = TrainConfig(output_dir=str(path), max_steps=max_steps, learning_rate=0.02, **settings, **options)
    return Trainer(LinearLM(280, D, seed=1, **KINDS[kind]), config, data)


@pytest.mark.parametrize(
    "kind, packing", [("mean", "contiguous"), ("mean", "documents"), ("window", "contiguous"), ("ngram", "documents")]
)
def test_training_resumes_to_the_last_bit(kind, data, tmp_path, packing):
    whole = train(data, tmp_path / "whole", kind, packing=packing)
    result = whole.fit()
    first = train(data, tmp_path / "parts", kind, packing=packing)
    first._work_between_steps, stop = _stop_after(first, 5), pytest.raises(KeyboardInterrupt)
    with stop:
        first.fit()
    resumed = train(data, tmp_path / "parts", kind, packing=packing)
    assert resumed.fit().step == 8
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert result.evaluation.loss < 5.6  # log(280) = 5.63


def _stop_after(trainer, step):
    work = trainer._work_between_steps

    def stop(*arguments):
        work(*arguments)
        if trainer.state.step == step:
            raise KeyboardInterrupt

    return stop


def test_another_model_does_not_continue_a_run(data, tmp_path):
    train(data, tmp_path, "window").fit()
    with pytest.raises(CheckpointError, match="model.window must be 5 to continue .*, got 3"):
        train(data, tmp_path, "ngram").fit()


def test_nearest_tokens():
    model = make("mean")
    weight = model.model.embed_tokens[0].weight.data
    weight[7] = 2 * weight[4]
    (token, cosine), *others = model.nearest_tokens(4, 5)
    assert token == 7 and cosine > 0.99 and len(others) == 4
    assert all(cosine > c for _, c in others)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(vocab_size=0, hidden_size=8), "vocab_size must be an integer in"),
        (dict(vocab_size=9, hidden_size=12), "hidden_size must be a multiple of 8, got 12"),
        (dict(vocab_size=9, hidden_size=8, window=0), "window must be None or an integer in"),
        (dict(vocab_size=9, hidden_size=8, window=True), "window must be None or an integer in"),
        (dict(vocab_size=9, hidden_size=8, ngram=1), "ngram must be true or false, got 1"),
        (dict(vocab_size=9, hidden_size=8, ngram=True), "window must be at most 4096 with ngram, got None"),
        (dict(vocab_size=9, hidden_size=8, initializer_range=-1), "initializer_range must be a number in"),
        (dict(vocab_size=9, hidden_size=8, eos_token_id=9), r"eos_token_id must be None or in \[0, vocab_size=9\)"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=f"LinearLMConfig: {message}"):
        LinearLMConfig(**arguments)


def test_errors(ids):
    model = make("mean")
    with pytest.raises(ValueError, match="LinearLM: position_ids must be None"):
        model(ids, position_ids=ids)
    with pytest.raises(IndexError, match="input_ids must be in"):
        model(ids + V)
    with pytest.raises(ValueError, match=r"LinearLM: token must be in \[0, vocab_size=53\), got 53"):
        model.nearest_tokens(V)
    with pytest.raises(TypeError, match="CausalLM: config must be a CausalLMConfig, got LinearLMConfig"):
        CausalLM(model.config)
