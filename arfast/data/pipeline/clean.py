"""The stages that see one document at a time, in their order."""

import numpy as np

from arfast.data.documents import read_documents
from arfast.data.pipeline.decontaminate import Decontaminator
from arfast.data.pipeline.extract import extract
from arfast.data.pipeline.language import check_languages, keep_language, tag_language
from arfast.data.pipeline.minhash import Signer
from arfast.data.pipeline.normalize import normalize, normalize_code
from arfast.data.pipeline.parts import index_dtype
from arfast.data.pipeline.privacy import mask_personal_data
from arfast.data.pipeline.quality import check_code, check_fineweb, check_gopher, clean_c4
from arfast.data.pipeline.recipe import Recipe
from arfast.data.pipeline.record import Dropped, Record, Tally, text_bytes
from arfast.data.pipeline.repetition import check_repetition
from arfast.data.pipeline.safety import UrlList, WordList, read_list
from arfast.data.split import document_digest

STAGES = ("extraction", "normalization", "language", "quality", "safety", "personal data", "decontamination")


class Cleaner:
    """Takes a document through the stages of a recipe; a pure function of the document, and of the recipe's lists.

    Raises:
        FileNotFoundError, ValueError: a list or an evaluation text is missing or bad, or a language is unknown.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        check_languages(recipe.language.keep)
        safety, decontamination = recipe.safety, recipe.decontamination
        word_list, url_list = safety.word_list, safety.url_list
        self.lists = {
            "word_list": read_list("safety.word_list", word_list) if word_list else [],
            "url_list": read_list("safety.url_list", url_list) if url_list else [],
        }
        self._words = WordList(self.lists["word_list"]) if word_list else None
        self._urls = UrlList(self.lists["url_list"]) if url_list else None
        texts = (document.text for path in decontamination.evaluation for document in read_documents(path))
        self.decontaminator = Decontaminator(texts, decontamination.ngram_words)
        if decontamination.evaluation and not self.decontaminator.num_ngrams:
            paths = list(decontamination.evaluation)
            raise ValueError(f"prepare: decontamination.evaluation must hold a text of 8 words, got none in {paths}")

    def clean(self, record: Record, tally: Tally) -> bool:
        """Whether the document stays, changed in place; counts what each stage does to it."""
        field = record.language
        stages = (
            lambda: extract(record),
            lambda: self._normalize(record),
            lambda: self._tag(record, field, tally),
            lambda: self._check_quality(record),
            lambda: self._check_safety(record),
            lambda: self._mask(record, tally),
            lambda: self.decontaminator.check(record.text),
        )
        num_bytes = text_bytes(record.text)
        for name, stage in zip(STAGES, stages, strict=True):
            try:
                stage()
            except Dropped as drop:
                tally.dropped(name, record, num_bytes, drop)
                return False
            left = text_bytes(record.text)
            tally.passed(name, num_bytes, left)
            num_bytes = left
        return True

    def _normalize(self, record: Record) -> None:
        code = record.kind == "code"
        record.text = normalize_code(record.text) if code else normalize(record.text, self._recipe.normalization)
        if not record.text.strip():
            raise Dropped("no text", "white space alone")

    def _tag(self, record: Record, field: str, tally: Tally) -> None:
        tag_language(record, field, self._recipe.language.identify)
        tally.count("language", record.language)
        keep_language(record, self._recipe.language.keep)

    def _check_quality(self, record: Record) -> None:
        quality = self._recipe.quality
        if record.kind == "code":
            if quality.code:
                check_code(record.text, quality.code)
            return
        if quality.c4:
            record.text = clean_c4(record.text, quality.c4)
        if quality.gopher:
            check_gopher(record.text, record.language, quality.gopher)
        if quality.repetition:
            check_repetition(record.text, quality.repetition)
        if quality.fineweb:
            check_fineweb(record.text, quality.fineweb)

    def _check_safety(self, record: Record) -> None:
        if self._urls:
            self._urls.check(record.url)
        if self._words:
            self._words.check(record.text)

    def _mask(self, record: Record, tally: Tally) -> None:
        record.text, counts = mask_personal_data(record.text, self._recipe.safety.mask)
        for kind, number in counts.items():
            tally.count("personal data", kind, number)


def make_index(records: list[Record], recipe: Recipe) -> np.ndarray:
    """Rows of the index (see ``index_dtype``) but for the places: digests, sizes, and signatures if they are wanted."""
    near = recipe.deduplication.near
    num_permutations = recipe.deduplication.num_permutations if near else 0
    signer = Signer(num_permutations, recipe.deduplication.shingle_words) if near else None
    index = np.zeros(len(records), index_dtype(num_permutations))
    for row, record in zip(index, records, strict=True):
        digest = document_digest(record.text, recipe.split.seed)
        row["high"], row["low"] = np.frombuffer(digest, ">u8")
        row["num_bytes"] = text_bytes(record.text)
        if signer:
            row["signature"] = signer(record.text)
    return index
