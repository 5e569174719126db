"""MixtureDataset: fractions exact at every place, every target once per epoch, one stream for any ranks and batches."""

import inspect
import json
import shutil
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arfast import CausalLM, CausalLMConfig, TrainConfig, Trainer
from arfast.data import Document, MixtureDataset, MixtureSource, PackedDataset, Tokenizer, prepare_dataset, read_mixture
from arfast.data.mixture import dataset_directories, open_mixture
from arfast.data.turns import MAX_PERIOD, rows_per_period, spread

PACKINGS = ["contiguous", "documents", "padded"]
FRACTIONS = [0.5, 0.25, 0.17, 0.08]  # Llama 3


@st.composite
def some_fractions(draw):
    weights = draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=60, deadline=None)
@given(some_fractions())
def test_every_beginning_is_within_the_bound(fractions):
    """Tijdeman's 1 - 1 / (2 k - 2), against counting in exact fractions; every period has the exact counts."""
    counts = rows_per_period(fractions)
    period, k = sum(counts), len(counts)
    assert period <= MAX_PERIOD and MAX_PERIOD % period == 0
    for count, fraction in zip(counts, fractions, strict=True):
        assert abs(count / period - fraction) < 1 / MAX_PERIOD
    order = spread(counts)
    assert np.bincount(order, minlength=k).tolist() == counts
    bound = 1 - Fraction(1, 2 * (k - 1)) if k > 1 else 0
    taken = np.cumsum(order[:, None] == np.arange(k), axis=0)
    deviation = np.abs(taken * period - np.arange(1, period + 1)[:, None] * np.array(counts))
    assert Fraction(int(deviation.max()), period) <= bound


def test_largest_remainder():
    assert rows_per_period(FRACTIONS) == [50, 25, 17, 8]
    assert rows_per_period([1 / 3] * 3) == [3334, 3333, 3333]
    assert rows_per_period([0.9999, 0.0001]) == [9999, 1]
    assert rows_per_period([1.0]) == [1]
    assert rows_per_period([0.1] * 10) == [1] * 10


@pytest.fixture
def numbered(numbered_dataset):
    """Sources whose token ids are positions, told apart by the lengths of their documents."""
    generator = np.random.default_rng(0)
    return [numbered_dataset(generator.integers(2, 30, count).tolist()) for count in (60, 25, 30, 9)]


def sources_of(paths, fractions=FRACTIONS, max_epochs=None):
    return [MixtureSource(path, fraction, max_epochs) for path, fraction in zip(paths, fractions, strict=True)]


