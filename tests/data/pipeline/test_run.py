"""The whole pipeline: the same result however it is run, what it reports, and bad input that leaves nothing behind."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arfast.data import DatasetManifest, MixtureDataset, PackedDataset, Tokenizer, builtin, prepare_dataset
from arfast.data.pipeline import Recipe, prepare_corpus, run, stages
from arfast.data.pipeline import tokenize as tokenize_module
from arfast.data.pipeline.privacy import mask_personal_data

PAGES = Path(__file__).with_name("pages")
LENIENT = {"gopher": {"min_words": 20}, "fineweb": None, "c4": None, "repetition": None}


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def dropped(report, stage):
    return {reason: entry["documents"] for reason, entry in report["stages"][stage]["dropped"].items()}


def test_report_tells_what_was_dropped_and_why(prepared, folder):
    report = prepared.report
    assert json.loads((prepared.path / "report.json").read_text()) == report
    assert (prepared.path / "report.txt").read_text() == prepared.table
    assert dropped(report, "safety") == {"URL list": 1, "word list": 1}
    assert dropped(report, "decontamination") == {"evaluation text": 1}
    assert dropped(report, "exact copies") == {"like another document": 1}
    assert dropped(report, "near-copies") == {"like another document": 2}  # near.py, and an untranslated page
    assert report["stages"]["personal data"]["counts"]["email"] >= 1
    languages = report["stages"]["language"]["counts"]
    assert {"en", "de", "ja", "ru", "code"} <= set(languages) and languages["code"] == 27
    examples = report["stages"]["near-copies"]["dropped"]["like another document"]["examples"]
    assert [Path(example["source"]).name for example in examples] == ["sect.knoppix.html", "near.py"]
    assert examples[0]["detail"].endswith("en-US/sect.knoppix.html") and examples[1]["detail"].endswith("04.py")
    assert "code/picture.py" in report["notes"][0] and "left out 1 files that are not text" in report["notes"][0]
    for text in ("near-copies", "URL list", "lines.jsonl:4", "code/picture.py", "holds 'forbidden'"):
        assert text in prepared.table
    assert "somebody@example.org" not in prepared.table


def test_documents_and_bytes_add_up(prepared):
    previous = None
    for name, stage in prepared.report["stages"].items():
        gone = sum(entry["documents"] for entry in stage["dropped"].values())
        assert stage["documents_in"] == stage["documents_out"] + gone
        if previous:
            assert stage["documents_in"] == previous["documents_out"], name
            assert stage["bytes_in"] == previous["bytes_out"], name
        previous = stage
    splits = [split for source in prepared.report["sources"] for split in source["splits"].values()]
    assert previous["documents_out"] == sum(split["documents"] for split in splits)
    assert previous["bytes_out"] == sum(split["bytes"] for split in splits)


def test_data_sets_are_those_of_prepare_dataset(prepared, folder, make_recipe):
    """They train, and their text is what the stages made of the sources: here of code, which they leave as it is."""
    tokenizer = Tokenizer.load(prepared.path / "code")
    data = PackedDataset(prepared.path / "code", "train", 64)
    assert data.batch(0, 2).input_ids.shape == (2, 64)
    kinds = make_recipe(folder).safety.mask
    texts = {mask_personal_data(path.read_text(), kinds)[0] for path in (folder / "code").glob("[0-9]*.py")}
    manifest, found = DatasetManifest.load(prepared.path / "code"), set()
    for split in manifest.splits:
        for shard in manifest.open_split(split):
            found |= {tokenizer.decode(tokens) for tokens in shard.documents()}
    assert found == texts
    same = prepare_dataset(folder / "code", prepared.path.parent / "plain", tokenizer)
    assert set(same.splits) == set(manifest.splits) and same.recipe.keys() == manifest.recipe.keys()
    assert {(prepared.path / name / "tokenizer.json").read_bytes() for name in ("web", "code", "lines")} == {
        (prepared.path / "code" / "tokenizer.json").read_bytes()
    }


def test_names_that_are_no_unicode(tmp_path):
    """Bytes of a file name that are no UTF-8, of a file of text and of one that is none; half a surrogate in JSON."""
    folder = tmp_path / "in"
    folder.mkdir()
    documents = [document for document in builtin("python") if 2000 < len(document.text) < 9000][:40]
    for number, document in enumerate(documents):
        (folder / f"{number}.py").write_text(document.text)
    os.rename(folder / "0.py", os.path.join(os.fsencode(folder), b"caf\xe9.py"))
    Path(os.fsdecode(os.path.join(os.fsencode(folder), b"\xff.py"))).write_bytes(b"\0\xff")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": d.text + "#", "url": "a\ud800"}) + "\n" for d in documents))
    sources = [
        {"name": "code", "path": str(folder), "kind": "code"},
        {"name": "lines", "path": str(lines), "kind": "code", "url_field": "url"},
    ]
    recipe = Recipe.from_json({"sources": sources, "deduplication": {"near": False}})
    prepared = prepare_corpus(recipe, tmp_path / "out", workers=2)
    assert prepared.report["stages"]["reading"]["documents_in"] == 2 * len(documents)
    assert "\\udcff.py" in prepared.report["notes"][0]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_result_for_any_number_of_workers_and_order_of_files(
    prepared, folder, tmp_path, monkeypatch, workers, make_recipe
):
    walk, generator = os.walk, random.Random(workers)

    def shuffled_walk(*arguments, **options):
        for root, folders, names in walk(*arguments, **options):
            generator.shuffle(names)
            generator.shuffle(folders)
            yield root, folders, names

    monkeypatch.setattr(os, "walk", shuffled_walk)
    again = prepare_corpus(make_recipe(folder), tmp_path / "corpus", workers=workers)
    assert contents(again.path) == contents(prepared.path)
    assert sorted(os.listdir(tmp_path)) == ["corpus"]


def test_complete_result_is_reused(prepared, folder, monkeypatch, make_recipe):
    before = contents(prepared.path)
    monkeypatch.setattr(stages.Stages, "clean", None)
    again = prepare_corpus(make_recipe(folder), prepared.path)
    assert again.report == prepared.report and again.seconds == {} and contents(prepared.path) == before
    with pytest.raises(
        ValueError, match="prepare: output_dir must be empty or hold the same, got another recipe or other"
    ):
        prepare_corpus(make_recipe(folder, normalization="NFKC"), prepared.path)
    with open(folder / "code" / "00.py", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="must be empty or hold the same, got another recipe or other documents in"):
        prepare_corpus(make_recipe(folder), prepared.path)
    text = (folder / "code" / "00.py").read_text()
    (folder / "code" / "00.py").write_text(text.removesuffix("\n"))
    shard = prepared.path / "code" / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match="Shard: .* must have the content that its header names"):
        prepare_corpus(make_recipe(folder), prepared.path)
    shard.write_bytes(content)


STEPS = ["clean", "drop_duplicates", "learn_tokenizer", "tokenize"]


@pytest.mark.parametrize("step", range(1, 4))
def test_finished_stages_are_not_done_again(prepared, folder, tmp_path, monkeypatch, step, make_recipe):
    def fail(*arguments):
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, STEPS[step], fail)
        with pytest.raises(RuntimeError, match="stop"):
            prepare_corpus(make_recipe(folder), tmp_path / "corpus")
    assert sorted(os.listdir(tmp_path)) == [".corpus.prepare"]
    resumed = prepare_corpus(make_recipe(folder), tmp_path / "corpus")
    done = {
        "clean": "clean",
        "drop_duplicates": "exact copies",
        "learn_tokenizer": "learn tokenizer",
        "tokenize": "tokenize web",
    }
    assert [done[name] in resumed.seconds for name in STEPS] == [number >= step for number in range(4)]
    assert contents(resumed.path) == contents(prepared.path) and os.listdir(tmp_path) == ["corpus"]


def test_finished_parts_and_shards_are_not_made_again(prepared, folder, tmp_path, monkeypatch, make_recipe):
    made = []
    write = stages.Parts.write

    def stop_after(number):
        def spy(self, *arguments):
            made.append(arguments[0])
            if len(made) > number:
                raise KeyboardInterrupt
            write(self, *arguments)

        return spy

    for number in (3, 8, 1000):
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(stages.Parts, "write", stop_after(number))
            if number < 1000:
                with pytest.raises(KeyboardInterrupt):
                    prepare_corpus(make_recipe(folder), tmp_path / "corpus")
            else:
                resumed = prepare_corpus(make_recipe(folder), tmp_path / "corpus")
    assert made[0] == 11 and contents(resumed.path) == contents(prepared.path)


def test_shards_continue_where_a_run_stopped(folder, tmp_path, monkeypatch, make_recipe):
    monkeypatch.setattr(tokenize_module, "_MAX_SHARD_TOKENS", 3000)
    monkeypatch.setattr(tokenize_module, "_BATCH_CHARACTERS", 4000)
    expected = prepare_corpus(make_recipe(folder), tmp_path / "expected")
    assert len(list(expected.path.glob("code/train-*.bin"))) > 5
    encode, calls = Tokenizer.encode_batch, []

    def spy(self, texts, **options):
        calls.append(texts)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(make_recipe(folder), tmp_path / "corpus")
    first = list(calls)
    resumed = prepare_corpus(make_recipe(folder), tmp_path / "corpus")
    assert contents(resumed.path) == contents(expected.path)
    whole = sum(len(texts) for texts in calls)
    documents = sum(split["documents"] for s in expected.report["sources"] for split in s["splits"].values())
    assert whole < documents + sum(map(len, first)) / 2


def test_source_that_changes_between_runs(prepared, folder, tmp_path, monkeypatch, make_recipe):
    """Parts of blocks that are no longer the same are made again."""
    shutil.copytree(folder, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "drop_duplicates", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_corpus(make_recipe(tmp_path / "s"), tmp_path / "corpus")
    path = tmp_path / "s" / "code" / "05.py"
    path.write_text(path.read_text() + "# more\n")
    changed = prepare_corpus(make_recipe(tmp_path / "s"), tmp_path / "corpus")
    fresh = prepare_corpus(make_recipe(tmp_path / "s"), tmp_path / "fresh")
    assert contents(changed.path) == contents(fresh.path)
    assert changed.report["content_sha256"] != prepared.report["content_sha256"]


def test_one_source_is_a_data_set(tmp_path):
    recipe = Recipe.from_json(
        {"sources": [{"name": "all", "path": str(PAGES)}], "quality": LENIENT, "tokenizer": {"vocab_size": 300}}
    )
    corpus = prepare_corpus(recipe, tmp_path / "data")
    DatasetManifest.load(corpus.path).verify()
    assert json.loads((corpus.path / "mixture.json").read_text())["sources"][0]["data"] == "."


def test_filters_by_language_and_file_ending(tmp_path, folder):
    sources = [{"name": "web", "path": str(folder), "suffixes": [".html"]}]
    keep = {"keep": ["de", "ja"], "identify": ["detect"]}
    recipe = Recipe.from_json(
        {
            "sources": sources,
            "language": keep,
            "quality": LENIENT,
            "tokenizer": {"vocab_size": 300},
            "split": {"validation_fraction": 0.0, "test_fraction": 0.0},
        }
    )
    report = prepare_corpus(recipe, tmp_path / "data").report
    assert report["stages"]["reading"]["documents_in"] == 12 and report["stages"]["language"]["documents_out"] == 2
    assert dropped(report, "language") == {"language en": 9, "language ru": 1}


def mixture_recipe(make_recipe, folder, **mixture):
    sources = [
        {"name": "code", "path": str(folder / "code"), "fraction": 0.25},
        {"name": "lines", "path": str(folder / "lines.jsonl"), "fraction": 0.75},
    ]
    return make_recipe(folder, sources=sources, mixture=mixture)


def test_mixture(folder, tmp_path, make_recipe):
    corpus = prepare_corpus(mixture_recipe(make_recipe, folder), tmp_path / "a")
    training = MixtureDataset.load(corpus.path / "mixture.json", "train", seqlen=16)
    assert training.names == ["code", "lines"] and training.fractions == [0.25, 0.75]
    assert training.batch(0, 8).input_ids.shape == (8, 16)
    mixture = corpus.report["mixture"]
    code, lines = mixture["sources"]
    assert (code["fraction"], lines["fraction"]) == (0.25, 0.75) and lines["epochs"] == pytest.approx(1, abs=1e-3)
    assert mixture["num_tokens"] == int(lines["num_tokens"] / 0.75) and code["epochs"] < 1
    wanted = 2 * mixture["num_tokens"]
    with pytest.raises(
        ValueError, match=rf"prepare: mixture.num_tokens must be at most {wanted // 2}, got {wanted}: 'lines' has"
    ):
        prepare_corpus(mixture_recipe(make_recipe, folder, num_tokens=wanted), tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == [".b.prepare", "a"]
    # The data sets are ready: another mixture of them takes no time.
    assert (
        prepare_corpus(mixture_recipe(make_recipe, folder, num_tokens=wanted, max_epochs=2), tmp_path / "b").seconds
        == {}
    )


def test_given_tokenizer(folder, tmp_path, prepared, make_recipe):
    recipe = make_recipe(folder, tokenizer={"path": str(prepared.path / "web")})
    assert prepare_corpus(recipe, tmp_path / "a").report["content_sha256"] == prepared.report["content_sha256"]


def test_accidents(folder, tmp_path):
    """Killed at random and at each call that changes the disk, and a full disk: see run_faults.py."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("run_faults.py")), str(folder), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif("ARFAST_HANDBOOK" not in os.environ, reason="ARFAST_HANDBOOK names no folder")
def test_the_whole_handbook(tmp_path, monkeypatch):
    """The Debian package debian-handbook: ARFAST_HANDBOOK=/usr/share/doc/debian-handbook/html."""
    monkeypatch.undo()
    sources = [
        {"name": "web", "path": os.environ["ARFAST_HANDBOOK"], "suffixes": [".html"]},
        {"name": "code", "path": "builtin:python"},
    ]
    recipe = Recipe.from_json({"sources": sources, "language": {"identify": ["detect"]}})
    found = [prepare_corpus(recipe, tmp_path / str(n), workers=n) for n in (1, 2)]
    assert contents(found[0].path) == contents(found[1].path)
    print(found[0].table)
    report = found[0].report
    assert report["stages"]["reading"]["documents_in"] == 26 * 127 + len(builtin("python"))
    assert report["stages"]["near-copies"]["documents_out"] < report["stages"]["near-copies"]["documents_in"]
    assert run.PreparedCorpus is type(found[0])
