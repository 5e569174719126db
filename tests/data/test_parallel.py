"""Parallel text: pairs of lines, of Django's catalogues and of pages, cleaned, and split by their sources."""

import doctest
import os

import pytest

from arfast.data import DatasetManifest, Document, PackedDataset, Tokenizer, parallel, prepare_dataset
from arfast.data.parallel import Pair, django_pairs, handbook_pairs, pair_documents, read_pairs


def files(path, source: bytes, target: bytes):
    for name, content in (("a.en", source), ("a.de", target)):
        (path / name).write_bytes(content)
    return path / "a.en", path / "a.de"


def test_lines(tmp_path):
    """Line i with line i: other marks that some take for ends of lines are none."""
    found = read_pairs(*files(tmp_path, "\ufeffone\r\ntwo\u2028and\n\nthree".encode(), b"eins\nzwei\n-\ndrei\n"))
    assert found == [Pair("one\r", "eins"), Pair("two\u2028and", "zwei"), Pair("", "-"), Pair("three", "drei")]
    assert [d.text for d in pair_documents(found, "")] == ["one\neins", "two and\nzwei", "three\ndrei"]


@pytest.mark.parametrize(
    "source, target, message",
    [
        (b"one\ntwo\n", b"eins\n", "files must have equally many lines, got 2 in '.*a.en' and 1 in '.*a.de'"),
        (b"", b"eins\n", "'.*a.en' must hold lines of text, got 0 characters of none"),
        (b"one\n", b" \n\n", "'.*a.de' must hold lines of text, got 3 characters of none"),
        (b"one\n", b"eins \xff\n", "'.*a.de' must be UTF-8 text, got invalid start byte at byte 5"),
    ],
)
def test_bad_files(tmp_path, source, target, message):
    with pytest.raises(ValueError, match=f"^read_pairs: {message}$"):
        read_pairs(*files(tmp_path, source, target))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="^read_pairs: path must be a file, got '.*nothing'$"):
        read_pairs(tmp_path / "nothing", tmp_path / "nothing")


def test_what_is_left_out():
    long = "This is a long sentence about nothing that somebody wrote down."
    pairs = [
        Pair("  Save\n as ", "Speichern\tals"),
        Pair("Save as", "Sichern als"),  # came before
        Pair("Debian", "Debian"),  # not translated
        Pair("", "leer"),
        Pair("empty", " "),
        Pair(long, "Kurz."),
        Pair("OK", "In Ordnung so"),  # short texts may differ
        Pair(long, "ü" * 60),
    ]
    kept = pair_documents(pairs, "menu", max_bytes=150)
    assert [d.text for d in kept] == ["Save as\nSpeichern als", "OK\nIn Ordnung so"]
    assert [d.text[slice(*d.targets[0])] for d in kept] == ["Speichern als", "In Ordnung so"]
    assert {d.source for d in kept} == {"menu"} and len(pair_documents(pairs, "menu")) == 3


def test_a_source_is_on_one_side(tmp_path):
    """Two languages have the same split, and of one source the first translation alone is kept."""
    splits = []
    for language in ("a", "b"):
        pairs = [Pair(f"sentence {i}", f"{language} {i}") for i in range(200)]
        prepare_dataset(pair_documents(pairs, ""), tmp_path / language, tokenizer_kind="character", vocab_size=60)
        splits.append(texts_by_split(tmp_path / language))
    sources = [{split: [t.split("\n")[0] for t in texts] for split, texts in one.items()} for one in splits]
    assert sources[0] == sources[1] and all(len(texts) >= 5 for texts in sources[0].values())
    assert len(sum(sources[0].values(), [])) == 200
    documents = [Document(f"text {i}\n{j}", "", key=f"text {i}") for i in range(100) for j in range(2)]
    manifest = prepare_dataset(documents, tmp_path / "twice", vocab_size=270)
    assert sum(info.num_documents for info in manifest.splits.values()) == 100
    other = [Document(d.text + "!", "", key=d.key) for d in documents]
    with pytest.raises(ValueError, match="another corpus_sha256"):
        prepare_dataset(other, tmp_path / "twice", vocab_size=270)


def texts_by_split(path):
    tokenizer, manifest = Tokenizer.load(path), DatasetManifest.load(path)
    return {
        split: [tokenizer.decode(tokens) for shard in manifest.open_split(split) for tokens in shard.documents()]
        for split in manifest.splits
    }


