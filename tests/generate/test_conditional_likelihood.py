"""log p(y | x): what training with a loss on y alone minimises is what scoring says of y."""

import pytest
import torch

from arfast.data import Document, PackedDataset, Tokenizer, prepare_dataset
from arfast.generate import score_continuations
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig
from arfast.train.engine import Engine

X, Y = "def area(width, height):\n    return ", "width * height\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([X + Y] * 2, 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = dict(vocab_size=tokenizer.vocab_size, num_hidden_layers=2, initializer_range=0.2)
    return CausalLM(CausalLMConfig.preset("tiny", **sizes), seed=3)


def test_loss_on_y_alone_is_its_score(tokenizer, model):
    x, y = tokenizer.encode(X), tokenizer.encode(Y, add_special_tokens=False)
    ids = torch.tensor([x + y])
    labels = torch.tensor([[-100] * len(x) + y])
    [[scored]] = score_continuations(model, [[(x, y)]])
    assert scored.num_tokens == len(y)
    assert model(ids, labels=labels).loss.item() == pytest.approx(-scored.logprob / len(y), rel=1e-5)
    assert model(ids, labels=ids).loss.item() != pytest.approx(-scored.logprob / len(y), rel=1e-2)


@pytest.mark.parametrize("packing", ["documents", "padded", "contiguous"])
def test_from_documents_to_the_loss_of_a_step(tokenizer, model, packing, tmp_path):
    """Of documents with targets, the trainer's loss is the mean score of the tokens of y and the end token after it."""
    pairs = [(f"{X}{'(' * i}", Y * (1 + i % 3)) for i in range(20)]
    documents = [Document(x + y, "", ((len(x), len(x + y)),)) for x, y in pairs]
    prepare_dataset(documents, tmp_path / "data", tokenizer, validation_fraction=0.0, test_fraction=0.0)
    dataset = PackedDataset(tmp_path / "data", "train", seqlen=128, packing=packing)
    batches = list(dataset.evaluation_batches(4))
    config = TrainConfig(max_steps=1, seqlen=128, learning_rate=1e-9)
    result = Engine(model, config).step(batches)
    groups = [
        [(tokenizer.encode(x), [*tokenizer.encode(y, add_special_tokens=False), tokenizer.eos_token_id])]
        for x, y in pairs
    ]
    scored = [one for [one] in score_continuations(model, groups)]
    expected = -sum(one.logprob for one in scored) / sum(one.num_tokens for one in scored)
    assert sum(batch.num_tokens for batch in batches) == sum(one.num_tokens for one in scored)
    if packing == "contiguous":  # there a document sees those before it
        assert result.loss != pytest.approx(expected, rel=1e-6)
    else:
        assert result.loss == pytest.approx(expected, rel=1e-5)
