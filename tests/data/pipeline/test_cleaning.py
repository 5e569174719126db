"""The stages that see one document: each on text whose answer is known."""

import doctest
import importlib
import random
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from arfast.data import builtin
from arfast.data.pipeline import packages
from arfast.data.pipeline.decontaminate import Decontaminator
from arfast.data.pipeline.extract import extract, extract_text, is_html
from arfast.data.pipeline.language import check_languages, detect_language, language_of_path, tag_language
from arfast.data.pipeline.normalize import normalize, normalize_code
from arfast.data.pipeline.privacy import luhn_valid, mask_personal_data
from arfast.data.pipeline.recipe import LANGUAGE_ORIGINS, MASKS
from arfast.data.pipeline.record import Dropped, Record, suffix_of
from arfast.data.pipeline.safety import UrlList, WordList

PAGES = Path(__file__).with_name("pages")
MODULES = "clean decontaminate duplicates extract language minhash normalize privacy quality recipe record repetition "
MODULES += "safety source words workers"


@pytest.mark.parametrize("name", [name for name in MODULES.split() if name not in ("clean", "duplicates", "source")])
def test_examples_of_the_documentation(name):
    results = doctest.testmod(importlib.import_module(f"arfast.data.pipeline.{name}"))
    assert results.failed == 0 and (results.attempted > 0 or name == "record")


def page(name):
    return (PAGES / name).read_text()


def test_text_of_real_pages():
    """The paragraphs are there, word for word, and what surrounds them on every page is not."""
    text = extract_text(page("en-US/sect.quotas.html"))
    assert "The quota system allows limiting disk space allocated to a user or group of users." in text
    assert text.startswith("9.9.\u00a0Quotas\n")
    assert "квот" in extract_text(page("ru-RU/sect.quotas.html"))
    for name in sorted(PAGES.glob("*/*.html")):
        text = extract_text(name.read_text())
        assert 700 < len(text) < 4000
        assert not any(word in text for word in ("<div", "&nbsp;", "Documentation Site", "docnav", "text/css"))


def test_what_is_html():
    page = "<!DOCTYPE html>\n<html><body><p>Text.</p></body></html>"
    assert (
        is_html(Record("anything", "a/b.HTML"))
        and is_html(Record(page, "b.txt#3"))
        and is_html(Record(page, "c.jsonl:7"))
    )
    assert is_html(Record('\ufeff <?xml version="1.0"?>\n' + page, "d"))
    assert not is_html(Record("a < b, html", "b.txt")) and not is_html(Record(page[15:].replace("<html>", ""), "d.txt"))
    assert suffix_of("x/a.tar.html:12") == ".html" and suffix_of("x.y/name") == "" and suffix_of("a.txt#3") == ".txt"


@pytest.mark.parametrize(
    "html, reason",
    [("<html><body><script>x</script></body></html>", "no text"), ("<div>" * 100_000 + "text", "nesting")],
)
def test_pages_without_text(html, reason):
    """The second takes resiliparse more than ten minutes."""
    with pytest.raises(Dropped) as drop:
        extract(Record(html, "a.html"))
    assert drop.value.reason == reason


def test_normal_forms():
    decomposed, ligature = "e\u0301", "\ufb01x\u00b2"
    assert normalize(decomposed) == "\u00e9" and normalize(decomposed, "none") == decomposed
    assert normalize(decomposed + ligature) == "\u00e9" + ligature
    assert normalize(ligature) == ligature and normalize(ligature, "NFKC") == "fix2"
    assert normalize("a\r\nb\rc\u2028d\x85e\ff") == "a\nb\nc\nd\ne\nf"
    assert normalize("\ufeffa\x00\x07\x1b[1m\x7f\x9d b\uffff\ufdd0") == "a[1m b"
    assert normalize("zero\u200cwidth\u200djoiners \U0001f469\u200d\U0001f4bb stay\tand tabs") == (
        "zero\u200cwidth\u200djoiners \U0001f469\u200d\U0001f4bb stay\tand tabs"
    )
    assert normalize_code("\ufeffa = '\x0c\u2028e\u0301'  \r\nb\r") == "a = '\x0c\u2028e\u0301'  \nb\n"
    for name in PAGES.glob("*/*.html"):
        text = normalize(unicodedata.normalize("NFD", extract_text(name.read_text())))
        assert unicodedata.is_normalized("NFC", text) and normalize(text) == text


