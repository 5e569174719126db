"""EncoderDecoder: against a plain reference one pair at a time, packing, caches, beam search, files."""

import doctest
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from host_waits import no_host_waits, pretended_gpu
from recorded_graphs import recorded_graphs

from arfast.generate import DecodeStep, score, score_continuations
from arfast.generate.decode import decode_one_token
from arfast.hub import from_pretrained
from arfast.models import CausalLM, EncoderDecoder, EncoderDecoderConfig, encoder_decoder
from arfast.nn import StaticKVCache

V, SEP, EOS, PAD = 41, 3, 2, 0
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_attention_heads=4, encoder_layers=2, decoder_layers=3,
    separator_token_id=SEP, eos_token_id=EOS, pad_token_id=PAD, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
SOURCES = [[1, 10, 11, 12, 13], [1, 20], [1, 30, 31, 32], []]
TARGETS = [[14, 15, EOS], [21, 22, 23, SEP, 24, EOS], [EOS], [5, 6]]


def make(dtype=torch.float64, **changes) -> EncoderDecoder:
    return EncoderDecoder(EncoderDecoderConfig(**SIZES | changes), seed=1, dtype=dtype)


def packed(sources=SOURCES, targets=TARGETS, padding=3):
    """(input_ids [1, N], cu_seqlens) with a document of padding behind the pairs."""
    documents = [[*source, SEP, *target] for source, target in zip(sources, targets, strict=True)] + [[PAD] * padding]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, documents))], dtype=torch.int32)
    return torch.tensor([sum(documents, [])]), offsets


def labels_of(ids):
    return ids.masked_fill(ids == PAD, -100)


# The reference: one pair, plain torch.


def attend(q_of, k_of, q_from, kv_from, causal, rotary):
    """Attention of module `q_of` (its projections) over rows; rotary: tables, or None."""
    q = q_of.q_proj(q_from).unflatten(-1, (q_of.num_heads, -1))
    k, v = (
        p(kv_from).unflatten(-1, (q_of.num_kv_heads, -1)).repeat_interleave(q_of.num_heads // q_of.num_kv_heads, 1)
        for p in (k_of.k_proj, k_of.v_proj)
    )
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if k.shape[2] == 0:
        return q_of.o_proj(torch.zeros_like(q_from))
    return q_of.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1).flatten(1))


def rotate(x, frequencies):
    angles = (torch.arange(len(x))[:, None].float() * frequencies)[:, None]
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().double(), angles.sin().double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def norm(module, x):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def feed_forward(mlp, x):
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def reference_logits(model, source, target):
    """[1 + len(target), V]: what the separator and each token of the target predict."""
    trunk, frequencies = model.model, model.model.rotary.inverse_frequencies
    x = trunk.embed_tokens(torch.tensor(source, dtype=torch.int64))
    for layer in trunk.encoder.layers:
        normed = norm(layer.input_layernorm, x)
        x = x + attend(layer.self_attn, layer.self_attn, normed, normed, False, frequencies)
        x = x + feed_forward(layer.mlp, norm(layer.post_attention_layernorm, x))
    memory = norm(trunk.encoder.norm, x)
    y = trunk.embed_tokens(torch.tensor([SEP, *target]))
    for layer in trunk.decoder.layers:
        normed = norm(layer.input_layernorm, y)
        y = y + attend(layer.self_attn, layer.self_attn, normed, normed, True, frequencies)
        normed = norm(layer.cross_attention_layernorm, y)
        y = y + attend(layer.cross_attn, layer.cross_attn, normed, memory, False, None)
        y = y + feed_forward(layer.mlp, norm(layer.post_attention_layernorm, y))
    return norm(trunk.decoder.norm, y) @ trunk.embed_tokens.weight.T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_loss_logits_and_gradients(kv_heads):
    model = make(num_key_value_heads=kv_heads)
    ids, offsets = packed()
    expected = [reference_logits(model, *pair) for pair in zip(SOURCES, TARGETS, strict=True)]
    found = model(ids, cu_seqlens=offsets).logits[0]
    for document, logits in enumerate(expected):
        end = int(offsets[document + 1])
        torch.testing.assert_close(found[end - len(logits) : end], logits, rtol=1e-10, atol=1e-10)
        assert not found[int(offsets[document]) : end - len(logits)].any()
    output = model(ids, labels_of(ids), offsets, label_smoothing=0.1, z_loss=0.01)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits, targets = torch.cat([x[:-1] for x in expected]), torch.tensor(sum(TARGETS, []))
    loss = F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.01 * logits.logsumexp(-1).square().mean()
    loss.backward()
    assert int(output.num_tokens) == len(targets)
    torch.testing.assert_close(output.loss, loss)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_pair_does_not_see_the_pack():
    """To the last bit, whatever stands beside it; and no padding, nor anything of the future, is seen."""
    model = make()
    ids, offsets = packed()
    with torch.no_grad():
        whole = model(ids, cu_seqlens=offsets).logits[0]
        for document in range(len(SOURCES)):
            first, last = offsets[document : document + 2].tolist()
            alone = model(ids[:, first:last]).logits[0]
            torch.testing.assert_close(whole[first:last], alone, rtol=1e-12, atol=1e-12)
            changed = ids.clone()
            changed[0, :first], changed[0, last - 1 :] = 7, 8
            kept = model(changed, cu_seqlens=offsets).logits[0, first : last - 1]
            torch.testing.assert_close(kept, whole[first : last - 1], rtol=1e-12, atol=1e-12)
        rows = torch.tensor([[1, 10, 11, SEP, 12, EOS], [1, 10, SEP, 11, 12, EOS]])
        together = model(rows).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(model(row[None]).logits[0], logits, rtol=1e-12, atol=1e-12)


