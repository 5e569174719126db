"""Copies and near-copies: planted at known similarities, found; and nothing grows in memory with the corpus."""

import itertools
import random
import tracemalloc

import numpy as np
import pytest
from datasketch import MinHash

from arfast.data import builtin
from arfast.data.pipeline import duplicates, spill
from arfast.data.pipeline.clean import make_index
from arfast.data.pipeline.duplicates import COPY, KEPT, NEAR_COPY, Components, find_copies, find_near_copies
from arfast.data.pipeline.minhash import Signer, band_keys, choose_bands, proposal_probability
from arfast.data.pipeline.parts import Part, Parts, index_dtype
from arfast.data.pipeline.recipe import DeduplicationRecipe, Recipe
from arfast.data.pipeline.record import Record
from arfast.data.pipeline.words import comparison_words, jaccard, shingles

RECIPE = Recipe.from_json({"sources": [{"name": "a", "path": "a"}]})


def make_parts(folder, texts, per_part=50):
    """Parts of the texts, as the stages before leave them."""
    parts, found = Parts(folder, index_dtype(128)), []
    for number, start in enumerate(range(0, len(texts), per_part)):
        records = [Record(text, str(start + i)) for i, text in enumerate(texts[start : start + per_part])]
        parts.write(number, 0, records, make_index(records, RECIPE), {})
        found.append(Part(**parts.describe(number)["part"]))
    parts.use(found)
    return parts


