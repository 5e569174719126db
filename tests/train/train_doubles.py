"""Small stand-ins with the call of CausalLM, PackedDataset and Tokenizer, so that the trainer is tested by itself."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from arfast.train import TrainConfig, Trainer, save_checkpoint
from arfast.train.checkpoint import list_checkpoints

IGNORE = -100


@dataclass
class TinyConfig:
    vocab_size: int = 61
    hidden_size: int = 24
    max_position_embeddings: int = 64
    dropout: float = 0.0
    aux_coefficient: float = 0.0


class TinyLM(nn.Module):
    """Predicts a token from the two before it; with dropout its steps depend on the random state."""

    def __init__(self, config: TinyConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.poison = None  # predicate on input_ids: the loss of that batch is NaN
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def forward(self, input_ids, labels=None, cu_seqlens=None, *, label_smoothing=0.0, z_loss=0.0, num_items=None,
                reduction="mean"):  # fmt: skip
        hidden = self.embed(input_ids)
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        hidden = self.norm(torch.tanh(self.mix(torch.cat([hidden, before], -1))))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        logits = F.linear(hidden, self.embed.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None, aux_loss=None, num_tokens=None)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        logits = logits.flatten(0, 1)
        total = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, ignore_index=IGNORE, reduction="sum")
        if z_loss:
            total = total + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
        count = (targets != IGNORE).sum()
        loss = total if reduction == "sum" else total / (count if num_items is None else num_items)
        if self.poison is not None and self.poison(input_ids):
            loss = loss * float("nan")
        aux_loss = self.config.aux_coefficient * hidden.square().mean() if self.config.aux_coefficient else None
        return SimpleNamespace(logits=None, loss=loss, aux_loss=aux_loss, num_tokens=count)

    def save_pretrained(self, path):
        save_file(self.state_dict(), Path(path) / "model.safetensors")
        (Path(path) / "config.json").write_text(json.dumps(asdict(self.config)))

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        model = cls(TinyConfig(**json.loads((Path(path) / "config.json").read_text())))
        model.load_state_dict(load_file(Path(path) / "model.safetensors"))
        return model.to(device=device, dtype=dtype)


class TinyData:
    """Rows of noisy arithmetic sequences, a pure function of (seed, position); `served` lists what was asked for."""

    packing = "contiguous"
    tokenizer_fingerprint = "f" * 64

    def __init__(self, seed=0, seqlen=16, vocab_size=61, num_samples=40):
        self.seed, self.seqlen, self.vocab_size, self.num_samples = seed, seqlen, vocab_size, num_samples
        self.num_documents, self.num_tokens = num_samples, num_samples * seqlen
        self.num_targets = self.num_tokens - self.num_documents
        self.num_bytes = 3 * self.num_tokens
        self.fingerprint = f"{seed}-{seqlen}-{num_samples}"
        self.served = []

    @cache  # noqa: B019 (lives as long as a test)
    def row(self, index):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        start, step = torch.randint(self.vocab_size, (2,), generator=generator)
        row = (start + step * torch.arange(self.seqlen)) % self.vocab_size
        noise = torch.randint(self.vocab_size, (self.seqlen,), generator=generator)
        row = torch.where(torch.rand(self.seqlen, generator=generator) < 0.1, noise, row)
        ignored = int(torch.randint(self.seqlen // 2, (), generator=generator))  # rows differ in how many targets
        labels = row.clone()
        labels[self.seqlen - ignored :] = IGNORE
        labels[0] = IGNORE
        return row, labels

    def batch(self, position, batch_size, *, seqlen=None):
        """`served` has the row of each sample, and with a shorter seqlen its piece."""
        pieces = 1 if seqlen is None else self.seqlen // seqlen
        places = [divmod(p, pieces) for p in range(position, position + batch_size)]
        self.served += [row for row, _ in places] if pieces == 1 else places
        cut = [
            (row, slice(piece * self.seqlen // pieces, (piece + 1) * self.seqlen // pieces)) for row, piece in places
        ]
        rows = [[column[part].clone() for column in self.row(row % self.num_samples)] for row, part in cut]
        for _, labels in rows:
            labels[0] = IGNORE
        return self.make(rows)

    def evaluation_batches(self, batch_size, *, seqlen=None):
        for first in range(0, self.num_samples, batch_size):
            rows = [self.row(10_000 + i) for i in range(first, min(first + batch_size, self.num_samples))]
            pieces = [[column.split(seqlen or self.seqlen) for column in row] for row in rows]
            yield self.make([piece for row in pieces for piece in zip(*row)])

    @staticmethod
    def make(rows):
        ids, labels = (torch.stack(column) for column in zip(*rows))
        return SimpleNamespace(input_ids=ids, labels=labels, cu_seqlens=None, num_tokens=int((labels != IGNORE).sum()))


class TinyTokenizer:
    fingerprint = "f" * 64
    eos_token_id = pad_token_id = None
    vocab_size = 61

    def encode(self, text):
        return [ord(c) % 61 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)

    def save(self, path):
        (Path(path) / "tokenizer.json").write_text('{"tiny": true}')


def greedy_generate(model, input_ids, *, max_new_tokens, **options):
    for _ in range(max_new_tokens):
        input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)
    return input_ids


# keep_freed_memory would hold for the whole test process, in which others measure memory.
SIZE = {"seqlen": 16, "batch_size": 4, "max_steps": 4, "progress": False, "keep_freed_memory": False}


def make_trainer(path, *, model=None, train=None, validation=None, tokenizer=None, generate=greedy_generate, **config):
    config = TrainConfig(**SIZE | {"output_dir": path} | config)
    datasets = {
        "train": train or TinyData(config.seed, config.seqlen),
        "validation": validation or TinyData(config.seed, config.seqlen, num_samples=6),
    }
    return Trainer(model or TinyLM(TinyConfig()), config, datasets, tokenizer or TinyTokenizer(), generate=generate)


def inject(trainer, kind, at):
    """A fault in the step of this number: once, but for a corrupted batch, which is so whenever it is read."""
    if kind == "batch":
        data, read = trainer.datasets["train"], trainer.datasets["train"].batch

        def corrupted(position, size, **options):
            batch = read(position, size, **options)
            if position == size * (at - 1):
                batch.input_ids = torch.randint(61, batch.input_ids.shape, generator=torch.Generator().manual_seed(at))
                batch.labels = torch.where(batch.labels == IGNORE, IGNORE, batch.input_ids)
            return batch

        data.batch = corrupted
        return
    step, engine, pending = trainer.step, trainer.engine, [at]

    def faulty(batches):
        if trainer.state.step + 1 not in pending:
            return step(batches)
        pending.clear()
        if kind == "weight":
            engine.model.embed.weight.data.view(torch.int32)[5, 3] ^= 1 << 30
            engine.weights_changed()
            return step(batches)
        rate = engine.learning_rate
        engine.learning_rate = lambda tokens: 60 * rate(tokens)
        result = step(batches)
        del engine.learning_rate
        return result

    trainer.step = faulty


def write_files(step, size=3000):
    """A writer for `save_checkpoint` of files whose content depends on the step."""

    def write(directory):
        generator = torch.Generator().manual_seed(step)
        tensor = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
        save_file({"weight": tensor}, directory / "model.safetensors")
        (directory / "state.json").write_text(json.dumps({"step": step}))

    return write


def save(root, step, **options):
    return save_checkpoint(root, step, write_files(step), **options)


def content(directory):
    """File names and bytes."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


MEASURED = {"tokens_per_second", "data_wait", "memory_bytes", "seconds_left", "mfu"}


def outcome(output_dir):
    """Everything that a run leaves, but for times and memory."""

    def rows(name):
        parsed = [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in parsed]

    last = list_checkpoints(output_dir)[-1]
    files = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "tokenizer.json", "config.json")
    published = ("model.safetensors", "tokenizer.json", "config.json")
    return {
        "last": last.name,
        "state": json.loads((last / "trainer_state.json").read_text())["state"],
        "metrics": rows("metrics.jsonl"),
        "samples": rows("samples.jsonl"),
        **{name: (last / name).read_bytes() for name in files},
        **{f"published {name}": (output_dir / name).read_bytes() for name in published},
    }


def assert_same_outcome(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name] == expected[name], name
