"""The recipe of `arfast prepare`: a closed schema with the published thresholds as defaults.

Every key that a recipe may hold is a field below; any other is refused by name. Lists are tuples here.
"""

import dataclasses
import functools
import json
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from arfast.data.checks import MAX_SEED, check_integer, one_line
from arfast.data.files import read_file
from arfast.data.split import check_fractions
from arfast.data.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE

KINDS = ("auto", "prose", "code")
NORMAL_FORMS = ("NFC", "NFKC", "none")
LANGUAGE_ORIGINS = ("field", "path", "detect")
MASKS = ("email", "ip_address", "credit_card", "phone_number")
_MAX_BYTES = 16 << 20
_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def _check(condition: bool, name: str, rule: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"prepare: {name} must {rule}, got {actual!r:.200}")


def _check_shares(section: object, prefix: str) -> None:
    """Every float of a section is a share of something, in [0, 1]."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        for number in value if isinstance(value, tuple) else (value,):
            _check(not isinstance(number, float) or 0 <= number <= 1, f"{prefix}.{item.name}", "be in [0, 1]", number)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of documents.

    name: of its data set; letters, digits, "-" and "_".
    path: text file, JSON-lines file, directory, or "builtin:python".
    kind: "prose", "code", or "auto": by the ending of each file's name.
    suffixes: endings such as ".html" of the files that count, all if empty.
    fraction: share of the mixture's tokens; all sources have one or none has.
    language_field, url_field: keys of a JSON-lines record that hold a language tag, and the address.
    """

    name: str
    path: str
    kind: str = "auto"
    suffixes: tuple[str, ...] = ()
    fraction: float | None = None
    language_field: str | None = None
    url_field: str | None = None

    def __post_init__(self) -> None:
        where = f"sources.{self.name}"
        _check(0 < len(self.name) <= 64 and set(self.name) <= _NAME_CHARACTERS, "sources.name", "be a word", self.name)
        _check(bool(self.path), f"{where}.path", "name a source", self.path)
        _check(self.kind in KINDS, f"{where}.kind", f"be one of {', '.join(KINDS)}", self.kind)
        dotted = all(suffix.startswith(".") for suffix in self.suffixes)
        _check(dotted, f"{where}.suffixes", 'start with "."', list(self.suffixes))
        _check(self.fraction is None or 0 < self.fraction <= 1, f"{where}.fraction", "be in (0, 1]", self.fraction)