def test_labels_of_sources_are_ignored():
    model = make()
    ids, offsets = packed()
    masked = labels_of(ids)
    for begin, source in zip(offsets.tolist(), SOURCES, strict=False):
        masked[0, begin : begin + len(source) + 1] = -100
    one, other = (model(ids, labels, offsets) for labels in (labels_of(ids), masked))
    assert torch.equal(one.loss, other.loss) and one.num_tokens == other.num_tokens
    each = model(ids, labels_of(ids), offsets, reduction="none").loss
    torch.testing.assert_close(each.sum() / one.num_tokens, one.loss)


def test_nothing_but_padding():
    model = make()
    assert not model(torch.zeros(1, 5, dtype=torch.int64)).logits.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_decoding_is_teacher_forcing(dtype):
    """Prompts of different lengths at once, then several tokens, then one by one."""
    model, exact = make(dtype), make()
    exact.load_state_dict(model.double().state_dict())
    model.to(dtype)
    new = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19], [25, 26, 27, SEP, 29]])
    prompts, offsets = packed(SOURCES[:3], [[], [33], []], padding=0)
    offsets = offsets[:-1]
    cache = StaticKVCache(model.config, 3, 10, dtype)
    parts = [model(prompts, cu_seqlens=offsets, cache=cache, logits_to_keep=offsets[1:] - 1).logits[0][:, None]]
    assert cache.lengths.tolist() == [1, 2, 1]
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        parts.append(model(new[:, start:stop], cache=cache).logits)
    found = torch.cat(parts, 1)
    for row, (source, before) in enumerate(zip(SOURCES[:3], ([], [33], []), strict=True)):
        expected = reference_logits(exact, source, [*before, *new[row].tolist()])[len(before) :]
        error = (found[row].double() - expected).abs().max() / expected.abs().max()
        assert error < 32 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="a packed batch must come first"):
        model(prompts, cu_seqlens=offsets, cache=cache)
    cache.reset()
    again = model(prompts, cu_seqlens=offsets, cache=cache, logits_to_keep=offsets[1:] - 1).logits[0][:, None]
    assert torch.equal(again, parts[0])


@torch.no_grad()
def test_a_decode_step_does_not_wait_for_the_device():
    model = make(torch.float32)
    cache = StaticKVCache(model.config, 1, 10)
    model(torch.tensor([[1, 9, SEP]]), cache=cache)
    new = torch.tensor([[7]])
    with no_host_waits():
        model(new, cache=cache)


