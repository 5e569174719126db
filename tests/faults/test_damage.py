"""C2, C3: truncated, flipped, zeroed, swapped, mixed and edited files are all noticed, and the one before is taken."""

import json
import random

import pytest
from saving_runs import SavingRun
from train_doubles import TinyConfig, TinyLM, content

from arfast.train import checkpoint as ckpt
from arfast.train.checkpoint import CheckpointError, verify
from arfast.train.manifest import MANIFEST

BLOCK = 4096


@pytest.fixture
def run(memory_path):
    """Steps 1 and 2 on the disk, files of some hundred kilobytes."""
    run = SavingRun(memory_path / "run", model=TinyLM(TinyConfig(vocab_size=300, hidden_size=64)))
    run.save()
    return run


def assert_detected(directory, why):
    with pytest.raises(CheckpointError) as caught:
        verify(directory)
    assert "\n" not in str(caught.value), why


def assert_falls_back(run):
    reports = []
    assert ckpt.latest_checkpoint(run.root, reports.append) == run.paths[0]
    assert len(reports) == 1 and reports[0].endswith("; trying the checkpoint before it")


def pick(generator, files):
    """A file name, each byte of all files being as likely."""
    return generator.choices(list(files), [len(data) for data in files.values()])[0]


def test_truncations(run, amount, record):
    files, last = content(run.paths[1]), run.paths[1]
    points = [(name, length) for name, data in files.items() for length in range(0, len(data), 512)]
    assert len(points) > 500
    chosen = points[:: amount(11, 1)]
    for name, length in chosen:
        (last / name).write_bytes(files[name][:length])
        assert_detected(last, (name, length))
        (last / name).write_bytes(files[name])
    (last / MANIFEST).write_bytes(files[MANIFEST][:-1])
    assert_falls_back(run)
    record("C2", "each file truncated at each 512th byte", len(chosen), "all detected; the checkpoint before is taken")


def test_bit_flips(run, amount, record):
    files, last, generator = content(run.paths[1]), run.paths[1], random.Random(0)
    count = amount(300, 10_000)
    for number in range(count):
        # Every second one in a small file: nine of ten bytes are weights.
        name = pick(generator, files) if number % 2 else generator.choice(list(files))
        offset, bit = generator.randrange(len(files[name])), generator.randrange(8)
        flip(last / name, offset, bit)
        assert_detected(last, (name, offset, bit))
        flip(last / name, offset, bit)
    verify(last)
    flip(last / "model.safetensors", 5000, 3)
    assert_falls_back(run)
    record("C3", "a bit flipped in any file", count, "all detected; the checkpoint before is taken")


def flip(path, offset, bit):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("kind", ["zeroed", "swapped"])
def test_blocks(run, amount, record, kind):
    files, last, generator = content(run.paths[1]), run.paths[1], random.Random(1)
    large = {name: data for name, data in files.items() if len(data) > 2 * BLOCK}
    count = amount(40, 1000)
    for _ in range(count):
        name = pick(generator, large)
        data = bytearray(files[name])
        one, two = (generator.randrange(0, len(data) - BLOCK) for _ in range(2))
        if kind == "zeroed":
            data[one : one + BLOCK] = bytes(BLOCK)
        else:
            two = two if abs(one - two) >= BLOCK else (one + BLOCK) % (len(data) - BLOCK)
            first, second = data[one : one + BLOCK], data[two : two + BLOCK]
            data[one : one + BLOCK], data[two : two + BLOCK] = second, first
        assert data != files[name]
        (last / name).write_bytes(data)
        assert_detected(last, (name, one, two))
        (last / name).write_bytes(files[name])
    verify(last)
    record("C3", f"blocks of 4 KiB {kind}", count, "all detected")


def test_files_of_two_steps_mixed(run, amount, record):
    one, two, generator = content(run.paths[0]), content(run.paths[1]), random.Random(2)
    different = [name for name in two if one[name] != two[name]]
    count = amount(20, 200)
    for _ in range(count):
        chosen = generator.sample(different, generator.randint(1, len(different) - 1))
        target = generator.choice(run.paths)
        for name in chosen:
            (target / name).write_bytes((two if target == run.paths[0] else one)[name])
        assert_detected(target, chosen)
        for name in chosen:
            (target / name).write_bytes((one if target == run.paths[0] else two)[name])
    record("C3", "files of two steps mixed", count, "all detected")


def edits(manifest):
    """Ways to change the text of a manifest that a person might think of, none with a right checksum."""
    names = list(manifest["files"])
    for name in names:
        for key, value in (("size", manifest["files"][name]["size"] + 1), ("sha256", "0" * 64)):
            yield manifest | {"files": manifest["files"] | {name: manifest["files"][name] | {key: value}}}
        yield manifest | {"files": {other: manifest["files"][other] for other in names if other != name}}
    yield manifest | {"files": manifest["files"] | {"more.json": {"size": 0, "sha256": "0" * 64}}}
    for key, value in (
        ("step", 1),
        ("step", 3),
        ("version", 2),
        ("format", "x"),
        ("checksum", "0" * 64),
        ("files", {}),
    ):
        yield manifest | {key: value}
    for key in manifest:
        yield {other: value for other, value in manifest.items() if other != key}
    yield manifest | {"comment": "edited by hand"}


def test_edited_manifests(run, record):
    path, last = run.paths[1] / MANIFEST, run.paths[1]
    raw = path.read_bytes()
    variants = [json.dumps(edited, indent=1, sort_keys=True).encode() + b"\n" for edited in edits(json.loads(raw))]
    variants += [raw + b"\n", raw[:-1], raw.replace(b": ", b":", 1), b" " + raw, raw.replace(b"\n", b"\r\n"), raw + raw]
    for variant in variants:
        assert variant != raw
        path.write_bytes(variant)
        assert_detected(last, variant)
    path.write_bytes(raw)
    verify(last)
    record("C3", "the manifest edited by hand", len(variants), "all detected")