def test_only_the_translation_is_a_target(tmp_path):
    pairs = [Pair(f"sentence {i}", f"Satz {i}") for i in range(100)]
    prepare_dataset(pair_documents(pairs, ""), tmp_path, vocab_size=280)
    tokenizer, data = Tokenizer.load(tmp_path), PackedDataset(tmp_path, "train", 64, "documents")
    batch = data.batch(0, 2)
    targets = tokenizer.decode(batch.labels[batch.labels >= 0], skip_special_tokens=False).split("<|end_of_text|>")
    assert len(targets) > 4 and targets.pop() == "" and all(text.startswith("Satz ") for text in targets)


def test_django():
    pytest.importorskip("django")
    for language, translation in (("de", "Januar"), ("fr", "janvier")):
        pairs = django_pairs(language)
        assert Pair("January", translation) in pairs
        assert len(pair_documents(pairs, language)) > 500
        assert not any("\4" in pair.source or not pair.target for pair in pairs)
    with pytest.raises(ValueError, match="^django_pairs: language must be one of af, .*, got 'xx'$"):
        django_pairs("xx")


PAGE = """<html><head><title>Not this</title></head><body><h1 class="title"><a id="x"></a>Chapter&nbsp;1. {0}</h1>
<div class="para">
    {1} <code>apt</code>.
    <div>{2}</div> <p>inner</p></div><ul><li>not this</li></ul><p>{3}</p></body></html>"""
ENGLISH = ("Tools", "The tool", "Good one. It is &amp; remains.", "same")
GERMAN = ("Werkzeuge", "Das Werkzeug", "Gut. Es ist &amp; bleibt.", "same")


def handbook(path, english=ENGLISH, german=GERMAN):
    for folder, texts in (("en-US", english), ("de-DE", german), ("pt-BR", english), ("pt-PT", english)):
        (path / folder).mkdir(parents=True)
        (path / folder / "page.html").write_text(PAGE.format(*texts))
    return path


def test_handbook(tmp_path):
    folder = handbook(tmp_path)
    (folder / "en-US" / "longer.html").write_text("<p>One.</p><p>Two.</p>")
    (folder / "de-DE" / "longer.html").write_text("<p>Eins.</p>")
    (folder / "en-US" / "missing.html").write_text("<p>One.</p>")
    documents = pair_documents(handbook_pairs(folder, "de"), "handbook")
    assert [document.text for document in documents] == [
        "Tools\nWerkzeuge",
        "The tool apt.\nDas Werkzeug apt.",
        "Good one.\nGut.",
        "It is & remains. inner\nEs ist & bleibt. inner",
    ]
    assert handbook_pairs(folder, "de-DE") == handbook_pairs(folder, "de")


def test_paragraphs_with_other_sentences_stay_whole(tmp_path):
    folder = handbook(tmp_path, german=("Werkzeuge", "Das Werkzeug", "Gut. So. Es ist.", "gleich"))
    texts = [document.text for document in pair_documents(handbook_pairs(folder, "de"), "")]
    expected = "The tool apt. Good one. It is & remains. inner\nDas Werkzeug apt. Gut. So. Es ist. inner"
    assert expected in texts and "same\ngleich" in texts


def test_bad_handbooks(tmp_path):
    with pytest.raises(ValueError, match="^handbook_pairs: folder must have a folder en-US, got '.*'$"):
        handbook_pairs(tmp_path, "de")
    folder = handbook(tmp_path)
    for language in ("fr", "pt", "en", "en-US", "."):
        with pytest.raises(ValueError, match=f"language must be one of de-DE, pt-BR, pt-PT, got '{language}'$"):
            handbook_pairs(folder, language)
    (folder / "de-DE" / "page.html").write_text("<p>other</p>")
    with pytest.raises(ValueError, match="'.*de-DE' must have pages like en-US, got none$"):
        handbook_pairs(folder, "de")
    (folder / "de-DE" / "page.html").write_bytes(b"<p>\xff</p>")
    with pytest.raises(ValueError, match="page.html' must be UTF-8 text, got invalid start byte$"):
        handbook_pairs(folder, "de")


@pytest.mark.skipif("ARFAST_HANDBOOK" not in os.environ, reason="ARFAST_HANDBOOK names no folder")
def test_the_real_handbook():
    """The Debian package debian-handbook: ARFAST_HANDBOOK=/usr/share/doc/debian-handbook/html."""
    for language in ("de", "fr"):
        documents = pair_documents(handbook_pairs(os.environ["ARFAST_HANDBOOK"], language), language)
        assert len(documents) > 4000


def test_examples():
    found = doctest.testmod(parallel)
    assert found.attempted > 0 and found.failed == 0