@torch.no_grad()
def test_replays_equal_forward_passes():
    """Of a graph on a GPU, here recorded; another source needs another graph."""
    model, prompts = make(torch.float32), torch.tensor([[1, 9, 8, SEP], [1, 7, SEP, 5]])
    caches = [StaticKVCache(model.config, 2, 12) for _ in range(2)]
    for cache in caches:
        model(prompts, cache=cache)
    tokens = torch.randint(V, (5, 2))
    expected = [model(step[:, None], cache=caches[0]).logits[:, 0] for step in tokens]
    decode = DecodeStep(model, caches[1])
    with recorded_graphs(), pretended_gpu():
        for step, logits in zip(tokens, expected, strict=True):
            assert torch.equal(decode(step), logits)
        assert decode.graph is not None
        caches[1].select(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="cache must keep its memory, got another one"):
            decode(tokens[0])
    swapped = decode_one_token(model, tokens[0, [1, 0]], caches[0])[[1, 0]]
    torch.testing.assert_close(decode_one_token(model, tokens[0], caches[1]), swapped)


def greedy(model, source, count):
    target = []
    while len(target) < count and target[-1:] != [EOS]:
        target.append(int(reference_logits(model, source, target)[-1].argmax()))
    return target + [PAD] * (count - len(target))


def padded_prompts(sources=SOURCES[:3]):
    width = 1 + max(map(len, sources))
    ids = torch.tensor([[PAD] * (width - 1 - len(source)) + [*source, SEP] for source in sources])
    return ids, (ids != PAD).long()


def test_greedy():
    model = make()
    ids, mask = padded_prompts()
    found = model.generate(ids, max_new_tokens=8, attention_mask=mask)[:, ids.shape[1] :]
    assert found.tolist() == [greedy(model, source, 8)[: found.shape[1]] for source in SOURCES[:3]]
    samples = model.generate(ids, max_new_tokens=8, do_sample=True, top_k=1, num_return_sequences=3)[:, ids.shape[1] :]
    assert torch.equal(samples, found.repeat_interleave(3, 0))


def simple_beams(model, source, beams, steps):
    """The best of `beams` hypotheses of exactly so many tokens, as lists."""
    kept = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for total, target in kept:
            scores = reference_logits(model, source, target)[-1].log_softmax(-1).tolist()
            grown += [(total + one, [*target, token]) for token, one in enumerate(scores)]
        kept = sorted(grown, reverse=True)[:beams]
    return [target for _, target in kept]


@torch.no_grad()
def test_beams_of_a_simple_search():
    model = make()
    model.model.embed_tokens.weight.mul_(0.2)  # so that the best first token is not always the best beginning
    ids, mask = padded_prompts()
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=3, eos_token_id=[], attention_mask=mask)
    found = model.generate(ids, **options)[:, ids.shape[1] :]
    expected = [simple_beams(model, source, 3, 6) for source in SOURCES[:3]]
    assert found.tolist() == sum(expected, [])
    assert found.tolist()[::3] != [greedy(model, source, 6) for source in SOURCES[:3]]


@torch.no_grad()
def test_as_many_beams_as_sequences():
    """The best of all sequences that end, or are as long as they may be, by log-probability per token."""
    sizes = dict(vocab_size=7, separator_token_id=6, eos_token_id=2, pad_token_id=0)
    model = make(**sizes)
    prompt = torch.tensor([[1, 4, 5, 6]])
    every = [[*head, *last] for n in range(3) for head in itertools.product([0, 1, 3, 4, 5, 6], repeat=n)
             for last in ([[2]] if n < 2 else [[token] for token in range(7)])]  # fmt: skip
    scores = {}
    for target in every:
        row = torch.tensor([[*prompt[0].tolist(), *target]])
        scores[tuple(target)] = float(score(model, row, [4]).sums[0]) / len(target)
    options = dict(max_new_tokens=3, num_beams=60, early_stopping="never", return_dict_in_generate=True)
    found = model.generate(prompt, **options)
    best = max(scores, key=scores.get)
    assert tuple(found.sequences[0, 4:].tolist()[: len(best)]) == best
    assert float(found.sequences_scores[0]) == pytest.approx(scores[best], rel=1e-5)