def test_languages():
    for folder, language in (("en-US", "en"), ("de-DE", "de"), ("ja-JP", "ja"), ("ru-RU", "ru")):
        assert detect_language(extract_text(page(f"{folder}/sect.quotas.html"))) == language
        assert language_of_path(f"html/{folder}/sect.quotas.html") == language
    assert language_of_path("python-3.11/src/lib/file.txt") is None
    assert detect_language("\U0001f469" * 100) == "unknown"
    record = Record(extract_text(page("en-US/sect.quotas.html")), "de-DE/a.html")
    for identify, field, expected in (
        (LANGUAGE_ORIGINS, "pt-BR", "pt"),
        (LANGUAGE_ORIGINS, "", "de"),
        (LANGUAGE_ORIGINS, "nonsense", "de"),
        (("detect", "path"), "pt", "en"),
        (("field",), "", "unknown"),
    ):
        record.language = "unknown"
        tag_language(record, field, identify)
        assert record.language == expected
    check_languages(("en", "nb", "zh"))
    with pytest.raises(ValueError, match="prepare: language.keep must hold codes among .*en.*, got 'xx'"):
        check_languages(("en", "xx"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mail jo.doe+x@mail.example.co.uk!", "mail [EMAIL]!"),
        ("a@b, x = w@v.T, user@localhost, @decorator, 50@2x.p", "a@b, x = w@v.T, user@localhost, @decorator, 50@2x.p"),
        ("ip 8.8.8.8, and 93.184.216.34.", "ip [IP_ADDRESS], and [IP_ADDRESS]."),
        ("127.0.0.1 10.1.2.3 192.168.0.1 192.0.2.7 0.0.0.0", "127.0.0.1 10.1.2.3 192.168.0.1 192.0.2.7 0.0.0.0"),
        (
            "1.2.3 1.2.3.4.5 256.1.1.1 v8.8.8.8 8.8.8.8.example.com",
            "1.2.3 1.2.3.4.5 256.1.1.1 v8.8.8.8 8.8.8.8.example.com",
        ),
        ("at 2606:4700:4700::1111, ::1, fe80::1, 12:34:56", "at [IP_ADDRESS], ::1, fe80::1, 12:34:56"),
        ("std::vector::size 01:23:45:67:89:ab", "std::vector::size 01:23:45:67:89:ab"),
        ("card 4111 1111 1111 1111 and 378282246310005", "card [CREDIT_CARD] and [CREDIT_CARD]"),
        ("card 4111 1111 1111 1112, 0.4111111111111111", "card 4111 1111 1111 1112, 0.4111111111111111"),
        ("1234567890123456789012345678", "1234567890123456789012345678"),
        ("call +49 (0)30 901820 or +14155552671", "call [PHONE_NUMBER] or [PHONE_NUMBER]"),
        ("call (415) 555-2671 or 415-555-2671", "call [PHONE_NUMBER] or [PHONE_NUMBER]"),
        ("2024-01-15 1+1234567 555-2671 115-555-2671", "2024-01-15 1+1234567 555-2671 115-555-2671"),
    ],
)
def test_personal_data(text, expected):
    masked, counts = mask_personal_data(text, MASKS)
    assert masked == expected
    placeholders = {kind: expected.count(f"[{kind.upper()}]") for kind in MASKS}
    assert counts == {kind: number for kind, number in placeholders.items() if number}
    assert mask_personal_data(text, ()) == (text, {})


