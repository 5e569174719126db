"""What training relies on, done with a model: the user's, with the user's data, or a small random one."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arfast.adapter import load_model
from arfast.data import Document, PackedDataset, prepare_dataset
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer

from .finding import Check, Outcome

_SEQLEN = 64


@dataclass
class Subject:
    """The model, two documents packed into one row, int64 [1, T], and where the second begins."""

    model: CausalLM
    packed: Tensor
    boundary: int

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, self.boundary, self.packed.shape[1]], dtype=torch.int32, device=self.packed.device)

    def changed(self, where: slice) -> Tensor:
        """The packed tokens, other ones at some places."""
        other = self.packed.clone()
        other[0, where] = (other[0, where] + 1) % self.model.config.vocab_size
        return other


def model_checks(device: str, model: str | None = None, data: str | None = None) -> Iterator[Check]:
    subject: list[Subject] = []

    def load() -> Outcome:
        subject.append(_subject(device, model, data))
        names = (model or "a small random model", data or "random tokens")
        return True, f"{names[0]}, {subject[0].model.num_parameters():,} parameters, {names[1]}"

    yield "model", load
    checks = {
        "no leak from the future": _causal_leak,
        "no leak between packed documents": _document_leak,
        "accumulation does not change gradients": _accumulation,
        "cached decoding equals the full pass": _cache,
        "model comes back from the disk as it was": _round_trip,
    }
    for name, check in checks.items():
        yield name, lambda check=check: check(*subject)
    yield "training goes on from a checkpoint", partial(_resume, device)


def _subject(device: str, path: str | None, data: str | None) -> Subject:
    if path is None:
        sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2)
        vocab_size = 512 if data is None else PackedDataset(data, "train", seqlen=_SEQLEN).vocab_size
        model = CausalLM(CausalLMConfig.preset("tiny", vocab_size=vocab_size, **sizes), seed=1, device=device)
    else:
        model = load_model(path, dtype=torch.float32, device=device)
    model.eval()
    if data is None:
        return Subject(model, torch.randint(0, model.config.vocab_size, (1, 60), device=device), 23)
    seqlen = min(_SEQLEN, model.config.max_position_embeddings)
    dataset = PackedDataset(data, "train", seqlen=seqlen, packing="documents")
    first, second = (dataset.batch(position, 1).input_ids[0, : seqlen // 2] for position in range(2))
    return Subject(model, torch.cat((first, second))[None].to(device), len(first))


@torch.no_grad()
def _causal_leak(subject: Subject) -> Outcome:
    half, length = subject.boundary, subject.packed.shape[1]
    before, after = (subject.model(x).logits[0] for x in (subject.packed, subject.changed(slice(half, None))))
    changed = (before != after).any(-1)
    leaks, seen = int(changed[:half].sum()), int(changed[half:].sum())
    detail = f"{leaks} of {half} earlier positions changed with the later ones, {seen} of {length - half} later ones"
    return leaks == 0 and seen == length - half, detail


@torch.no_grad()
def _document_leak(subject: Subject) -> Outcome:
    """Without the boundaries the same change must be seen, else this would be no probe."""
    half, length = subject.boundary, subject.packed.shape[1]

    def count(**options: Tensor) -> int:
        inputs = (subject.packed, subject.changed(slice(0, half)))
        before, after = (subject.model(x, **options).logits.reshape(length, -1)[half:] for x in inputs)
        return int((before != after).any(-1).sum())

    leaks, seen = count(cu_seqlens=subject.offsets), count()
    detail = f"{leaks} of {length - half} positions changed with the document before, {seen} without the boundary"
    return leaks == 0 and seen > 0, detail


def _accumulation(subject: Subject) -> Outcome:
    """One batch of unequal numbers of targets against its parts: a mean of means would differ by tens of per cent."""
    model, ids = subject.model, subject.packed[:, : subject.packed.shape[1] // 4 * 4].view(4, -1)
    labels = ids.clone()
    labels[0, 5:] = -100
    items = int((labels[:, 1:] != -100).sum())

    def gradients(sizes: list[int]) -> Tensor:
        model.zero_grad()
        for rows in torch.arange(4).split(sizes):
            model(ids[rows], labels=labels[rows], num_items=items).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return gradient

    whole = gradients([4])
    worst = max(((whole - gradients(sizes)).norm() / whole.norm()).item() for sizes in ([1, 3], [2, 2], [1, 1, 1, 1]))
    return worst < 1e-5, f"1 x 4 and 4 x 1 sequences: relative difference {worst:.1e}"


@torch.no_grad()
def _cache(subject: Subject) -> Outcome:
    model, start = subject.model, subject.packed[:, :9]
    cached, full = model.generate(start, max_new_tokens=12), start
    for _ in range(12):
        full = torch.cat([full, model(full).logits[:, -1:].argmax(-1)], 1)
    return torch.equal(cached, full), f"{int((cached != full).sum())} of 12 greedy tokens differ"


@torch.no_grad()
def _round_trip(subject: Subject) -> Outcome:
    model = subject.model
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = CausalLM.from_pretrained(directory, device=subject.packed.device)
    different = sum(not torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    same = torch.equal(model(subject.packed).logits, again(subject.packed).logits)
    detail = f"{different} parameters differ, logits {'bit-identical' if same else 'differ'}"
    return same and different == 0 and again.config == model.config, detail


def _resume(device: str) -> Outcome:
    """Weights after a step that follows a save, and after the same step of a trainer that loaded it."""
    documents = [Document(f"document {i} of a small corpus, " * 9, source="") for i in range(40)]
    with tempfile.TemporaryDirectory() as directory:
        prepare_dataset(documents, f"{directory}/data", vocab_size=300)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=_SEQLEN)
        config = CausalLMConfig.preset("tiny", vocab_size=300, **sizes)
        settings = TrainConfig(output_dir=f"{directory}/run", max_steps=4, seqlen=32, batch_size=2, progress=False)
        trainers = [Trainer(CausalLM(config, seed=s, device=device), settings, f"{directory}/data") for s in (0, 1)]
        batches = [trainers[0].datasets["train"].batch(position, 2) for position in (0, 2)]
        trainers[0].step(batches[:1])
        trainers[1].load(trainers[0].save())
        for trainer in trainers:
            trainer.step(batches[1:])
    parameters = zip(*(trainer.model.parameters() for trainer in trainers), strict=True)
    different = sum(not torch.equal(a, b) for a, b in parameters)
    return different == 0, f"{different} parameters differ after the next step"
