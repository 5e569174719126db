"""Training runs of small models, in one process or as one of several ranks, and what they are compared by."""

import hashlib
import json
import os
import random
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from arfast.data import Document, prepare_dataset
from arfast.distributed import Parallel, ParallelConfig
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer, log

DENSE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
# Three experts on four ranks: the rows of each are spread, and a rank may have no part of a router.
EXPERTS = DENSE | {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}
CONFIG = {
    "max_steps": 50,
    "seqlen": 32,
    "batch_size": 8,
    "micro_batch_size": 2,
    "save_every": 0,
    "learning_rate": 3e-3,
    "progress": False,
    "keep_freed_memory": False,
}


def prepare_sentences(path):
    """Sentences of a small grammar as a data set, with a tokenizer of DENSE's vocabulary."""
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "tree"], ["sees", "hears", "likes", "follows"]

    def sentence():
        return f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.randrange(1000)} times. "

    texts = ["".join(sentence() for _ in range(rng.randint(1, 12))) for _ in range(150)]
    documents = [Document(text, f"text {i}") for i, text in enumerate(texts)]
    prepare_dataset(documents, path, vocab_size=DENSE["vocab_size"], validation_fraction=0.2)
    return str(path)


def make_trainer(data, model=DENSE, parallel=None, **config):
    """A trainer for this process, or for this rank of the default process group, arranged as ParallelConfig says."""
    config = TrainConfig(**CONFIG | config)
    if not dist.is_initialized():
        return Trainer(CausalLM(CausalLMConfig(**model)), config, data)
    log.plot_loss = lambda rows, path: True  # the import alone takes longer than the run
    parallel = dict(parallel or {})
    options = dict(dtype=config.dtype, sequence_parallel=parallel.pop("sequence_parallel", False))
    strategy = Parallel(ParallelConfig.for_ranks(dist.get_world_size(), **parallel), **options)
    return Trainer(strategy.build_model(CausalLMConfig(**model)), config, data, strategy=strategy)


def train(data, output_dir, model=DENSE, stop_after=None, parallel=None, **config):
    """Fit; what it consumed and logged. stop_after: (step, rank) at which that rank gets SIGTERM."""
    trainer = make_trainer(data, model, parallel, output_dir=output_dir, **config)
    consumed, losses = record(trainer)
    status = 0
    if stop_after is not None:
        step_of_run, (step, rank) = trainer.engine.step, stop_after

        def step_and_stop(batches):
            result = step_of_run(batches)
            if trainer.state.step == step and trainer.strategy.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        trainer.engine.step = step_and_stop
    try:
        trainer.fit()
    except SystemExit as stopped:
        status = stopped.code
    return {
        "status": status,
        "step": trainer.state.step,
        "position": trainer.state.position,
        "consumed": consumed,
        "losses": losses,
        "local": checksum(trainer.model),
        "rng": hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest(),
    }


def record(trainer):
    """Lists that fill with the samples of each step, hashed, and with (loss, auxiliary loss, gradient norm)."""
    consumed, losses = {}, {}
    batch_of, step_of = trainer.datasets["train"].batch, trainer.engine.step

    def batch(position, batch_size, **options):
        result = batch_of(position, batch_size, **options)
        rows = result.input_ids.reshape(batch_size, -1).tolist()
        hashes = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12] for row in rows]
        consumed.setdefault(trainer.state.step + 1, []).extend(hashes)
        return result

    def step(batches):
        result = step_of(batches)
        losses[trainer.state.step] = (result.loss, result.aux_loss or 0.0, result.grad_norm)
        return result

    trainer.datasets["train"].batch, trainer.engine.step = batch, step
    return consumed, losses


def checksum(model):
    """Of this rank's part of every parameter, in bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        digest.update(local.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def consumed_by_all(ranks):
    """Samples of each step, of all ranks in order."""
    return {step: sum((rank["consumed"][step] for rank in ranks), []) for step in ranks[0]["consumed"]}


def largest_difference(actual, expected):
    """Largest relative difference of losses and gradient norms, over the steps of ``actual``."""
    assert actual.keys() <= expected.keys()
    pairs = [(a, b) for step in actual for a, b in zip(actual[step], expected[step])]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def assert_continued(ranks, consumed, undisturbed, expected, steps, same):
    """What ranks that continued a run did, and consumed by step, against ranks that nobody disturbed: in these steps
    the same samples, the same losses up to the order of additions, and in the same arrangement the same bits."""
    assert list(consumed) == list(steps)
    assert all(consumed[step] == expected[step] for step in consumed)
    difference = largest_difference(ranks[0]["losses"], undisturbed[0]["losses"])
    print(f"{len(undisturbed)} ranks continued on {len(ranks)}: largest relative difference {difference:.1e}")
    if same:
        assert [(r["local"], r["rng"]) for r in ranks] == [(r["local"], r["rng"]) for r in undisturbed]
        assert difference == 0
    assert difference < 1e-5


def metrics(output_dir):
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    measured = {"tokens_per_second", "data_wait", "memory_bytes", "seconds_left", "mfu"}
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]
