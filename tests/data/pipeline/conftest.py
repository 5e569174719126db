"""Real pages and code with planted faults, a recipe for them, and the result."""

import json
import shutil
from pathlib import Path

import pytest

from arfast.data import builtin
from arfast.data.pipeline import Recipe, prepare_corpus, source

PAGES = Path(__file__).with_name("pages")
LENIENT = {"gopher": {"min_words": 20}, "fineweb": None, "c4": None, "repetition": None}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_CHARACTERS", 20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real pages and code, with planted copies, near-copies, secrets, bad files and evaluation text."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copytree(PAGES, root / "pages")
    # Tables of encodings are like one another.
    documents = [d for d in builtin("python") if len(d.text) > 3000 and "encodings" not in d.source][::12]
    (root / "code").mkdir()
    for number, document in enumerate(documents[:25]):
        (root / "code" / f"{number:02d}.py").write_text(document.text[:6000])
    (root / "code" / "copy.py").write_text(documents[3].text[:6000])
    (root / "code" / "near.py").write_text(documents[4].text[:6000].replace("return", "RETURN", 1) + "\n# the end\n")
    (root / "code" / "picture.py").write_bytes(b"\xff\xfe\x00")
    lines = []
    texts = [" ".join([word for word in d.text.split() if word.isalpha()][:250]) for d in builtin("python")[1::9]]
    for number, prose in enumerate([text for text in texts if text.count(" ") > 100][:25]):
        lines.append(
            {"text": f"The text of number {number} to read. {prose}", "lang": "en", "url": f"http://h{number}.example/"}
        )
    lines[2]["text"] += " Write to somebody@example.org or call +49 30 901820 today."
    lines[3]["url"] = "https://www.blocked.example/page"
    lines[4]["text"] += " and a forbidden word"
    lines[5]["lang"] = "xx"
    (root / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "words.txt").write_text("# words\nforbidden\n")
    (root / "urls.txt").write_text("blocked.example\n")
    (root / "evaluation.txt").write_text(" ".join(lines[6]["text"].split()[20:50]))
    return root


@pytest.fixture(scope="session")
def make_recipe():
    """make_recipe(folder, **changes): the recipe of the folder's three sources, with other sections if given."""

    def make(folder, **changes):
        value = {
            "sources": [
                {"name": "web", "path": str(folder / "pages")},
                {"name": "code", "path": str(folder / "code")},
                {"name": "lines", "path": str(folder / "lines.jsonl"), "language_field": "lang", "url_field": "url"},
            ],
            "quality": LENIENT,
            "safety": {"word_list": str(folder / "words.txt"), "url_list": str(folder / "urls.txt")},
            "decontamination": {"evaluation": [str(folder / "evaluation.txt")]},
            "tokenizer": {"vocab_size": 400},
        }
        return Recipe.from_json(value | changes)

    return make


@pytest.fixture(scope="module")
def prepared(folder, make_recipe, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_BLOCK_CHARACTERS", 20_000)
        return prepare_corpus(make_recipe(folder), tmp_path_factory.mktemp("out") / "corpus")
