"""The trainer with the real model, data and decoder: resume, experts, packings, and what transformers makes of it."""

import json
import random
import signal

import pytest
import torch
from train_doubles import assert_same_outcome, outcome

from arfast.data import Document, Tokenizer, prepare_dataset
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer

DENSE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EXPERTS = DENSE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}
CONFIG = {
    "max_steps": 6,
    "seqlen": 32,
    "batch_size": 6,
    "micro_batch_size": 4,
    "save_every": 2,
    "eval_every": 3,
    "eval_tokens": 300,
    "learning_rate": 1e-2,
    "sample_prompts": ["the "],
    "sample_tokens": 8,
    "keep_freed_memory": False,  # would hold for the whole test process
}


def documents(texts):
    return [Document(text, f"text {i}") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences of a small grammar, as a prepared data set."""
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "tree"], ["sees", "hears", "likes", "follows"]

    def sentence():
        return f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.randrange(1000)} times. "

    texts = ["".join(sentence() for _ in range(rng.randint(1, 12))) for _ in range(150)]
    path = tmp_path_factory.mktemp("data") / "sentences"
    prepare_dataset(documents(texts), path, vocab_size=DENSE["vocab_size"], validation_fraction=0.2)
    return path


def fit(path, data, model=DENSE, **config):
    model = CausalLM(CausalLMConfig(**model))
    trainer = Trainer(model, TrainConfig(output_dir=path, progress=False, **CONFIG | config), data)
    return trainer, trainer.fit()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_kill_and_resume(worker, memory_path, data, dtype, model):
    job = {"model": model, "data": str(data), "config": CONFIG | {"dtype": dtype}}
    assert worker(memory_path / "undisturbed", **job)[0] == 0
    expected = outcome(memory_path / "undisturbed")
    for step in (2, 4, 6):
        path = memory_path / f"run-{step}"
        assert worker(path, kill_in={"step": step}, **job)[0] == -signal.SIGKILL
        status, _, log = worker(path, **job)
        assert status == 0, log
        assert_same_outcome(outcome(path), expected)


def test_new_interpreters_give_the_same_bits(worker, new_interpreter, memory_path, data):
    """As the forks of the worker do, which the other tests rest on; with two threads."""
    job = {"model": DENSE, "data": str(data), "config": CONFIG | {"dtype": "bfloat16", "max_steps": 4}, "threads": 2}
    assert worker(memory_path / "forked", **job)[0] == 0
    assert new_interpreter(memory_path / "run", kill_in={"step": 4}, **job) == -signal.SIGKILL
    assert new_interpreter(memory_path / "run", **job) == 0
    assert_same_outcome(outcome(memory_path / "run"), outcome(memory_path / "forked"))


@pytest.mark.parametrize("packing", ["contiguous", "documents", "padded"])
def test_packings(tmp_path, data, packing):
    _, result = fit(tmp_path, data, packing=packing, max_steps=12, batch_size=8, label_smoothing=0.05, z_loss=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert result.evaluation.bits_per_byte > 0


def test_evaluation_scores_every_byte(tmp_path, data):
    """Bits per byte from the definition: all losses, all bytes of the validation split."""
    trainer, result = fit(tmp_path, data)
    dataset = trainer.datasets["validation"]
    total = 0.0
    with torch.no_grad():
        for batch in dataset.evaluation_batches(1):
            logits = trainer.model(batch.input_ids).logits[0, :-1].double()
            targets = batch.labels[0, 1:]
            kept = targets != -100
            total -= logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None]).sum().item()
    bits = total / torch.tensor(2.0).log().item() / dataset.num_bytes
    assert result.evaluation.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert result.evaluation.num_tokens == dataset.num_tokens - dataset.num_documents


def test_transformers_loads_the_run(tmp_path, data):
    transformers = pytest.importorskip("transformers")
    trainer, result = fit(tmp_path, data, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("the cat sees the dog 7 times.")["input_ids"]])
    assert ids[0].tolist() == Tokenizer.load(tmp_path).encode("the cat sees the dog 7 times.")
    with torch.no_grad():
        difference = model(ids).logits - trainer.model(ids).logits
    assert difference.abs().max() < 1e-4
    assert all(isinstance(sample["text"], str) for sample in result.samples)
    assert CausalLM.from_pretrained(tmp_path).num_parameters() == trainer.model.num_parameters()


def test_empty_validation_split_is_left_out(tmp_path):
    texts = ["to be or not to be " * (5 + i) for i in range(30)]
    prepare_dataset(documents(texts), tmp_path / "data", vocab_size=300, validation_fraction=0.0, test_fraction=0.0)
    _, result = fit(tmp_path / "run", tmp_path / "data", batch_size=2, micro_batch_size=2, max_steps=2)
    assert result.evaluation is None


def test_corpus_smaller_than_a_batch(tmp_path):
    texts = [f"a few words {i}" for i in range(10)]
    prepare_dataset(documents(texts), tmp_path / "data", vocab_size=300, validation_fraction=0.0, test_fraction=0.0)
    with pytest.raises(ValueError, match=r"Trainer: batch_size must be at most the \d+ sequences of the train"):
        fit(tmp_path / "run", tmp_path / "data", batch_size=64)
    assert not (tmp_path / "run").exists()


def test_model_smaller_than_the_vocabulary(tmp_path, data):
    with pytest.raises(ValueError, match=r"Trainer: model must have a vocab_size of at least \d+ for the train split"):
        fit(tmp_path, data, model=DENSE | {"vocab_size": 100})