@dataclass(frozen=True, slots=True)
class LanguageRecipe:
    """identify: where the tag comes from, tried in this order; keep: the languages that stay, all if empty."""

    identify: tuple[str, ...] = LANGUAGE_ORIGINS
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = set(self.identify) <= set(LANGUAGE_ORIGINS)
        _check(known, "language.identify", f"hold only {', '.join(LANGUAGE_ORIGINS)}", list(self.identify))


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Rae et al. 2021 (arXiv 2112.11446), section A1.1, "Quality Filtering"."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Rae et al. 2021 (arXiv 2112.11446), table A1.

    max_top_ngram_characters: for n = 2, 3, 4; max_duplicate_ngram_characters: for n = 5 to 10.
    """

    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    max_top_ngram_characters: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_duplicate_ngram_characters: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __post_init__(self) -> None:
        _check_shares(self, "quality.repetition")


@dataclass(frozen=True, slots=True)
class C4Quality:
    """Raffel et al. 2020 (JMLR 21), section 2.2.

    ``terminal_punctuation`` is off as in FineWeb (arXiv 2406.17557, section 3.5), where that rule alone cost 30 % of
    the tokens; FineWeb's own share of punctuated lines takes its place.
    """

    min_sentences: int = 5
    min_words_per_line: int = 3
    max_word_characters: int = 1000
    terminal_punctuation: bool = False
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True


@dataclass(frozen=True, slots=True)
class FineWebQuality:
    """Penedo et al. 2024 (arXiv 2406.17557), section 3.6."""

    min_punctuated_lines: float = 0.12
    max_duplicate_line_characters: float = 0.10
    max_short_lines: float = 0.67
    short_line_characters: int = 30

    def __post_init__(self) -> None:
        _check_shares(self, "quality.fineweb")


@dataclass(frozen=True, slots=True)
class CodeQuality:
    """Chen et al. 2021 (arXiv 2107.03374), section 3.1; Li et al. 2023 (arXiv 2305.06161), section 3.1."""

    max_line_characters: int = 1000
    max_mean_line_characters: float = 100.0
    min_alphanumeric_characters: float = 0.25
    drop_generated: bool = True


@dataclass(frozen=True, slots=True)
class QualityRecipe:
    """A section that is null is left out. ``code`` applies to code, the others to prose."""

    gopher: GopherQuality | None = field(default_factory=GopherQuality)
    repetition: GopherRepetition | None = field(default_factory=GopherRepetition)
    c4: C4Quality | None = field(default_factory=C4Quality)
    fineweb: FineWebQuality | None = field(default_factory=FineWebQuality)
    code: CodeQuality | None = field(default_factory=CodeQuality)


@dataclass(frozen=True, slots=True)
class SafetyRecipe:
    """word_list, url_list: files, one word, phrase, host or address per line; mask: kinds of personal data."""

    word_list: str | None = None
    url_list: str | None = None
    mask: tuple[str, ...] = MASKS

    def __post_init__(self) -> None:
        _check(set(self.mask) <= set(MASKS), "safety.mask", f"hold only {', '.join(MASKS)}", list(self.mask))


@dataclass(frozen=True, slots=True)
class DeduplicationRecipe:
    """threshold: Jaccard similarity of word shingles from which two documents are near-duplicates.

    recall: smallest probability with which the index proposes a pair that is exactly as similar as ``threshold``.
    """

    exact: bool = True
    near: bool = True
    threshold: float = 0.8
    recall: float = 0.95
    shingle_words: int = 5
    num_permutations: int = 128

    def __post_init__(self) -> None:
        _check(0 < self.threshold < 1, "deduplication.threshold", "be in (0, 1)", self.threshold)
        _check(0 < self.recall < 1, "deduplication.recall", "be in (0, 1)", self.recall)
        check_integer("prepare: deduplication.shingle_words", self.shingle_words, 1, 100)
        check_integer("prepare: deduplication.num_permutations", self.num_permutations, 16, 1024)


@dataclass(frozen=True, slots=True)
class DecontaminationRecipe:
    """evaluation: sources of evaluation text; ngram_words: how many words in a row are a leak."""

    evaluation: tuple[str, ...] = ()
    ngram_words: int = 13

    def __post_init__(self) -> None:
        check_integer("prepare: decontamination.ngram_words", self.ngram_words, 2, 1000)


@dataclass(frozen=True, slots=True)
class MixtureRecipe:
    """num_tokens: how long the training is to be; max_epochs: how often it may see the same document."""

    num_tokens: int | None = None
    max_epochs: float = 1.0

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_integer("prepare: mixture.num_tokens", self.num_tokens, 1)
        _check(self.max_epochs > 0, "mixture.max_epochs", "be above 0", self.max_epochs)


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """path: directory of a tokenizer to use; None learns one of ``vocab_size`` from ``training_bytes`` of text."""

    path: str | None = None
    vocab_size: int = 4096
    training_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        check_integer("prepare: tokenizer.vocab_size", self.vocab_size, MIN_VOCAB_SIZE, MAX_VOCAB_SIZE)
        check_integer("prepare: tokenizer.training_bytes", self.training_bytes, 1)


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """Shares of the documents, and the seed of the choice."""

    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_fractions(self.validation_fraction, self.test_fraction)
        check_integer("prepare: split.seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that determines what `arfast prepare` makes of its sources.

    >>> Recipe.from_json({"sources": [{"name": "python", "path": "builtin:python"}]}).quality.gopher.min_words
    50
    >>> Recipe.from_json({"sources": [], "colour": "red"})
    Traceback (most recent call last):
    ValueError: prepare: recipe must hold only known keys, got 'colour'
    """

    sources: tuple[Source, ...]
    normalization: str = "NFC"
    language: LanguageRecipe = field(default_factory=LanguageRecipe)
    quality: QualityRecipe = field(default_factory=QualityRecipe)
    safety: SafetyRecipe = field(default_factory=SafetyRecipe)
    deduplication: DeduplicationRecipe = field(default_factory=DeduplicationRecipe)
    decontamination: DecontaminationRecipe = field(default_factory=DecontaminationRecipe)
    mixture: MixtureRecipe = field(default_factory=MixtureRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    split: SplitRecipe = field(default_factory=SplitRecipe)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        _check(bool(names), "sources", "name at least one source", names)
        _check(len(set(names)) == len(names), "sources", "have different names", names)
        known = f"be one of {', '.join(NORMAL_FORMS)}"
        _check(self.normalization in NORMAL_FORMS, "normalization", known, self.normalization)
        fractions = [source.fraction for source in self.sources if source.fraction is not None]
        complete = len(fractions) in (0, len(names)) and (not fractions or abs(sum(fractions) - 1) < 1e-6)
        _check(complete, "fractions of the sources", "be given for none, or for all with sum 1", fractions)
        alone = not fractions and len(names) > 1 and self.mixture.num_tokens is not None
        _check(not alone, "mixture.num_tokens", "come with a fraction for each source", self.mixture.num_tokens)

    @classmethod
    def from_json(cls, value: object) -> "Recipe":
        """A recipe from JSON data; ValueError names the first key that is unknown or of a wrong type."""
        return _from_json(cls, value, "")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """Reads a recipe file. Paths in it are relative to the working directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or breaks the schema.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"prepare: config must be a file, got {str(path)!r}")
        try:
            value = json.loads(read_file(Path(path).resolve(), _MAX_BYTES))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"prepare: config {str(path)!r} must be JSON, got: {one_line(error)}") from None
        return cls.from_json(value)

    def to_json(self) -> dict:
        """JSON data that ``from_json`` turns into an equal recipe."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_type_hints = functools.cache(typing.get_type_hints)


def _from_json(kind: typing.Any, value: object, name: str) -> typing.Any:
    """JSON data as a dataclass, tuple or plain value of the annotated type."""
    if isinstance(kind, types.UnionType):
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        return None if value is None else _from_json(kind, value, name)
    if typing.get_origin(kind) is tuple:
        _check(isinstance(value, list), name, "be a list", value)
        return tuple(_from_json(typing.get_args(kind)[0], item, name) for item in value)
    if not dataclasses.is_dataclass(kind):
        accepted = (int, float) if kind is float else kind
        right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        right = right and (kind is not float or abs(value) <= sys.float_info.max)
        _check(right, name, f"be of type {kind.__name__}", value)
        return kind(value)
    _check(isinstance(value, dict), name or "recipe", "be an object", value)
    hints = _type_hints(kind)
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"prepare: {name or 'recipe'} must hold only known keys, got {key!r:.100}")
    required = (item for item in dataclasses.fields(kind) if item.default is item.default_factory)
    for item in required:
        _check(item.name in value, prefix + item.name, "be given", None)
    return kind(**{key: _from_json(hints[key], item, prefix + key) for key, item in value.items()})
