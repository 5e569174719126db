"""Tokenizers by the `tokenizers` library: byte-level byte-pair encoding, by which any UTF-8 text goes in and comes back
unchanged, and for comparison words and characters.

Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (ACL 2016), on bytes as in
Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from arfast.data.checks import check_integer, check_text, one_line
from arfast.data.files import read_file, write_file

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SPECIAL_TOKENS = [BOS_TOKEN, EOS_TOKEN, PAD_TOKEN]
UNKNOWN_TOKEN = "<|unknown|>"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# By kind; of words and characters, the special tokens, the unknown one, and one of their own.
MIN_VOCAB_SIZES = {"bpe": MIN_VOCAB_SIZE, "word": 5, "character": 5}
# What is one token. A word takes the space before it along, as in GPT-2, so that tokens put together are the text.
_PATTERNS = {"word": r" ?\w+| ?[^\w\s]|\s+(?=\s\S)|\s+", "character": r"[\s\S]"}
MAX_VOCAB_SIZE = 2**31 - 1
# The largest published tokenizer.json is about 35 MB; a file of gigabytes is not a tokenizer.
MAX_FILE_BYTES = 256 << 20
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def _checked_texts(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("Tokenizer: texts must be an iterable of str, got one str")
    for text in texts:
        check_text("Tokenizer: text", text)
        yield text


def _token_name(config: dict, key: str) -> str | None:
    """A special token as transformers writes it: a string, a record with "content", or null."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"Tokenizer.load: {key} must be a string, got {value!r:.100}")
    return value


@contextlib.contextmanager
def _sound(rule: str) -> Iterator[None]:
    """Turns what the library makes of a bad file into a ValueError: it raises bare Exception, and its panics become
    what is not even that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and type(error) is not Exception or isinstance(error, _ENDS):
            raise
        raise ValueError(f"Tokenizer: content must {rule}, got: {one_line(error)}") from None


def _byte_pairs(kind: str, vocab_size: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend, trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _whole_pieces(kind: str, vocab_size: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    backend = tokenizers.Tokenizer(models.WordLevel({UNKNOWN_TOKEN: 0}, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[kind]), "isolated")
    backend.decoder = decoders.Fuse()
    special = [*SPECIAL_TOKENS, UNKNOWN_TOKEN]
    return backend, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)


class Tokenizer:
    """A tokenizer with a start, an end and a padding token (each may be None in a tokenizer made by others).

    Text never yields one of them: the characters ``<|pad|>`` in a text are encoded as ordinary bytes.

    Attributes:
        vocab_size: largest token id plus one.
        bos_token_id, eos_token_id, pad_token_id: int or None.
        unk_token_id: what stands for a word or character that is not in the vocabulary; None: there is no such thing.
        fingerprint: SHA-256, in hex, of the canonical JSON (sorted keys, no spaces) of ``tokenizer.json``.

    >>> tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=260)
    >>> ids = tokenizer.encode("not to be")
    >>> ids[0] == tokenizer.bos_token_id, tokenizer.decode(ids)
    (True, 'not to be')
    """

    def __init__(self, content: str, bos_token: str | None, eos_token: str | None, pad_token: str | None):
        """Args: content: the text of a tokenizer.json; the names of the special tokens, or None."""
        with _sound("be a valid tokenizer.json"):
            self._backend = tokenizers.Tokenizer.from_str(content)
        try:
            canonical = json.dumps(json.loads(content), sort_keys=True, separators=(",", ":"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Tokenizer: content must be a valid tokenizer.json, got: {one_line(error)}") from None
        self._content = content
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"Tokenizer: vocab_size must be in [1, {MAX_VOCAB_SIZE}], got {self.vocab_size}")
        self.special_tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        for key, name in self.special_tokens.items():
            if name is not None and name not in vocab:
                raise ValueError(f"Tokenizer: {key} must be in the vocabulary, got {name!r:.100}")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(vocab.get, self.special_tokens.values())
        self.unk_token_id = vocab.get(getattr(self._backend.model, "unk_token", None))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> "Tokenizer":
        """Learns merges, words or characters from texts; the result depends on the texts alone, not on threads or on
        their order.

        Args:
            texts: documents; the whole iterable is counted, so give a sample of a very large corpus.
            vocab_size: at least 259 with "bpe" (256 bytes and 3 special tokens), 5 with the others. A small corpus may
                give fewer tokens: only pairs that occur twice are merged.
            kind: "bpe", "word" or "character". A word is a run of letters, marks, digits and underscores, or another
                visible character, each with one space before it if there is one; the rest of white space, run by run,
                are words too. Of words and characters the most frequent are kept; each of the others becomes the
                unknown token, which `decode` leaves out as it does all special tokens. Text without such comes back
                unchanged.

        Raises:
            ValueError: ``vocab_size`` is too small, a text is not valid Unicode, or there is no such kind.
        """
        if kind not in MIN_VOCAB_SIZES:
            raise ValueError(f"Tokenizer.train: kind must be one of {', '.join(MIN_VOCAB_SIZES)}, got {kind!r}")
        vocab_size = check_integer("Tokenizer.train: vocab_size", vocab_size, MIN_VOCAB_SIZES[kind], MAX_VOCAB_SIZE)
        backend, trainer = (_byte_pairs if kind == "bpe" else _whole_pieces)(kind, vocab_size)
        backend.train_from_iterator(_checked_texts(texts), trainer)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS_TOKEN} $A",
            special_tokens=[(BOS_TOKEN, backend.token_to_id(BOS_TOKEN))],
        )
        return cls(backend.to_str(), BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads ``tokenizer.json`` and ``tokenizer_config.json`` of a directory: ours, or one made by transformers.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: a file is damaged, or a special token is not in the vocabulary.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"Tokenizer.load: path must hold a tokenizer.json, got {str(path)!r}")
        config: object = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
        try:
            content = read_file((path / "tokenizer.json").resolve(), MAX_FILE_BYTES).decode()
            if (path / "tokenizer_config.json").is_file():
                config = json.loads(read_file((path / "tokenizer_config.json").resolve(), MAX_FILE_BYTES).decode())
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Tokenizer.load: files in {str(path)!r} must be JSON, got: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"Tokenizer.load: tokenizer_config.json must be an object, got {type(config).__name__}")
        return cls(content, *(_token_name(config, key) for key in ("bos_token", "eos_token", "pad_token")))

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` loads."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
            **({} if self.unk_token_id is None else {"unk_token": self._backend.model.unk_token}),
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        write_file(path / "tokenizer.json", self._content.encode())
        write_file(path / "tokenizer_config.json", json.dumps(config, indent=2).encode())

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Ids of all special tokens by their text, which `decode` leaves out: also of those without a role here."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, after the start token unless ``add_special_tokens`` is False."""
        check_text("Tokenizer: text", text)
        with _sound("encode any text"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """As ``encode`` for each text, on all cores (``TOKENIZERS_PARALLELISM``, ``RAYON_NUM_THREADS``)."""
        checked = list(_checked_texts(texts))
        with _sound("encode any text"):
            encodings = self._backend.encode_batch_fast(checked, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids (a sequence, a NumPy array or a tensor [T]); bytes that are not UTF-8 become U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for token in ids:
            if not (isinstance(token, int) and 0 <= token < self.vocab_size):
                raise ValueError(f"Tokenizer.decode: ids must be integers in [0, {self.vocab_size}), got {token!r}")
        with _sound("decode its ids"):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """As ``decode`` for each list of token ids, on all cores."""
        with _sound("decode its ids"):
            return self._backend.decode_batch(batch, skip_special_tokens=True)