def rows_of(batch, seqlen):
    """(input ids, labels, lengths of its segments) of each row."""
    ids, labels = (tensor.view(-1, seqlen).tolist() for tensor in (batch.input_ids, batch.labels))
    segments = [None] * len(ids)
    if batch.cu_seqlens is not None:
        edges = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32 and edges[-1] == batch.input_ids.numel()
        segments = [[edge - seqlen * row for edge in edges if row * seqlen < edge <= (row + 1) * seqlen]
                    for row in range(len(ids))]  # fmt: skip
    return list(zip(ids, labels, segments, strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_those_of_the_sources_in_their_order(numbered, packing):
    """Row by row against the sources themselves: also across epochs, from any position, with any batch size."""
    mixture = MixtureDataset(sources_of(numbered), "train", 16, packing, seed=3)
    components = [PackedDataset(path, "train", 16, packing, seed=3) for path in numbered]
    order = spread([50, 25, 17, 8]).tolist()
    taken, expected = Counter(), []
    for row in range(250):
        source = order[row % 100]
        batch = components[source].batch(taken[source], 1)
        expected += rows_of(batch, 16)
        taken[source] += 1
    assert mixture.epochs(250) == {
        name: taken[i] / component.num_samples
        for i, (name, component) in enumerate(zip(mixture.names, components, strict=True))
    }
    assert max(mixture.epochs(250).values()) > 2
    for batch_size in (1, 7, 64):
        found, num_tokens = [], 0
        for position in range(0, 250 - batch_size + 1, batch_size):
            batch = mixture.batch(position, batch_size)
            found += rows_of(batch, 16)
            num_tokens += batch.num_tokens
        assert found == expected[: len(found)]
        assert num_tokens == sum(label != -100 for _, labels, _ in found for label in labels)
    buffer = mixture.batch(0, 32)
    again = mixture.batch(101, 32, out=buffer)
    assert rows_of(again, 16) == expected[101:133] and again.input_ids is buffer.input_ids


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_every_token_of_every_source_is_a_target_once_per_epoch(numbered, packing):
    mixture = MixtureDataset(sources_of(numbered), "train", 16, packing)
    components, order = mixture.components, spread([50, 25, 17, 8])
    needed = max(c.num_samples * 100 // n + 101 for c, n in zip(components, (50, 25, 17, 8), strict=True))
    rows = rows_of(mixture.batch(0, needed), 16)
    for source, component in enumerate(components):
        of_source = [row for row, owner in zip(rows, np.resize(order, needed), strict=True) if owner == source]
        targets = Counter(
            label for _, labels, _ in of_source[: component.num_samples] for label in labels if label != -100
        )
        assert set(targets.values()) == {1}
        assert len(targets) == component.num_tokens - component.num_documents == component.num_targets


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_see_one_stream(numbered, ranks):
    """However the samples of a step are dealt to ranks, together they are those of one rank."""
    mixture = MixtureDataset(sources_of(numbered), "train", 16)
    whole = rows_of(mixture.batch(0, 96), 16)
    each = 8 // ranks
    parts = [rows_of(mixture.batch(step * 8 + rank * each, each), 16) for step in range(12) for rank in range(ranks)]
    assert [row for part in parts for row in part] == whole


@pytest.mark.skipif("seqlen" not in inspect.signature(PackedDataset.batch).parameters, reason="rows cannot be cut yet")
@pytest.mark.parametrize("packing", PACKINGS)
def test_shorter_sequences_are_pieces_of_the_same_rows(numbered, packing):
    mixture = MixtureDataset(sources_of(numbered), "train", 16, packing)
    whole = [ids for ids, _, _ in rows_of(mixture.batch(30, 40), 16)]
    for first, last in ((0, 160), (3, 157), (5, 6)):
        pieces = mixture.batch(120 + first, last - first, seqlen=4).input_ids.view(-1, 4).tolist()
        assert pieces == [ids[i : i + 4] for ids in whole for i in range(0, 16, 4)][first:last]


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_walks_every_source_once(numbered, packing):
    mixture = MixtureDataset(sources_of(numbered), "train", 16, packing)
    batches = list(mixture.evaluation_batches(2))
    found = Counter(str(row) for batch in batches for row in rows_of(batch, 16))
    alone = [batch for component in mixture.components for batch in component.evaluation_batches(2)]
    assert found == Counter(str(row) for batch in alone for row in rows_of(batch, 16))
    assert sum(batch.num_tokens for batch in batches) == mixture.num_targets
    totals = ("num_tokens", "num_documents", "num_bytes", "num_samples")
    assert all(getattr(mixture, name) == sum(getattr(c, name) for c in mixture.components) for name in totals)
    assert mixture.statistics.num_targets == sum(c.statistics.num_targets for c in mixture.components)
    # The sources take turns by their fractions while they last.
    left = [list(component.evaluation_batches(2)) for component in mixture.components]
    turns = []
    for source in np.resize(spread([50, 25, 17, 8]), 2000).tolist():
        turns += [left[source].pop(0).input_ids.tolist()] if left[source] else []
    assert [batch.input_ids.tolist() for batch in batches] == turns and not any(left)


def test_a_mixture_that_runs_out(numbered):
    sources = [MixtureSource(numbered[0], 0.5, 1), MixtureSource(numbered[1], 0.5, 2)]
    mixture = MixtureDataset(sources, "train", 16)
    limits = [c.num_samples * epochs for c, epochs in zip(mixture.components, (1, 2), strict=True)]
    order = np.resize(spread([1, 1]), 1000)
    taken = np.cumsum(order[:, None] == np.arange(2), axis=0)
    assert mixture.max_samples == int(np.flatnonzero((taken > limits).any(axis=1))[0])
    mixture.check_length(mixture.max_samples)
    mixture.batch(mixture.max_samples - 8, 8)
    short = next(i for i in range(2) if taken[mixture.max_samples, i] > limits[i])
    lacks = rf"the {(mixture.max_samples + 1) * 16:,} tokens of the run in their fractions, got: "
    lacks += rf"'{mixture.names[short]}' lacks 16 of {(limits[short] + 1) * 16:,} \(max_epochs={short + 1}\)$"
    for call in (
        lambda: mixture.check_length(mixture.max_samples + 1),
        lambda: mixture.batch(mixture.max_samples - 7, 8),
    ):
        with pytest.raises(ValueError, match=lacks):
            call()
    with pytest.raises(ValueError, match=r"lacks [\d,]+ of [\d,]+ \(max_epochs=1\); '.*' lacks"):
        mixture.check_length(100_000)
    unlimited = MixtureDataset(sources_of(numbered[:2], [0.5, 0.5]), "train", 16)
    assert unlimited.max_samples is None
    unlimited.check_length(10**12)
    unlimited.batch(10**12, 4)
    # A source is not repeated unless that is said.
    assert MixtureSource(numbered[0], 1.0).max_epochs == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0,), r"fraction must be in \[0.0001, 1\], got 0.0"),
        ((0.00009,), r"fraction must be in \[0.0001, 1\], got 9e-05"),
        ((1.5,), r"fraction must be in \[0.0001, 1\], got 1.5"),
        ((float("nan"),), r"fraction must be in \[0.0001, 1\], got nan"),
        ((True,), r"fraction must be in \[0.0001, 1\], got True"),
        (("0.5",), r"fraction must be in \[0.0001, 1\], got '0.5'"),
        ((0.5, 0), "max_epochs must be an integer at least 1, got 0"),
        ((0.5, 1.5), "max_epochs must be an integer at least 1, got 1.5"),
    ],
)
def test_bad_sources(arguments, message):
    with pytest.raises(ValueError, match=f"MixtureSource 'web': {message}"):
        MixtureSource("web", *arguments)


