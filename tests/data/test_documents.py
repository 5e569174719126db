"""Reading documents: files, JSON lines, directories, the built-in corpus, and an error for each bad input."""

import os
import random
import sysconfig
from pathlib import Path

import pytest

from arfast.data import Document, builtin, documents, read_documents, records


def texts(source):
    return [document.text for document in read_documents(source)]


def test_directory(tmp_path):
    files = {
        "b.txt": "second",
        "a/z.md": "first\r\n\tend  ",
        "c.jsonl": '{"text": "third", "id": 1}\n\n{"text": "fourth"}',
    }
    files |= {".hidden": "no", ".git/config": "no", "empty.txt": "", "blank.txt": " \n\t"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    os.mkfifo(tmp_path / "pipe")
    found = list(read_documents(tmp_path))
    expected = [("first\r\n\tend  ", "a/z.md"), ("second", "b.txt"), ("third", "c.jsonl:1"), ("fourth", "c.jsonl:3")]
    assert found == [Document(text, f"{tmp_path}/{source}") for text, source in expected]


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{number}.txt" for number in range(50)]
    for name in random.Random(0).sample(names, 50):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == sorted(names)


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    assert texts(tmp_path) == ["one\ufeff", "two"]


@pytest.mark.parametrize("alphabet", ["ab \n", "aé世🌍\n", "世界"])
@pytest.mark.parametrize("size", [10, 3000, 100_000])
def test_lone_file_is_cut_without_loss(tmp_path, alphabet, size):
    """With and without ends of lines, and with characters of several bytes at the cuts."""
    text = "".join(random.Random(size).choices(alphabet, k=size))
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = texts(tmp_path / "a.txt")
    assert "".join(pieces) == text
    if size == 100_000:
        assert len(pieces) > 10
        assert max(len(piece.encode()) for piece in pieces) <= 4 * 4096 + 4096


def test_a_lone_file_in_a_directory_is_cut_too(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 10_000)
    assert len(texts(tmp_path)) > 1
    (tmp_path / "b.txt").write_text("another")
    assert len(texts(tmp_path)) == 2


def test_cuts_stay_where_they_are(tmp_path):
    """Text added in front moves no cut behind it, so that the pieces keep their splits."""
    generator = random.Random(0)
    lines = ["".join(generator.choices("abcdef ", k=generator.randrange(5, 90))) + "\n" for _ in range(6000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt").write_text("new first line\n" * 20 + "".join(lines))
    before, after = texts(tmp_path / "a.txt"), texts(tmp_path / "b.txt")
    assert len(before) > 50 and len(set(before) - set(after)) <= 2


def test_large_files_of_a_directory_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_MAX_WHOLE_BYTES", 10_000)
    (tmp_path / "a.txt").write_text("a line of text\n" * 600)
    (tmp_path / "b.txt").write_text("another line of text\n" * 600)
    found = list(read_documents(tmp_path))
    assert found[0].source.endswith("a.txt")
    assert len(found) > 2 and all("b.txt#" in document.source for document in found[1:])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "source must hold text, got only empty ones in .*bad.txt'"),
        (b" \n", "source must hold text, got only empty ones in .*bad.txt'"),
        (b"text\xff", "bad.txt' must be UTF-8 text, got invalid start byte near byte 0"),
        (b"text \xe4\xb8", "bad.txt' must be UTF-8 text, got unexpected end of data near byte 7"),
        (b"x" * 9000 + b"\n\xff", "bad.txt' must be UTF-8 text, got invalid start byte near byte 9001"),
        (b"\x7fELF\0\0", "bad.txt' must be UTF-8 text, got a NUL near byte 0"),
        ("utf-16".encode("utf-16"), "bad.txt' must be UTF-8 text, got invalid start byte near byte 0"),
    ],
)
def test_bad_text_file(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match="^read_documents: .*" + message):
        texts(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"plain text", "be a JSON object with a string 'text' .*, got: Expecting value"),
        (b'{"body": "a"}', "be a JSON object with a string 'text' .*, got: dict with a 'text' of type NoneType"),
        (b'{"text": 3}', "be a JSON object with a string 'text' .*, got: dict with a 'text' of type int"),
        (b'["text"]', "be a JSON object with a string 'text' .*, got: list"),
        (b'{"text": "a\\ud800"}', "be a JSON object with a string 'text' .*, got: .*surrogates not allowed"),
        (b'{"text": "\xff"}', "be a JSON object with a string 'text' .*, got: .*invalid start byte"),
        (b"[" * 100_000, "be a JSON object with a string 'text' .*, got: maximum recursion depth"),
        (b'{"text": ' + b"9" * 5000 + b"}", "be a JSON object with a string 'text' .*, got: Exceeds the limit"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="^read_documents: line 2 of .*bad.jsonl' must " + message):
        texts(tmp_path / "bad.jsonl")


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    (tmp_path / "bad.jsonl").write_text('{"text": "' + "a" * 200)
    with pytest.raises(ValueError, match="line 1 of .* must hold at most 100 bytes, got more"):
        texts(tmp_path / "bad.jsonl")


def test_files_that_are_not_text_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    with pytest.warns(UserWarning, match="left out 2 files that are not text, first '.*a.png'"):
        assert texts(tmp_path) == ["text"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match="source must hold text, got 2 files that are not text in "):
        texts(tmp_path)


def test_a_file_of_a_directory_is_never_left_out_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_MAX_WHOLE_BYTES", 10_000)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"a line of text\n" * 3000 + b"\xff")
    with pytest.raises(ValueError, match="b.txt' must be UTF-8 text, got invalid start byte near byte 45000"):
        texts(tmp_path)


def test_bad_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_documents: source must exist, got '.*absent'"):
        texts(tmp_path / "absent")
    with pytest.raises(ValueError, match="read_documents: source must be a file or a directory, got '/dev/null'"):
        texts("/dev/null")
    with pytest.raises(ValueError, match="read_documents: source must hold text, got no file in "):
        texts(tmp_path)


def test_builtin_python():
    found = builtin("python")
    assert found == builtin("python")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [document.source.split("/", 1)[1] for document in found]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    for document, name in list(zip(found, names, strict=True))[::50]:
        assert document.text == (root / name).read_bytes().decode("utf-8-sig")
        assert document.source.startswith("python-3.")


def test_builtin_has_no_near_copies():
    """No file whose lines, but for a third, stand in the files before it."""
    known = set()
    for document in builtin("python"):
        lines = {line.strip() for line in document.text.splitlines()} - {""}
        assert len(lines & known) <= 0.7 * len(lines)
        known |= lines


def test_builtin_unknown():
    with pytest.raises(ValueError, match=r"builtin: name must be one of \['python'\], got 'c'"):
        builtin("c")


def test_builtin_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="builtin: name must be a corpus on this machine, got 'python' with no"):
        builtin("python")