def test_a_source_is_encoded_once():
    model, calls = make(torch.float32), []
    model.model.encoder.register_forward_hook(lambda *arguments: calls.append(1))
    ids, mask = padded_prompts()
    model.generate(ids, max_new_tokens=5, num_beams=4, eos_token_id=[], attention_mask=mask)
    assert len(calls) == 1


def test_score():
    model = make(torch.float32)
    row = torch.tensor([[*SOURCES[0], SEP, *TARGETS[0]]])
    found = score(model, row, [6]).token_logprobs[0, 6:]
    exact = make()
    exact.load_state_dict(model.double().state_dict())
    logits = reference_logits(exact, SOURCES[0], TARGETS[0])[:-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(TARGETS[0])[:, None])[:, 0].detach()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    source = [*SOURCES[0], SEP]
    [[one, other]] = score_continuations(model, [[(source, TARGETS[0]), (source, [7])]])
    assert one.logprob == pytest.approx(float(expected.sum()), rel=1e-4)
    assert other.logprob == pytest.approx(float(score(model, torch.tensor([[*source, 7]]), [6]).sums[0]), rel=1e-4)


def test_files(tmp_path):
    model = make(torch.bfloat16, eos_token_id=[EOS, 5], num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    for read in (from_pretrained, CausalLM.from_pretrained, EncoderDecoder.from_pretrained):
        again = read(tmp_path)
        assert type(again) is EncoderDecoder and again.config == model.config
        assert all(map(torch.equal, model.parameters(), again.parameters()))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "arfast_encoder_decoder" and raw["decoder_layers"] == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"separator_token_id": None}, "config.json: separator_token_id must be present"),
        ({"encoder_layers": 4000}, r"encoder_layers \+ decoder_layers must fit the 63 stored tensors, got 4003"),
        ({"encoder_layers": 3}, "must be those of ArfastEncoderDecoder, got missing: model.encoder.layers.2"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of 6|num_key_value_heads must divide 3 heads"),
    ],
)
def test_foreign_files(tmp_path, changes, message):
    make().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=0), "vocab_size must be an integer in"),
        (dict(encoder_layers=True), "encoder_layers must be an integer in"),
        (dict(num_key_value_heads=3), "num_key_value_heads must divide 4 heads, got 3"),
        (dict(hidden_size=36), "hidden_size must be a multiple of 8, got 36"),
        (dict(separator_token_id=V), r"separator_token_id must be in \[0, vocab_size=41\), got 41"),
        (dict(separator_token_id=None), "separator_token_id must be in"),
        (dict(eos_token_id=-1), "eos_token_id must be None or in"),
        (dict(rope_theta=0.0), r"rope_theta must be a number in \(0.0, inf\), got 0.0"),
        (dict(initializer_range=float("nan")), "initializer_range must be a number in"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=f"EncoderDecoderConfig: {message}"):
        EncoderDecoderConfig(**SIZES | changes)


def test_errors():
    model = make()
    ids, offsets = packed()
    with pytest.raises(ValueError, match="EncoderDecoder: labels must be -100 in a document without the separator, to"):
        model(ids, labels=ids, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="EncoderDecoder: position_ids must be None, got a tensor"):
        model(ids, position_ids=ids)
    with pytest.raises(ValueError, match="EncoderDecoder: input_ids must hold the separator, token 3, in every prompt"):
        model.generate(torch.tensor([[1, SEP], [1, 5]]))
    for beams in (1, 4):
        with pytest.raises(ValueError, match="must hold the separator, token 3, in every prompt"):
            model.generate(torch.tensor([[1, 5, 6]]), num_beams=beams)
    with pytest.raises(ValueError, match="model must be decoder-only with drafts, got EncoderDecoder"):
        model.generate(torch.tensor([[1, SEP]]), prompt_lookup_num_tokens=2)


def test_examples():
    found = doctest.testmod(encoder_decoder)
    assert found.attempted > 0 and found.failed == 0


def test_flops():
    """A token of a source, or of a target, takes about half of the weights, and the head."""
    config = EncoderDecoderConfig(**SIZES | dict(encoder_layers=2, decoder_layers=2, vocab_size=4))
    weights = EncoderDecoder(config, device="meta").num_parameters()
    assert 0.4 * 6 * weights < config.flops_per_token(1) < 0.6 * 6 * weights