def test_bad_mixtures(numbered, tmp_path):
    def opened(*pairs):
        return MixtureDataset([MixtureSource(*pair) for pair in pairs], "train", 16)

    with pytest.raises(ValueError, match="MixtureDataset: sources must hold at least one MixtureSource, got none"):
        opened()
    with pytest.raises(ValueError, match="MixtureDataset: fractions must sum to 1, got 0.9$"):
        opened((numbered[0], 0.5), (numbered[1], 0.4))
    same = numbered[0].parent / "x" / ".." / numbered[0].name
    with pytest.raises(ValueError, match="sources must be different data sets, got '.*' 2 times"):
        opened((numbered[0], 0.5), (same, 0.5))
    copy = shutil.copytree(numbered[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="sources must be different data sets, got 'copy' equal to 'numbered-0'"):
        opened((numbered[0], 0.5), (copy, 0.5))
    prepare_dataset([Document(f"document {i}", "") for i in range(40)], tmp_path / "other", vocab_size=270)
    with pytest.raises(
        ValueError, match="sources must share one tokenizer, that of 'numbered-0' is .*, got .* 'other'"
    ):
        opened((numbered[0], 0.5), (tmp_path / "other", 0.5))
    with pytest.raises(FileNotFoundError, match="path must hold a dataset.json, got 'nowhere'"):
        opened((numbered[0], 0.5), ("nowhere", 0.5))
    masked = [Document(f"document {i}", "", ()) for i in range(40)]
    prepare_dataset(masked, tmp_path / "masked", Tokenizer.load(numbered[0]))
    with pytest.raises(ValueError, match="sources must hold at least one row with a target, got none in 'masked'"):
        MixtureDataset(sources_of([numbered[0], tmp_path / "masked"], [0.5, 0.5]), "train", 16, "documents")
    mixture = opened((numbered[0], 1.0))
    mixture.check_tokenizer(Tokenizer.load(numbered[0]))
    with pytest.raises(ValueError, match="tokenizer must be the one of the shards"):
        mixture.check_tokenizer(Tokenizer.load(tmp_path / "other"))
    with pytest.raises(ValueError, match="MixtureDataset.batch: position must be an integer at least 0, got -1"):
        mixture.batch(-1, 1)
    with pytest.raises(ValueError, match="MixtureDataset.batch: batch_size must be an integer at least 1, got 0"):
        mixture.batch(0, 0)
    with pytest.raises(ValueError, match="MixtureDataset.batch: seqlen must divide the rows' 16 tokens, got 5"):
        mixture.batch(0, 1, seqlen=5)


def test_fingerprint_tells_streams_apart(numbered):
    streams = [
        MixtureDataset(sources_of(numbered), "train", 16),
        MixtureDataset(sources_of(numbered), "train", 16, seed=1),
        MixtureDataset(sources_of(numbered[::-1]), "train", 16),
        MixtureDataset(sources_of(numbered, [0.49, 0.26, 0.17, 0.08]), "train", 16),
    ]
    assert len({stream.fingerprint for stream in streams}) == 4
    assert MixtureDataset(sources_of(numbered), "train", 16).fingerprint == streams[0].fingerprint


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "got: Expecting property name"),
        ("[]", "got: other keys than one list of sources"),
        ('{"sources": 3}', "got: other keys than one list of sources"),
        ('{"sources": [], "seed": 1}', "got: other keys than one list of sources"),
        ('{"sources": [{"fraction": 1}]}', "got: a source with data None"),
        ('{"sources": [{"data": "a"}]}', "got: .*missing 1 required positional argument: 'fraction'"),
        ('{"sources": [{"data": "a", "fraction": 1, "epochs": 2}]}', "got: .*unexpected keyword argument 'epochs'"),
        ('{"sources": [{"data": "a", "fraction": -1}]}', r"got: .*fraction must be in \[0.0001, 1\], got -1"),
        ("[" * 100_000, "got: maximum recursion depth"),
    ],
)
def test_bad_mixture_file(tmp_path, content, message):
    (tmp_path / "mixture.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"read_mixture: '.*mixture.json' must be of the form \{\"sources\".*, " + message
    ):
        read_mixture(tmp_path / "mixture.json")


@pytest.fixture(scope="module")
def mixture_file(corpus, tokenizer, tmp_path_factory):
    """Two data sets of real text, and a file that mixes them."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, documents in {"code": corpus[:90], "rest": corpus[90:]}.items():
        prepare_dataset(documents, folder / name, tokenizer, validation_fraction=0.2)
    entries = [
        {"data": "code", "fraction": 0.7, "max_epochs": 2},
        {"data": "rest", "fraction": 0.3, "max_epochs": None},
    ]
    (folder / "mixture.json").write_text(json.dumps({"sources": entries}))
    return folder / "mixture.json"


def test_validation_together_and_per_source(mixture_file):
    datasets = open_mixture(mixture_file, 32, num_samples=50)
    assert list(datasets) == ["train", "validation", "validation/code", "validation/rest"]
    assert dataset_directories(mixture_file) == [mixture_file.parent / "code", mixture_file.parent / "rest"]
    assert datasets["validation"].num_targets == sum(
        datasets[f"validation/{name}"].num_targets for name in ("code", "rest")
    )
    with pytest.raises(ValueError, match="MixtureDataset: sources must hold the 3,200,000 tokens .*'code' lacks"):
        open_mixture(mixture_file, 32, num_samples=100_000)
    with pytest.raises(ValueError, match="seqlen must be at most the corpus, got 1000000: the train split has"):
        open_mixture(mixture_file, 1_000_000)


def tiny_model(tokenizer):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CausalLMConfig(vocab_size=tokenizer.vocab_size, num_key_value_heads=1, max_position_embeddings=64, **shape)
    return CausalLM(config, seed=0)


def test_a_trainer_takes_a_mixture(mixture_file, tokenizer, tmp_path):
    """Evaluated together and per source; a run that is too long is refused before its first step."""

    def run(name, max_steps):
        config = TrainConfig(
            output_dir=str(tmp_path / name), max_steps=max_steps, seqlen=32, batch_size=4, progress=False
        )
        trainer = Trainer(tiny_model(tokenizer), config, mixture_file)
        return trainer, trainer.fit()

    trainer, result = run("a", 6)
    assert result.evaluation.num_tokens == trainer.datasets["validation"].num_targets
    assert {s for s in trainer.datasets if "/" in s} == {"validation/code", "validation/rest"}
    parts = [trainer.evaluate(name) for name in ("validation/code", "validation/rest")]
    total = sum(part.loss * part.num_tokens for part in parts)
    assert total / sum(part.num_tokens for part in parts) == pytest.approx(result.evaluation.loss, rel=1e-5)
    with pytest.raises(ValueError, match="sources must hold the 12,800,000 tokens of the run .*'code' lacks"):
        run("b", 100_000)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="read_mixture: '.*text.txt' must be of the form"):
        (tmp_path / "text.txt").write_text("text")
        Trainer(tiny_model(tokenizer), TrainConfig(max_steps=1), tmp_path / "text.txt")
