"""Tasks from string to string that only their examples tell apart: number words, dates, operations on letters.

A task is an operation and a frame around its result, "17 -> <eighteen>". All tasks of a family take the same inputs, so
that an input alone does not say what is to be done with it.
"""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ROMAN = ("M", 1000), ("CM", 900), ("D", 500), ("CD", 400), ("C", 100), ("XC", 90), ("L", 50), ("XL", 40), ("X", 10)
_ROMAN += ("IX", 9), ("V", 5), ("IV", 4), ("I", 1)
_WORD = re.compile(r"[a-z]{3,5}")
_MIN_COUNT = 3  # a word that occurs less often may be a misprint


def number_words(number: int) -> str:
    """English words of an integer in [0, 1000).

    >>> number_words(342), number_words(20)
    ('three hundred forty-two', 'twenty')
    """
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_ONES[hundreds]} hundred" + (f" {number_words(rest)}" if rest else "")
    if rest < 20:
        return _ONES[rest]
    return _TENS[rest // 10 - 2] + (f"-{_ONES[rest % 10]}" if rest % 10 else "")


def roman(number: int) -> str:
    """A positive integer in Roman numerals.

    >>> roman(49)
    'XLIX'
    """
    text = ""
    for letters, value in _ROMAN:
        count, number = divmod(number, value)
        text += letters * count
    return text


def caesar(word: str, steps: int) -> str:
    """Each letter of a word in lower case moved on in the alphabet.

    >>> caesar("xyz", 1)
    'yza'
    """
    return "".join(chr(97 + (ord(letter) - 97 + steps) % 26) for letter in word)


def _of_number(function: Callable[[int], object]) -> Callable[[str], str]:
    return lambda text: str(function(int(text)))


def _of_date(function: Callable[[datetime.date], object]) -> Callable[[str], str]:
    return lambda text: str(function(datetime.date.fromisoformat(text)))


_DAY = datetime.timedelta(days=1)
_MONTHS = "January February March April May June July August September October November December".split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

OPERATIONS: dict[str, dict[str, Callable[[str], str]]] = {
    "numbers": {
        "words": _of_number(number_words),
        "words of the successor": _of_number(lambda n: number_words(n + 1)),
        "successor": _of_number(lambda n: n + 1),
        "predecessor": _of_number(lambda n: n - 1),
        "roman": _of_number(roman),
        "digits reversed": lambda text: text[::-1],
        "parity": _of_number(lambda n: ("even", "odd")[n % 2]),
        "last digit": lambda text: number_words(int(text[-1])),
    },
    "dates": {
        "weekday": _of_date(lambda date: _WEEKDAYS[date.weekday()]),
        "written": _of_date(lambda date: f"{date.day} {_MONTHS[date.month - 1]} {date.year}"),
        "month": _of_date(lambda date: _MONTHS[date.month - 1]),
        "next day": _of_date(lambda date: date + _DAY),
        "day before": _of_date(lambda date: date - _DAY),
        "slashes": _of_date(lambda date: f"{date.month}/{date.day}/{date.year}"),
        "year": _of_date(lambda date: date.year),
        "day": _of_date(lambda date: number_words(date.day)),
    },
    "letters": {
        "upper": str.upper,
        "reversed": lambda text: text[::-1],
        "first": lambda text: text[0],
        "last": lambda text: text[-1],
        "doubled": lambda text: "".join(2 * letter for letter in text),
        "rotated": lambda text: text[1:] + text[0],
        "vowels removed": lambda text: re.sub("[aeiou]", "", text),
        "caesar": lambda text: caesar(text, 1),
    },
}
FRAMES = {"plain": "{}", "angles": "<{}>", "stars": "*{}*", "stop": "{}."}


@dataclass(frozen=True)
class Task:
    """An operation of a family, and the frame in which its result stands.

    >>> Task("numbers", "successor", "angles")("17")
    '<18>'
    """

    family: str
    operation: str
    frame: str

    def __call__(self, text: str) -> str:
        return FRAMES[self.frame].format(OPERATIONS[self.family][self.operation](text))

    def __str__(self) -> str:
        return f"{self.operation}, {self.frame}"


def split_tasks(generator: np.random.Generator) -> tuple[list[Task], list[Task]]:
    """(tasks to learn, tasks held out): of every operation one frame, drawn at random, is held out.

    So each operation and each frame is learned, but never those two together.
    """
    known, held_out = [], []
    for family, operations in OPERATIONS.items():
        # Every frame is held out equally often in a family.
        left_out = generator.permutation(np.resize(np.arange(len(FRAMES)), len(operations)))
        for operation, number in zip(operations, left_out, strict=True):
            for place, frame in enumerate(FRAMES):
                (held_out if place == number else known).append(Task(family, operation, frame))
    return known, held_out


def frequent_words(texts: Iterable[str], count: int) -> list[str]:
    """The most frequent words of 3 to 5 lower-case letters, alphabetically among equals.

    >>> frequent_words(["to be or not to be, that is the question; the the not not not"], 2)
    ['not', 'the']
    """
    counts = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text) if _WORD.fullmatch(word))
    common = [word for word, times in counts.items() if times >= _MIN_COUNT]
    return sorted(common, key=lambda word: (-counts[word], word))[:count]


def family_inputs(words: Sequence[str]) -> dict[str, list[str]]:
    """All inputs of each family: 1 to 998, the days of 1990 to 2029, words."""
    first, last = datetime.date(1990, 1, 1), datetime.date(2029, 12, 31)
    days = [(first + number * _DAY).isoformat() for number in range((last - first).days + 1)]
    return {"numbers": [str(number) for number in range(1, 999)], "dates": days, "letters": list(words)}


def split_inputs(
    inputs: dict[str, list[str]], share: float, generator: np.random.Generator
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(inputs to learn from, inputs held out), a share of each family."""
    known, held_out = {}, {}
    for family, texts in inputs.items():
        order = generator.permutation(len(texts)).tolist()
        count = round(share * len(texts))
        held_out[family], known[family] = ([texts[i] for i in part] for part in (order[:count], order[count:]))
    return known, held_out
