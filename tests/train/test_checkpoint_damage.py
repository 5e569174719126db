"""Whatever happens to the bytes of a checkpoint is noticed before they are used."""

import json
import os
import re

import pytest
from train_doubles import content, save, write_files

from arfast.train.checkpoint import CheckpointError, save_checkpoint, verify
from arfast.train.manifest import _serialize


def is_detected(directory):
    try:
        verify(directory)
    except CheckpointError as error:
        assert re.fullmatch(r"checkpoint: .+ must .+, got .+", str(error))
        return True
    return False


def test_every_truncation_is_detected(tmp_path):
    path = save(tmp_path, 1)
    for name, data in content(path).items():
        for length in range(0, len(data), 7):
            (path / name).write_bytes(data[:length])
            assert is_detected(path), (name, length)
        (path / name).write_bytes(data + b"\0")
        assert is_detected(path), name
        (path / name).write_bytes(data)
    assert not is_detected(path)


def test_every_bit_flip_is_detected(tmp_path):
    """All 8 bits of every byte of the manifest, one bit of every byte of the other files."""
    path = save_checkpoint(tmp_path, 1, write_files(1, size=400))
    for name, data in content(path).items():
        for offset in range(len(data)):
            for bit in range(8) if name == "manifest.json" else (offset % 8,):
                flipped = bytearray(data)
                flipped[offset] ^= 1 << bit
                (path / name).write_bytes(flipped)
                assert is_detected(path), (name, offset, bit)
        (path / name).write_bytes(data)
    assert not is_detected(path)


def test_zeroed_and_swapped_blocks_are_detected(tmp_path):
    path = save_checkpoint(tmp_path, 1, write_files(1, size=16 * 4096))
    data = (path / "model.safetensors").read_bytes()
    blocks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    for i in range(len(blocks) - 1):
        zeroed = [*blocks[:i], bytes(len(blocks[i])), *blocks[i + 1 :]]
        swapped = [*blocks[:i], blocks[i + 1], blocks[i], *blocks[i + 2 :]]
        for changed in (zeroed, swapped):
            (path / "model.safetensors").write_bytes(b"".join(changed))
            assert is_detected(path)


def test_files_of_another_step_are_detected(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    original = content(two)
    for name, data in content(one).items():
        (two / name).write_bytes(data)
        assert is_detected(two), name
        (two / name).write_bytes(original[name])
    os.rename(one, tmp_path / "step-00000003")
    assert is_detected(tmp_path / "step-00000003")


def rewrite_manifest(path, change):
    """As somebody would who knows how the checksum is made."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    change(manifest)
    (path / "manifest.json").write_bytes(_serialize(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "must have version 1, got 2"),
        (lambda m: m.update(format="other"), "must be an unmodified manifest"),
        (lambda m: m.update(step=2), "must belong to step-00000001, got step 2"),
        (lambda m: m.update(step=None), "must belong to step-00000001, got step None"),
        (lambda m: m.update(files=[]), "must list files"),
        (lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}), "must list files"),
        (lambda m: m["files"].update({".hidden": {"size": 1, "sha256": ""}}), "must list files"),
        (lambda m: m["files"].update({"a/b": {"size": 1, "sha256": ""}}), "must list files"),
        (lambda m: m["files"].update({"state.json": {"size": "11", "sha256": ""}}), "must list files"),
        (lambda m: m["files"].update({"state.json": None}), "must list files"),
        (lambda m: m["files"].update({"more": {"size": 1, "sha256": ""}}), "more must exist"),
    ],
)
def test_hostile_manifest(tmp_path, change, message):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda m: None)
    verify(path)
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError, match=message):
        verify(path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b'{"checksum": 1}', b"[" * 10**5, b"\xff\xfe", b"1" * 5000])
def test_manifest_that_is_none(tmp_path, raw):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"must be an unmodified manifest, got {len(raw)} bytes"):
        verify(path)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_files_must_be_regular(tmp_path, name, kind):
    path = save(tmp_path, 1)
    moved = tmp_path / "moved"
    os.rename(path / name, moved)
    if kind == "link":
        (path / name).symlink_to(moved)
    elif kind == "directory":
        (path / name).mkdir()
    else:
        os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name} must be a regular file, got"):
        verify(path)
