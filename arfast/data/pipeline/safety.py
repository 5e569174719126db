"""Documents that must not be learned from: words and addresses of lists that the user gives.

Words as in Raffel et al. 2020 (JMLR 21), section 2.2, addresses as in Penedo et al. 2023 (arXiv 2306.01116), section G.
"""

from pathlib import Path
from urllib.parse import urlsplit

from arfast.data.files import read_file
from arfast.data.pipeline.record import Dropped
from arfast.data.pipeline.words import UNSPACED, comparison_words

_MAX_BYTES = 1 << 30
# RFC 9110, section 4.1. Host and first folders stand in front; long hosts take the square of their length.
_MAX_URL_CHARACTERS = 8000


def read_list(name: str, path: str) -> list[str]:
    """The entries of a file, one per line; empty lines and those that start with "#" are left out.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is no text, or holds no entry.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"prepare: {name} must be a file, got {path!r}")
    try:
        lines = read_file(Path(path).resolve(), _MAX_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prepare: {name} must be UTF-8 text, got {error.reason} in {path!r}") from None
    entries = [entry for line in lines if (entry := line.strip()) and not entry.startswith("#")]
    if not entries:
        raise ValueError(f"prepare: {name} must hold an entry, got none in {path!r}")
    return entries


class WordList:
    """Finds the words and phrases of a list in a text: whole words in any case, but anywhere in unspaced scripts.

    >>> words = WordList(["bad", "very wrong"])
    >>> words.find("Not a Bad text"), words.find("a badge"), words.find("It is VERY, wrong.")
    ('bad', None, 'very wrong')
    """

    def __init__(self, entries: list[str]):
        phrases = {" ".join(comparison_words(entry)) for entry in entries} - {""}
        self._unspaced = sorted(phrase.replace(" ", "") for phrase in phrases if UNSPACED.search(phrase))
        spaced = sorted(phrase for phrase in phrases if not UNSPACED.search(phrase))
        self._words = {phrase for phrase in spaced if " " not in phrase}
        self._phrases = [f" {phrase} " for phrase in spaced if " " in phrase]

    def find(self, text: str) -> str | None:
        """The first entry, in the order of the alphabet, that the text holds."""
        words = comparison_words(text)
        found = self._words.intersection(words)
        if self._phrases:
            line = f" {' '.join(words)} "
            found |= {phrase.strip() for phrase in self._phrases if phrase in line}
        found |= {entry for entry in self._unspaced if entry in text}
        return min(found, default=None)

    def check(self, text: str) -> None:
        if entry := self.find(text):
            raise Dropped("word list", f"holds {entry!r}")


class UrlList:
    """Finds addresses of a list: a host stands for its subdomains too, an entry with a path for all below it.

    >>> urls = UrlList(["bad.example", "good.example/spam"])
    >>> urls.find("https://www.bad.example/page"), urls.find("http://good.example/spam/1")
    ('bad.example', 'good.example/spam')
    >>> urls.find("http://good.example/spammer"), urls.find("http://notbad.example/")
    (None, None)
    """

    def __init__(self, entries: list[str]):
        self._entries = {self._normal(entry) for entry in entries}
        # No address is searched beyond the longest of them.
        self._most_labels = max((entry.partition("/")[0].count(".") for entry in self._entries), default=0) + 1
        self._most_folders = max((entry.count("/") for entry in self._entries), default=0)

    @staticmethod
    def _normal(url: str) -> str:
        parts = urlsplit(url if "//" in url else f"//{url}")
        try:
            host = (parts.hostname or "").removesuffix(".")
        except ValueError:
            host = parts.netloc.lower()
        return f"{host}{parts.path}".rstrip("/")

    def find(self, url: str) -> str | None:
        try:
            host, _, path = self._normal(url[:_MAX_URL_CHARACTERS]).partition("/")
        except ValueError:
            return None
        labels = host.rsplit(".", self._most_labels)[-self._most_labels :]
        folders = path.split("/", self._most_folders)[: self._most_folders]
        for first in range(len(labels)):
            name = ".".join(labels[first:])
            for last in range(len(folders) + 1):
                entry = "/".join([name, *folders[:last]])
                if entry in self._entries:
                    return entry
        return None

    def check(self, url: str | None) -> None:
        if url and (entry := self.find(url)):
            raise Dropped("URL list", f"{url} is on it as {entry!r}")
