"""The stages that see the whole corpus, each from what the one before left on the disk, each done once."""

import contextlib
import hashlib
import heapq
import importlib.metadata
import shutil
import time
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from arfast.data.files import new_directory
from arfast.data.manifest import canonical_hash
from arfast.data.pipeline.clean import Cleaner, make_index
from arfast.data.pipeline.duplicates import COPY, KEPT, NEAR_COPY, find_copies, find_near_copies
from arfast.data.pipeline.parts import Part, Parts, index_dtype
from arfast.data.pipeline.recipe import Recipe
from arfast.data.pipeline.record import NUM_EXAMPLES, Tally, text_bytes
from arfast.data.pipeline.source import Block, read_blocks, source_state
from arfast.data.pipeline.tokenize import DROPPED, assign_documents, describe_data_set, documents_of, write_data_set
from arfast.data.pipeline.workers import Workers
from arfast.data.pipeline.workspace import Workspace, complete, reopen, result_of
from arfast.data.tokenizer import Tokenizer

_PACKAGES = ("resiliparse", "datasketch", "tokenizers")
_HASH_BYTES = 32
_NUMBER_BYTES = 8


def package_versions() -> dict[str, str]:
    """What the result depends on beside the recipe."""
    found = {"unicode": unicodedata.unidata_version}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cleaning_key(recipe: Recipe, cleaner: Cleaner) -> str:
    """A hash of all that the stages of single documents depend on, beside the documents."""
    sources = [asdict(source) for source in recipe.sources]
    for source in sources:
        del source["name"], source["fraction"]
    deduplication = recipe.deduplication
    return canonical_hash(
        {
            "versions": package_versions(),
            "sources": sources,
            "normalization": recipe.normalization,
            "language": asdict(recipe.language),
            "quality": asdict(recipe.quality),
            "mask": recipe.safety.mask,
            "lists": cleaner.lists,
            "decontamination": [cleaner.decontaminator.fingerprint(), recipe.decontamination.ngram_words],
            "signatures": [deduplication.near, deduplication.shingle_words, deduplication.num_permutations],
            "seed": recipe.split.seed,
        }
    )