def test_luhn_finds_every_wrong_digit():
    for number in ("4111111111111111", "5500005555555559", "340000000000009", "6011000000000004"):
        assert luhn_valid(number)
        wrong = [number[:i] + d + number[i + 1 :] for i in range(len(number)) for d in "0123456789" if d != number[i]]
        assert not any(map(luhn_valid, wrong))


def test_hostile_text_takes_linear_time():
    """Ten times the text, about ten times the time: no pattern walks back and forth."""
    for piece in (
        "a.",
        "a@",
        "1",
        "1.",
        "a:",
        "+1 ",
        "(",
        "[",
        " ",
        "\t ",
        "ab@c.",
        "4 ",
        "...",
        "\u0301",
        "<",
        "</",
        "http://a.",
    ):
        times = []
        for size in (20_000, 200_000):
            start = time.process_time()
            text = normalize(piece * (size // len(piece)))
            mask_personal_data(text, MASKS)
            WordList(["x y"]).find(text)
            times.append(time.process_time() - start)
        assert times[1] < 40 * times[0] + 0.3, (piece, times)


def test_word_list():
    words = WordList(["Foul", "two words", "坏", "don't", "  "])
    assert words.find("a FOUL\nmouth") == "foul" and words.find("fouled foulness befoul") is None
    assert words.find("Two... words") == "two words" and words.find("two such words") is None
    assert words.find("这是坏的") == "坏" and words.find("这是好的") is None
    assert words.find("Don't") == "don t" and words.find("done") is None
    with pytest.raises(Dropped, match="word list"):
        words.check("foul")


def test_url_list():
    urls = UrlList(["Bad.example.", "https://good.example/spam/", "example.co:8080"])
    for url in ("http://bad.example", "https://a.b.bad.example:80/x?y#z", "bad.example/x", "HTTP://BAD.EXAMPLE/"):
        assert urls.find(url) == "bad.example"
    assert urls.find("http://good.example/spam/and/eggs") == "good.example/spam"
    assert urls.find("http://example.co/") == "example.co"
    for url in (
        "http://good.example/",
        "http://good.example/spammer",
        "http://xbad.example/",
        "http://[::1",
        "",
        "::::",
    ):
        assert urls.find(url) is None
    urls.check(None)
    with pytest.raises(Dropped, match="URL list"):
        urls.check("http://bad.example/")


def test_decontamination_finds_thirteen_words_and_no_fewer():
    words = next(document.text for document in builtin("python") if document.source.endswith("argparse.py")).split()
    text = " ".join(word for word in words if word.isalpha())[:3000].split()
    evaluation = text[40:60]
    check = Decontaminator([" ".join(evaluation)])
    noise = [f"noise{i}" for i in range(200)]
    for start in range(8):
        shared = evaluation[start : start + 13]
        changed = " ".join([*noise[:50], *shared, *noise[50:]]).upper().replace(" ", " ,. ")
        assert check.find(changed) == " ".join(shared).lower()
        assert check.find(" ".join([*noise[:50], *shared[:12], *noise[50:]])) is None
    shuffled = random.Random(0).sample(evaluation, len(evaluation))
    assert check.find(" ".join(shuffled)) is None


def test_short_evaluation_texts_must_occur_whole():
    check = Decontaminator(["what is the capital city of France today", "too short to search", ""])
    assert check.num_ngrams == 1
    assert check.find("Well: what is the capital city of France, today?") == "what is the capital city of france today"
    assert check.find("what is the capital city of France now") is None
    assert check.find("too short to search") is None


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    monkeypatch.delitem(sys.modules, "resiliparse.extract.html2text", raising=False)
    monkeypatch.delitem(sys.modules, "resiliparse.extract", raising=False)
    with pytest.raises(
        ImportError, match=r"extraction of text from HTML must find the package resiliparse \(pip install"
    ):
        packages.require("resiliparse.extract.html2text", "extraction of text from HTML")
