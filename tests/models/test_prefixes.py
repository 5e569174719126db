"""The predictions of all prefixes from one forward pass are those of each prefix by itself, for every model and
tokenizer."""

import pytest
import torch
from tiny_models import TINY, TINY_EXPERTS

from arfast.data import Tokenizer, builtin
from arfast.models import CausalLM, LinearLM

MODELS = {
    "transformer": lambda V, dtype: CausalLM(TINY.replace(vocab_size=V), seed=1, dtype=dtype),
    "window": lambda V, dtype: CausalLM(TINY.replace(vocab_size=V, sliding_window=7), seed=1, dtype=dtype),
    "experts": lambda V, dtype: CausalLM(TINY_EXPERTS.replace(vocab_size=V), seed=1, dtype=dtype),
    "linear": lambda V, dtype: LinearLM(V, 32, seed=1, initializer_range=0.3, dtype=dtype),
    "linear window": lambda V, dtype: LinearLM(V, 32, 5, seed=1, initializer_range=0.3, dtype=dtype),
    "linear ngram": lambda V, dtype: LinearLM(V, 32, 4, ngram=True, seed=1, initializer_range=0.3, dtype=dtype),
}


@pytest.fixture(scope="module", params=["bpe", "word", "character"])
def tokenizer(request):
    return Tokenizer.train([document.text[:2000] for document in builtin("python")[:40]], 300, request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_pass_predicts_for_every_prefix(name, tokenizer, dtype):
    model = MODELS[name](tokenizer.vocab_size, dtype)
    ids = torch.tensor([tokenizer.encode('def f(x):\n    """A test."""\n    return x + 1\n')])
    together = model(ids).logits[0]
    for length in range(1, ids.shape[1] + 1):
        alone = model(ids[:, :length], logits_to_keep=1).logits[0, -1]
        difference = (together[length - 1] - alone).abs().max() / together.abs().max()
        assert difference < 100 * torch.finfo(dtype).eps
    logprobs = model.score(ids).token_logprobs[0, 1:] if dtype == torch.float32 else None
    if logprobs is not None:
        chosen = together[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(logprobs, chosen)
