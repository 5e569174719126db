"""corpus_perplexity against the sliding window of transformers' documentation, on a text that every machine has."""

import math
import textwrap

import pytest
import torch

from arfast.data import Tokenizer
from arfast.generate import corpus_perplexity
from arfast.models import CausalLM, CausalLMConfig

TEXT = textwrap.__doc__ + open(textwrap.__file__, encoding="utf-8").read()[:6000]
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def token_ids():
    return Tokenizer.train([TEXT], VOCAB_SIZE).encode(TEXT)


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=VOCAB_SIZE, num_hidden_layers=2, initializer_range=0.2)
    return CausalLM(CausalLMConfig.preset("tiny", **sizes), seed=3)


def sliding_window(model, tokens, seqlen, stride):
    """(sum of nats, scored tokens) window by window: the loss of a window is a mean over what its labels keep."""
    tokens = torch.tensor([tokens])
    nats, count, reached = 0.0, 0, 0
    for begin in range(0, tokens.shape[1], stride):
        window = tokens[:, begin : begin + seqlen]
        end = begin + window.shape[1]
        labels = window.clone()
        labels[:, : reached - begin if reached > begin else 0] = -100
        kept = int((labels[:, 1:] != -100).sum())  # the first label has nothing before it
        if kept > 0:
            with torch.no_grad():
                nats += float(model(window, labels=labels).loss) * kept
        count, reached = count + kept, end
        if end == tokens.shape[1]:
            break
    return nats, count


@pytest.mark.parametrize("seqlen,stride", [(128, 128), (128, 64), (128, 100), (50, 7), (33, 1), (2, 1), (2, 2)])
def test_equals_transformers(seqlen, stride, token_ids, tiny_pair):
    theirs, ours = tiny_pair(VOCAB_SIZE, 0)
    tokens = token_ids[: 12 * stride + seqlen + 5]
    nats, count = sliding_window(theirs, tokens, seqlen, stride)
    result = corpus_perplexity(ours.model, tokens, seqlen=seqlen, stride=stride)
    assert result.num_tokens == count
    assert result.loss == pytest.approx(nats / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("length", [2, 31, 32, 33, 40, 41, 257])
def test_every_token_but_the_first_is_scored_once(length, token_ids, model):
    """Whatever is left over at the end; with windows side by side not the first of each."""
    tokens = token_ids[:length]
    assert corpus_perplexity(model, tokens, seqlen=32, stride=8).num_tokens == length - 1
    assert corpus_perplexity(model, tokens, seqlen=32).num_tokens == length - math.ceil(length / 32)


def test_one_window_is_score(token_ids, model):
    tokens = torch.tensor(token_ids[:100])
    scores = model.score(tokens[None])
    result = corpus_perplexity(model, tokens, num_bytes=321)
    assert result.loss == pytest.approx(-float(scores.sums) / 99, rel=1e-12)
    assert result.perplexity == pytest.approx(float(scores.perplexity), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(-float(scores.sums) / math.log(2) / 321, rel=1e-12)
    assert corpus_perplexity(model, tokens).bits_per_byte is None


def test_batches_change_rounding_alone(token_ids, model):
    tokens = token_ids[:700]
    results = [corpus_perplexity(model, tokens, seqlen=64, stride=16, batch_size=n) for n in (1, 3, 8, 1000)]
    assert len({result.num_tokens for result in results}) == 1
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_more_context_is_what_a_smaller_stride_gives(token_ids, model):
    """Each token is conditioned on the window alone: with stride 1, on exactly seqlen - 1 tokens once it is full."""
    tokens = token_ids[:40]
    scores = [
        float(model.score(torch.tensor([tokens[max(0, t - 15) : t + 1]])).token_logprobs[0, -1]) for t in range(40)
    ]
    assert corpus_perplexity(model, tokens, seqlen=16, stride=1).loss == pytest.approx(-sum(scores) / 39, rel=1e-6)


def test_progress_is_on_stderr(token_ids, model, capsys):
    corpus_perplexity(model, token_ids[:100], seqlen=32, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "batch" in captured.err


def test_nan_is_an_error(token_ids):
    model = CausalLM(CausalLMConfig.preset("tiny", vocab_size=VOCAB_SIZE, num_hidden_layers=1))
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="score: logits must not be NaN, got NaN in sequences"):
        corpus_perplexity(model, token_ids[:100], seqlen=32)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(token_ids=[]), "token_ids must hold at least two tokens, got 0"),
        (dict(token_ids=[5]), "token_ids must hold at least two tokens, got 1"),
        (dict(token_ids=[[1, 2], [3, 4]]), r"token_ids must be integers \[N\], got torch.int64 \[2, 2\]"),
        (dict(token_ids=[1.0, 2.0]), r"token_ids must be integers \[N\], got torch.float32 \[2\]"),
        (dict(seqlen=1), r"seqlen must be in \[2, max_position_embeddings=1024\], got 1"),
        (dict(seqlen=1025), r"seqlen must be in \[2, max_position_embeddings=1024\], got 1025"),
        (dict(seqlen=16.0), r"seqlen must be in \[2, max_position_embeddings=1024\], got 16.0"),
        (dict(seqlen=32, stride=0), r"stride must be an integer in \[1, 32\], got 0"),
        (dict(seqlen=32, stride=33), r"stride must be an integer in \[1, 32\], got 33"),
        (dict(batch_size=0), "batch_size must be an integer at least 1, got 0"),
        (dict(num_bytes=0), "num_bytes must be an integer at least 1, got 0"),
    ],
)
def test_errors(change, message, model):
    with pytest.raises(ValueError, match="corpus_perplexity: " + message):
        corpus_perplexity(model, **(dict(token_ids=[1, 2, 3]) | change))


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_tokens_that_the_model_does_not_know(token, model):
    with pytest.raises(ValueError, match=rf"score: input_ids must be in \[0, vocab_size=300\), got {token}"):
        corpus_perplexity(model, [1, 2, token])
