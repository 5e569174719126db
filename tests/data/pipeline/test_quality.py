"""Quality filters on hand-made documents with a known answer, and the repetition measures against plain loops."""

import random
from dataclasses import replace

import numpy as np
import pytest

from arfast.data import builtin
from arfast.data.pipeline.quality import check_code, check_fineweb, check_gopher, clean_c4, count_words
from arfast.data.pipeline.recipe import C4Quality, CodeQuality, FineWebQuality, GopherQuality, GopherRepetition
from arfast.data.pipeline.record import Dropped
from arfast.data.pipeline.repetition import check_repetition, duplicate_ngram_share, repeated_share, top_ngram_share
from arfast.data.pipeline.words import hash_ngrams, hash_words

GOOD = (
    "The harbour lay quiet under a grey morning sky, and nobody on the long pier spoke.\n"
    "A fisherman mended his net with slow hands; beside him a dog slept on coiled rope.\n"
    "Further out, past the broken lighthouse, two small boats had begun to turn for home.\n"
    "Their captains knew that weather seldom keeps its promise so late in the autumn.\n"
    "By noon rain would hide everything, even the church tower, from those still at sea.\n"
    "That was when most accidents happened, as every child in the village could have told you."
)


def reason(check, text, *arguments):
    try:
        check(text, *arguments)
    except Dropped as drop:
        return drop.reason
    return None


def words(number, length=5, start=0):
    """Different words of one length; another ``start``, others."""
    letters = (
        f"{chr(97 + i // 676 % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for i in range(start, start + number)
    )
    return " ".join(word.ljust(length, "x") for word in letters)


def test_a_good_text_passes_unchanged():
    assert reason(check_gopher, GOOD, "en", GopherQuality()) is None
    assert reason(check_repetition, GOOD, GopherRepetition()) is None
    assert reason(check_fineweb, GOOD, FineWebQuality()) is None
    assert clean_c4(GOOD, C4Quality()) == GOOD


@pytest.mark.parametrize(
    "text, language, expected",
    [
        (words(47) + " the of", "en", "number of words"),
        (words(48) + " the of", "en", None),
        (words(99_998) + " the of", "en", None),
        (words(99_999) + " the of", "en", "number of words"),
        ("to of " + "ab " * 60, "en", "length of words"),
        ("the of " + words(60, 11), "en", "length of words"),
        ("the of " + words(60, 10), "en", None),
        ("the of # # # # # # " + words(52), "en", None),
        ("the of # # # # # # # " + words(52), "en", "hashes per word"),
        ("the of" + " yes..." * 4 + " well\u2026" * 2 + " " + words(52), "en", None),
        ("the of" + " yes..." * 4 + " well\u2026" * 3 + " " + words(52), "en", "ellipses per word"),
        ("\n".join(f"- {words(6)}" for _ in range(10)) + "\nthe of", "en", "lines with bullets"),
        ("\n".join(f"\u2022 {words(6)}" for _ in range(9)) + "\nthe of", "en", None),
        (
            "\n".join(f"{words(12)}..." for _ in range(4)) + f"\nthe\n{words(20)}\n" * 3 + "of",
            "en",
            "lines that end in an ellipsis",
        ),
        ("the of " + words(78) + " 1234" * 20, "en", None),
        ("the of " + words(77) + " 1234" * 21, "en", "words without a letter"),
        ("the " + words(60), "en", "stop words"),
        ("the " + words(60), "de", None),
        ("The " + words(60) + " WITH", "en", None),
        ("汉字" * 25, "zh", None),
        ("汉字" * 24, "zh", "number of words"),
    ],
)
def test_gopher(text, language, expected):
    limits = GopherQuality()
    assert reason(check_gopher, text, language, limits) == expected


def test_words_of_unspaced_scripts():
    assert count_words("汉字 and 汉字") == (["汉", "字", "汉", "字", "and"], False)
    assert count_words("mostly English with 汉")[1] and not count_words("ภาษาไทย")[1]


def brute_top(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    most = max((sum(map(len, gram)) * grams.count(gram) for gram in set(grams) if grams.count(gram) > 1), default=0)
    return min(1.0, most / max(sum(map(len, tokens)), 1))


def brute_duplicate(tokens, n):
    seen, covered = set(), set()
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(tokens[i]) for i in covered) / max(sum(map(len, tokens)), 1)


def test_shares_of_ngrams_against_plain_loops():
    generator = random.Random(0)
    texts = [[], ["a"], ["a"] * 30, "to be or not to be or not to".split()]
    texts += [[generator.choice(["a", "bb", "ccc", "dddd"]) for _ in range(generator.randrange(80))] for _ in range(40)]
    texts += [builtin("python")[i].text.split()[:400] for i in range(0, 60, 10)]
    for tokens in texts:
        hashes, lengths = hash_words(tokens), np.array([len(token) for token in tokens], np.int64)
        for n in range(2, 5):
            assert top_ngram_share(hashes, lengths, n) == pytest.approx(brute_top(tokens, n)), (tokens, n)
        for n in range(5, 11):
            assert duplicate_ngram_share(hashes, lengths, n) == pytest.approx(brute_duplicate(tokens, n)), (tokens, n)