class Stages:
    """The stages of one recipe in a workspace.

    content: a hash of all documents that were read.
    tally: of the stages so far.
    seconds: how long those took that this process did.
    notes: what the reader of the report should know of the sources.
    """

    def __init__(self, recipe: Recipe, cleaner: Cleaner, workspace: Workspace, workers: int, progress: bool):
        self.recipe, self._cleaner, self._workspace = recipe, cleaner, workspace
        self._workers, self._progress = workers, progress
        self._key = cleaning_key(recipe, cleaner)
        self.content = ""
        self.tally, self.seconds, self.notes = Tally(), {}, []
        self.parts = Parts(
            Path(), index_dtype(recipe.deduplication.num_permutations if recipe.deduplication.near else 0)
        )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def _bar(self, title: str, num_bytes: int | None = None) -> tqdm:
        return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=title, disable=not self._progress)

    def clean(self) -> None:
        """Reads the sources and takes each document through the stages that need no other one."""
        folder = self._workspace.stage("clean", self._key)
        self.parts.directory = folder
        states = [source_state(source) for source in self.recipe.sources]
        result = result_of(folder)
        if result is None or result["states"] != states:
            reopen(folder)
            with self._timed("clean"):
                result = complete(folder, {"states": states} | self._clean())
        self.parts.use([Part(**part) for part in result["parts"]])
        self.tally, self.notes = Tally(result["tally"]), result["notes"]
        self.content = result["content_sha256"]

    def _clean(self) -> dict:
        """Makes the parts that are not there yet, and the sum of their descriptions."""
        inputs: list[str] = []
        with warnings.catch_warnings(record=True) as caught, Workers(self._make_part, self._workers) as workers:
            warnings.simplefilter("always")
            with self._bar("clean") as bar:
                for num_bytes in workers.map(self._missing_parts(inputs)):
                    bar.update(int(num_bytes))
        tally, parts = Tally(), []
        for number in range(len(inputs)):
            description = self.parts.describe(number)
            tally.merge(description["tally"])
            parts.append(description["part"])
        notes = [str(warning.message) for warning in caught]
        return {"parts": parts, "tally": tally.stages, "notes": notes, "content_sha256": canonical_hash(inputs)}

    def _missing_parts(self, inputs: list[str]) -> Iterator[bytes]:
        """Requests for workers; ``inputs`` gets the hash of each block."""
        for index, source in enumerate(self.recipe.sources):
            for block in read_blocks(source, index):
                data, number = block.pack(), len(inputs)
                digest = hashlib.sha256(data)
                inputs.append(digest.hexdigest())
                description = self.parts.describe(number)
                if description is None or description["input"] != inputs[-1]:
                    yield number.to_bytes(_NUMBER_BYTES, "little") + digest.digest() + data

    def _make_part(self, request: bytes) -> bytes:
        """Cleans a block and writes its part; the reply is the number of bytes that it had. Runs in a worker."""
        view = memoryview(request)
        number = int.from_bytes(view[:_NUMBER_BYTES], "little")
        digest, data = view[_NUMBER_BYTES:][:_HASH_BYTES], view[_NUMBER_BYTES + _HASH_BYTES :]
        block, tally = Block.unpack(data), Tally()
        for record in block.records:
            num_bytes = text_bytes(record.text)
            tally.passed("reading", num_bytes, num_bytes)
        kept = [record for record in block.records if self._cleaner.clean(record, tally)]
        description = {"input": digest.hex(), "tally": tally.stages}
        self.parts.write(number, block.source, kept, make_index(kept, self.recipe), description)
        return str(tally.stages["reading"]["bytes_in"]).encode()

    def drop_duplicates(self) -> np.ndarray:
        """KEPT, COPY or NEAR_COPY of each document, uint8 [N]."""
        recipe = self.recipe.deduplication
        folder = self._workspace.stage("duplicates", self._duplicates_key(self.content))
        result = result_of(folder)
        if result is None:
            status = np.zeros(self.parts.num_documents, np.uint8)
            tally = Tally()
            searches = {
                "exact copies": (recipe.exact, COPY, find_copies),
                "near-copies": (recipe.near, NEAR_COPY, lambda *rest: find_near_copies(rest[0], recipe, *rest[1:])),
            }
            for stage, (wanted, code, find) in searches.items():
                if wanted:
                    with self._timed(stage):
                        pairs = find(self.parts, status, folder / "spill")
                        self._count(tally, stage, code, status, heapq.nsmallest(NUM_EXAMPLES, pairs))
            (folder / "status").write_bytes(status.tobytes())
            result = complete(folder, {"tally": tally.stages})
        self.tally.merge(result["tally"])
        return np.frombuffer((folder / "status").read_bytes(), np.uint8)

    def _count(self, tally: Tally, stage: str, code: int, status: np.ndarray, pairs: list[tuple[int, int]]) -> None:
        """Counts what a search for duplicates found, with its first pairs of documents as examples."""
        totals = {KEPT: [0, 0], code: [0, 0]}
        for part, start in zip(self.parts.parts, self.parts.starts.tolist()):
            sizes = self.parts.index(part)["num_bytes"].astype(np.int64)
            here = status[start : start + part.num_documents]
            for which, total in totals.items():
                total[0] += int((here == which).sum())
                total[1] += int(sizes[here == which].sum())
        (kept, kept_bytes), (dropped, dropped_bytes) = totals[KEPT], totals[code]
        tally.add(stage, kept + dropped, kept_bytes + dropped_bytes, kept, kept_bytes)
        if dropped:
            found = [(self.parts.record(document), self.parts.record(stays)) for document, stays in pairs]
            examples = [
                {"source": copy.source, "detail": f"like {stays.source}", "excerpt": " ".join(copy.text[:60].split())}
                for copy, stays in found
            ]
            tally.drop(stage, "like another document", dropped, dropped_bytes, examples)

    def assign(self, status: np.ndarray) -> list[np.ndarray]:
        """The split of each document, for each source uint8 [N]: DROPPED where it is not kept, or of another source."""
        splits = []
        for index, source in enumerate(self.recipe.sources):
            if not any(part.source == index and part.num_documents for part in self.parts.parts):
                reasons = [f"{n} by {reason!r}" for n, reason in self._reasons()[:3]]
                actual = f"none: of all sources, {', '.join(reasons)}"
                raise ValueError(f"prepare: source {source.name!r} must have documents that stay, got {actual}")
            splits.append(assign_documents(self.parts, status, index, self.recipe))
        return splits

    def _reasons(self) -> list[tuple[int, str]]:
        stages = self.tally.stages.values()
        found = [(e["documents"], reason) for stage in stages for reason, e in stage["dropped"].items()]
        return sorted(found, reverse=True)

    def learn_tokenizer(self, splits: list[np.ndarray]) -> Tokenizer:
        """A tokenizer from the training split, thinned out evenly to the bytes that the recipe allows."""
        recipe = self.recipe.tokenizer
        fractions = [source.fraction for source in self.recipe.sources]
        settings = [asdict(self.recipe.split), recipe.vocab_size, recipe.training_bytes, fractions]
        key = canonical_hash([self._duplicates_key(self.content), settings])
        folder = self._workspace.stage("tokenizer", key)
        if result_of(folder) is None:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            with self._timed("learn tokenizer"):
                with new_directory(folder / "tokenizer") as directory:
                    Tokenizer.train(self._training_texts(splits), recipe.vocab_size).save(directory)
            complete(folder, {})
        return Tokenizer.load(folder / "tokenizer")

    def _training_texts(self, splits: list[np.ndarray]) -> Iterator[str]:
        sizes = [self._training_bytes(split) for split in splits]
        budget = self.recipe.tokenizer.training_bytes
        with self._bar("learn tokenizer", min(sum(sizes), budget)) as bar:
            for source, split, size in zip(self.recipe.sources, splits, sizes, strict=True):
                fraction = size / sum(sizes) if source.fraction is None else source.fraction
                share, credit = min(1.0, budget * fraction / size), 0.0
                for _, text in documents_of(self.parts, split, [0]):
                    credit += share
                    if credit >= 1.0:
                        credit -= 1.0
                        bar.update(text_bytes(text))
                        yield text

    def _training_bytes(self, splits: np.ndarray) -> int:
        total = 0
        for part, start in zip(self.parts.parts, self.parts.starts.tolist()):
            here = splits[start : start + part.num_documents] == 0
            if here.any():
                total += int(self.parts.index(part)["num_bytes"][here].sum(dtype=np.int64))
        return total

    def tokenize(self, splits: list[np.ndarray], tokenizer: Tokenizer) -> tuple[Path, list[dict]]:
        """(folder of the finished data sets, for each source the counts of its splits)."""
        folder = self._workspace.stage("tokens", self.tokens_key(self.content, tokenizer.fingerprint)) / "output"
        folder.mkdir(exist_ok=True)
        return folder, [self._tokenize(folder, index, splits[index], tokenizer) for index in range(len(splits))]

    def _tokenize(self, folder: Path, index: int, splits: np.ndarray, tokenizer: Tokenizer) -> dict:
        source = self.recipe.sources[index]
        directory = folder if len(self.recipe.sources) == 1 else folder / source.name
        marks = folder.parent / f"{index}"
        marks.mkdir(exist_ok=True)
        result = result_of(marks)
        if result is None:
            with self._timed(f"tokenize {source.name}"), self._bar(f"tokenize {source.name}") as bar:
                tokenizer.save(directory)
                texts = documents_of(self.parts, splits, range(DROPPED))
                infos = write_data_set(directory, texts, tokenizer, bar.update)
                kept = int((splits != DROPPED).sum())
                described = {"name": source.path, "num_documents": kept, "num_copies": 0}
                describe_data_set(directory, self.parts, splits, tokenizer, self.recipe, described, infos)
                result = complete(marks, {split: asdict(info) for split, info in infos.items()})
        counts = {
            split: {"documents": info["num_documents"], "tokens": info["num_tokens"], "bytes": info["num_bytes"]}
            for split, info in result.items()
        }
        shards = {split: info["shards"] for split, info in result.items()}
        return {"name": source.name, "splits": counts, "shards": shards}

    def _duplicates_key(self, content: str) -> str:
        """A hash of the documents (not of where they were read) and of all that is done to them up to this stage."""
        return canonical_hash([self._key, content, asdict(self.recipe.deduplication)])

    def tokens_key(self, content: str, tokenizer: str) -> str:
        """The same for the data sets, which depend on the tokenizer's fingerprint too."""
        alone = len(self.recipe.sources) == 1
        return canonical_hash([self._duplicates_key(content), asdict(self.recipe.split), tokenizer, alone])

    def content_hash(self) -> str:
        """A hash of all documents as they are now."""
        sources = enumerate(self.recipe.sources)
        blocks = (block for index, source in sources for block in read_blocks(source, index))
        return canonical_hash([hashlib.sha256(block.pack()).hexdigest() for block in blocks])