def similar(words, similarity, generator):
    """A copy of some words of which whole stretches are others, so that the shingles have about this similarity."""
    changed = list(words)
    # J = kept / (2 total - kept): with stretches of 10 words, each change costs 14 shingles.
    lost = len(words) * (1 - 2 * similarity / (1 + similarity))
    for place in generator.sample(range(len(words) // 15), round(lost / 14)):
        for i in range(15 * place, 15 * place + 10):
            changed[i] = f"new{generator.randrange(10**9)}"
    return changed


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """500 pairs of texts of real words, of similarities 0.5 to 1.0, and as many texts that resemble nothing."""
    generator = random.Random(0)
    vocabulary = sorted({word for document in builtin("python")[::10] for word in comparison_words(document.text)})
    texts, pairs = [], []
    for similarity in np.linspace(0.5, 1.0, 500):
        words = generator.choices(vocabulary, k=generator.randrange(200, 500))
        pairs.append((len(texts), len(texts) + 1))
        texts += [" ".join(words), ", ".join(similar(words, similarity, generator)).upper()]
        texts.append(" ".join(generator.choices(vocabulary, k=300)))
    order = generator.sample(range(len(texts)), len(texts))
    place = {old: new for new, old in enumerate(order)}
    pairs = [tuple(sorted((place[a], place[b]))) for a, b in pairs]
    texts = [texts[old] for old in order]
    return make_parts(tmp_path_factory.mktemp("parts"), texts), texts, pairs


def test_planted_near_copies_are_found(planted, tmp_path):
    parts, texts, pairs = planted
    recipe = DeduplicationRecipe()
    status = np.zeros(len(texts), np.uint8)
    found = set(find_near_copies(parts, recipe, status, tmp_path / "spill"))
    exact = {pair: jaccard(*(shingles(texts[i], recipe.shingle_words) for i in pair)) for pair in pairs}
    near = {pair for pair, similarity in exact.items() if similarity >= recipe.threshold}
    caught = {(b, a) for a, b in near} & found
    at_threshold = {pair for pair in near if exact[pair] < 0.85}
    assert len(near) > 150 and len(at_threshold) > 30
    recall, precision = len(caught) / len(near), len(caught) / len(found)
    recall_at_threshold = len({(b, a) for a, b in at_threshold} & found) / len(at_threshold)
    print(
        f"recall {recall:.4f} of {len(near)}, {recall_at_threshold:.4f} of {len(at_threshold)} at 0.8 to 0.85, "
        f"precision {precision:.4f} of {len(found)}"
    )
    # Expected: 0.985 at 0.8 and more above; all that goes was compared exactly.
    assert recall >= 0.98 and recall_at_threshold >= 0.95 and precision == 1.0
    assert (status == NEAR_COPY).sum() == len(found) and set(np.flatnonzero(status)) == {b for b, _ in found}


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_other_thresholds(planted, tmp_path, threshold):
    parts, texts, pairs = planted
    recipe = DeduplicationRecipe(threshold=threshold)
    found = set(find_near_copies(parts, recipe, np.zeros(len(texts), np.uint8), tmp_path / "spill"))
    near = {(b, a) for a, b in pairs if jaccard(*(shingles(texts[i], 5) for i in (a, b))) >= threshold}
    assert found <= near and len(found) >= 0.97 * len(near)


def test_bands():
    """The probability against the proposals of many random pairs of signatures."""
    assert choose_bands(0.8, 0.95, 128) == (18, 7)
    assert proposal_probability(0.8, 18, 7) == pytest.approx(1 - (1 - 0.8**7) ** 18)
    assert len(np.unique(band_keys(np.ones((3, 128), np.uint32), 18, 7))) == 18  # equal rows of other bands do not meet
    generator = np.random.default_rng(0)
    for similarity in (0.5, 0.7, 0.8):
        left = generator.integers(0, 2**32, (4000, 128), dtype=np.uint32)
        right = np.where(generator.random(left.shape) < similarity, left, left ^ np.uint32(1))
        proposed = (band_keys(left, 18, 7) == band_keys(right, 18, 7)).any(axis=1).mean()
        assert proposed == pytest.approx(proposal_probability(similarity, 18, 7), abs=0.03)
    for threshold, recall in itertools.product((0.3, 0.5, 0.9), (0.5, 0.9, 0.99)):
        bands, rows = choose_bands(threshold, recall, 128)
        assert bands * rows <= 128 and proposal_probability(threshold, bands, rows) >= recall
        assert proposal_probability(threshold, 128 // (rows + 1), rows + 1) < recall
    with pytest.raises(
        ValueError, match="deduplication.recall must be reachable with the permutations, 0.149, got 0.95"
    ):
        choose_bands(0.01, 0.95, 16)


def test_signatures_are_datasketch_of_the_shingles():
    """In chunks or at once, and they estimate the similarity as they should."""
    text = next(document.text for document in builtin("python") if document.source.endswith("argparse.py"))
    expected = MinHash(128, 1, hashfunc=int, scheme="affine32")
    expected.update_batch((shingles(text, 5) & np.uint64(2**32 - 1)).tolist())
    signer = Signer(128, 5)
    assert len(shingles(text, 5)) > 1000 and (signer(text) == expected.hashvalues).all()
    generator, errors = random.Random(1), []
    for similarity in np.linspace(0.3, 0.95, 40):
        words = [f"w{generator.randrange(10**6)}" for _ in range(400)]
        other = " ".join(similar(words, similarity, generator))
        exact = jaccard(shingles(" ".join(words), 5), shingles(other, 5))
        errors.append((signer(" ".join(words)) == signer(other)).mean() - exact)
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06


def test_short_and_empty_texts():
    assert len(shingles("", 5)) == 0 and len(shingles("one two", 5)) == 1 and len(shingles("a b c d e f", 5)) == 2
    assert (
        jaccard(shingles("one two", 5), shingles("One, two!", 5)) == 1.0
        and jaccard(shingles("", 5), shingles("", 5)) == 1.0
    )
    assert jaccard(shingles("one two", 5), shingles("one three", 5)) == 0.0


def test_exact_copies(tmp_path):
    texts = [f"text {i % 7}" for i in range(40)] + ["alone"]
    parts = make_parts(tmp_path, texts, per_part=6)
    status = np.zeros(len(texts), np.uint8)
    pairs = set(find_copies(parts, status, tmp_path / "spill"))
    assert pairs == {(i, i % 7) for i in range(7, 40)}
    assert (status == ([KEPT] * 7 + [COPY] * 33 + [KEPT])).all() and not (tmp_path / "spill").exists()


def test_near_copies_of_copies_and_chains(tmp_path):
    """Of a chain in which neighbours alone are alike, the first stays: connected components."""
    generator = random.Random(3)
    words = [f"w{i}" for i in range(300)]
    chain = [words]
    for _ in range(4):
        chain.append(similar(chain[-1], 0.88, generator))
    texts = [" ".join(words) for words in chain]
    ends = jaccard(shingles(texts[0], 5), shingles(texts[-1], 5))
    assert ends < 0.75 and all(jaccard(shingles(a, 5), shingles(b, 5)) > 0.8 for a, b in itertools.pairwise(texts))
    order = [2, 0, 4, 1, 3]
    parts = make_parts(tmp_path, ["other " * 3, *(texts[i] for i in order)])
    status = np.zeros(6, np.uint8)
    assert set(find_near_copies(parts, DeduplicationRecipe(), status, tmp_path / "spill")) == {
        (i, 1) for i in range(2, 6)
    }


def test_components_against_plain_search():
    generator = random.Random(0)
    for _ in range(50):
        number = generator.randrange(1, 40)
        edges = [(generator.randrange(number), generator.randrange(number)) for _ in range(generator.randrange(40))]
        components, groups = Components(number), {i: {i} for i in range(number)}
        for a, b in edges:
            components.join(a, b)
            merged = groups[a] | groups[b]
            groups |= dict.fromkeys(merged, merged)
        assert [components.root(i) for i in range(number)] == [min(groups[i]) for i in range(number)]
        assert components.members().tolist() == [i for i in range(number) if i != min(groups[i])]


def test_partitions_group_as_one_sort_does(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "PARTITION_BYTES", 1000)
    dtype = np.dtype([("key", "<u8"), ("document", "<u8")])
    generator = np.random.default_rng(0)
    records = np.zeros(5000, dtype)
    records["key"] = generator.integers(0, 2**64, 3000, dtype=np.uint64)[generator.integers(0, 3000, 5000)]
    records["document"] = np.arange(5000)
    expected = {}
    for key, document in records.tolist():
        expected.setdefault(key, []).append(document)
    with spill.Spill(tmp_path / "s", dtype, len(records)) as partitions:
        for start in range(0, 5000, 700):
            partitions.add(records[start : start + 700])
        assert len(list((tmp_path / "s").iterdir())) > 50
        found = {int(group["key"][0]): group["document"].tolist() for group in partitions.groups()}
    assert found == {key: documents for key, documents in expected.items() if len(documents) > 1}


def test_many_alike_and_many_in_one_band(tmp_path, monkeypatch):
    """A boilerplate page a thousand times costs one comparison each; unlike pages in one band at most the leaders."""
    base = [f"w{i}" for i in range(100)]
    texts = [" ".join([*base, f"page{i}"]) for i in range(400)]
    parts = make_parts(tmp_path, texts, 200)
    calls = []
    near = duplicates._Comparer.near
    monkeypatch.setattr(duplicates._Comparer, "near", lambda *pair: calls.append(pair[1:]) or near(*pair))
    status = np.zeros(400, np.uint8)
    list(find_near_copies(parts, DeduplicationRecipe(), status, tmp_path / "spill"))
    assert (status == NEAR_COPY).sum() == 399 and len(calls) == 399
    monkeypatch.setattr(duplicates._Comparer, "similar_signatures", lambda *pair: calls.append(pair) or False)
    calls.clear()
    components, comparer = Components(400), duplicates._Comparer(parts, DeduplicationRecipe())
    duplicates._join_group(list(range(400)), components, comparer, parts)
    assert len(calls) <= 400 * duplicates._MAX_LEADERS


def test_memory_of_one_document_is_bounded():
    """datasketch alone would hold 128 numbers for each of a million shingles, half a gigabyte."""
    text = " ".join(map(str, range(300_000)))
    signer = Signer(128, 5)
    tracemalloc.start()
    signer(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * len(text)


def test_damaged_work_is_noticed(tmp_path):
    parts = make_parts(tmp_path, ["some text"] * 3)
    for kind, read in (("index", parts.index), ("jsonl", lambda part: list(parts.records(part)))):
        path = parts.path(0, kind)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"prepare: '.*00000000.{kind}' must be as it was written, got other bytes"
        ):
            read(parts.parts[0])