def test_hashes_of_ngrams_tell_all_of_a_corpus_apart():
    """And equal ones have equal hashes: words in order, on every machine."""
    tokens = [word for document in builtin("python")[::8] for word in document.text.split()][:200_000]
    for n in (1, 5, 13):
        different = len({tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)})
        found = len(np.unique(hash_ngrams(hash_words(tokens), n)))
        assert different - found <= (10 if n == 1 else 0)
    assert hash_ngrams(hash_words(["a", "b"]), 2).tolist() != hash_ngrams(hash_words(["b", "a"]), 2).tolist()
    assert hash_ngrams(hash_words("to be or not".split()), 3).tolist() == EXPECTED_HASHES


# Of this version; another value makes signatures on the disk useless.
EXPECTED_HASHES = [18083060048825755246, 17637759541162704556]


def test_repeated_share():
    assert repeated_share([]) == (0, 0) and repeated_share(["x"]) == (0, 0)
    assert repeated_share(["ab", "ab", "c", "ab"]) == (0.5, 4 / 7)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\n".join([words(9, start=20 * i) for i in range(7)] + ["x"] * 3), None),
        ("\n".join([words(9, start=20 * i) for i in range(7)] + ["x"] * 5), "duplicate lines"),
        (
            "\n".join([words(3, start=20 * i) for i in range(8)] + [words(9, start=300)] * 2),
            "characters in duplicate lines",
        ),
        ("\n".join(f"bali nara {words(3, start=20 * i)}" for i in range(9)), "characters in the top 2-gram"),
        (f"{words(8)} {words(8)} {words(34, start=50)}", "characters in duplicate 5-grams"),
        (f"{words(8)} {words(8)} {words(38, start=50)}", "characters in duplicate 6-grams"),
        (f"{words(6)} {words(6)} {words(40, start=50)}", None),
        (words(60), None),
    ],
)
def test_repetition(text, expected):
    assert reason(check_repetition, text, GopherRepetition()) == expected


def test_paragraphs_that_repeat():
    limits = replace(GopherRepetition(), max_duplicate_lines=1.0, max_duplicate_line_characters=1.0)
    text = "\n\n".join([words(12, start=20 * i) for i in range(6)] + ["short"] * 4)
    assert reason(check_repetition, text, limits) is None
    assert reason(check_repetition, text + "\n\nshort", limits) == "duplicate paragraphs"


def test_c4_takes_lines_out():
    lines = GOOD.split("\n")
    mixed = [
        lines[0],
        "Two words.",
        "Please enable JavaScript to read on.",
        *lines[1:4],
        "We use cookies on this page.",
    ]
    mixed += ["x" * 1001 + " is too long", lines[4] + "[12][citation needed]", "", "Menu", "", lines[5]]
    assert clean_c4("\n".join(mixed), C4Quality()) == "\n".join([*lines[:5], "", lines[5]])
    off = C4Quality(
        drop_javascript_lines=False, drop_policy_lines=False, min_words_per_line=1, max_word_characters=2000
    )
    assert clean_c4("\n".join(mixed), off).count("\n") == len(mixed) - 1
    strict = C4Quality(terminal_punctuation=True)
    assert clean_c4(GOOD + "\nno punctuation at the end\nand one that trails off...", strict) == GOOD


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOOD + "\nLorem Ipsum dolor", "lorem ipsum"),
        (GOOD + "\nfunction() { }", "curly bracket"),
        ("One line here. Another one there. A third one.", "number of sentences"),
        ("One line here. Two of them! Three of them? Four of them. Five.", None),
        ("一句话在这里。第二句话！第三句话？第四句话。第五句话。", None),
    ],
)
def test_c4_drops(text, expected):
    assert reason(clean_c4, text, C4Quality()) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "\n".join(["a line of text without an end, of some length"] * 1 + [f"{words(8)} {i}" for i in range(9)]),
            "lines without final punctuation",
        ),
        ("\n".join([f"{words(8)} {i}." for i in range(2)] + [f"{words(8)} {i}" for i in range(3, 11)]), None),
        ("\n".join([f"short {i}." for i in range(7)] + [f"{words(8)} {i}." for i in range(3)]), "short lines"),
        ("\n".join([f"short {i}." for i in range(6)] + [f"{words(8)} {i}." for i in range(4)]), None),
        ("\n".join([f"{words(8)} {i}." for i in range(9)] + [f"{words(8)} 0."] * 2), "characters in duplicate lines"),
    ],
)
def test_fineweb(text, expected):
    assert reason(check_fineweb, text, FineWebQuality()) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def f(x):\n    return x\n", None),
        ("x = 1\n" * 20 + "y" * 1001, "longest line"),
        ("y" * 150 + "\n" + "y" * 150, "mean length of lines"),
        ("+-*/" * 10 + "\nabc", "letters and digits"),
        ("# Do not edit: AUTOMATICALLY GENERATED by make\nx = 1\n", "generated code"),
        ("\n" * 6 + "# auto-generated\nx = 1\n", None),
    ],
)
def test_code(text, expected):
    assert reason(check_code, text, CodeQuality()) == expected
    assert reason(check_code, text, CodeQuality(10**6, 10.0**6, 0.0, False)) is None


def test_the_standard_library_is_good_code():
    documents = builtin("python")
    dropped = [document for document in documents if reason(check_code, document.text, CodeQuality())]
    assert len(dropped) < 0.02 * len(documents)
