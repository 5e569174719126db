"""Checkpoint directories: complete or absent, damage is noticed, one writer, nothing foreign is touched."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
import textwrap

import pytest
from train_doubles import content, save, write_files

from arfast.train import checkpoint as ckpt
from arfast.train.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, save_checkpoint, verify


def test_round_trip(tmp_path):
    path = save(tmp_path, 12)
    assert path == tmp_path / "step-00000012"
    manifest = verify(path)
    assert manifest["step"] == 12
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: len(data) for name, data in content(path).items() if name != "manifest.json"
    }
    assert os.listdir(tmp_path) == ["step-00000012"]


def test_order_of_synchronisation(tmp_path, monkeypatch):
    """Data before the manifest, the manifest before its directory, all of it before the rename, the rename after."""
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(("rename", os.path.basename(target)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 1)
    kinds = [(kind, re.sub(r"tmp-\w+", "tmp", name)) for kind, name in events]
    assert kinds == [
        ("fsync", "model.safetensors"),
        ("fsync", "state.json"),
        ("fsync", "manifest.json"),
        ("fsync", "step-00000001.tmp"),
        ("rename", "step-00000001"),
        ("fsync", tmp_path.name),
    ]


def test_latest_is_by_number(tmp_path):
    for step in (5, 123_456_789, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000999.tmp-0123456789abcdef").mkdir()
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-99999999").write_text("a file")
    (tmp_path / "step-88888888").symlink_to(tmp_path / "step-00000005")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000020", "step-123456789"]
    assert latest_checkpoint(tmp_path).name == "step-123456789"


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_same_step_replaces(tmp_path):
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, 1, write_files(2))
    assert json.loads((path / "state.json").read_text()) == {"step": 2}
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_damage_falls_back_with_one_sentence_each(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    (paths[2] / "model.safetensors").unlink()
    (paths[1] / "state.json").write_bytes(b"{}")
    reports = []
    assert latest_checkpoint(tmp_path, reports.append) == paths[0]
    assert len(reports) == 2
    assert "step-00000003/model.safetensors must exist" in reports[0]
    assert "step-00000002/state.json must have 11 bytes, got 2" in reports[1]
    (paths[0] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="must hold an undamaged checkpoint, got 3 damaged"):
        latest_checkpoint(tmp_path, reports.append)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_never_saves_over_something_else(tmp_path, kind):
    target = tmp_path / "step-00000001"
    (tmp_path / "elsewhere").mkdir()
    target.write_text("mine") if kind == "file" else target.symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="must be a directory or absent"):
        save(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("bad", ["sub/", ".hidden", "with space", "new\nline"])
def test_names_of_written_files_are_checked(tmp_path, bad):
    def write(directory):
        (directory / bad).mkdir() if bad.endswith("/") else (directory / bad).write_text("")

    with pytest.raises(CheckpointError, match="must be a regular file|file names must match"):
        save_checkpoint(tmp_path, 1, write)
    assert os.listdir(tmp_path) == []


def test_exception_of_the_writer_leaves_nothing(tmp_path):
    def write(directory):
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, write)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_refused_before_writing(tmp_path):
    def write(directory):
        raise AssertionError("nothing may be written")

    with pytest.raises(CheckpointError, match=rf"step-00000001 must find {2**60} bytes free on its disk, got \d+"):
        save_checkpoint(tmp_path, 1, write, num_bytes=2**60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 100, 1999, 2000, 2500])
def test_full_disk(tmp_path, limit):
    """RLIMIT_FSIZE makes every write beyond `limit` fail, of safetensors as of Python."""
    before = content(save(tmp_path, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002 must be writable and needs \d+ bytes, got .+ free"):
            save(tmp_path, 2, num_bytes=3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert content(tmp_path / "step-00000001") == before
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_failing_system_calls(tmp_path, monkeypatch, call, number):
    save(tmp_path, 1)
    real = getattr(os, call)
    for nth in range(10):
        calls = 0

        def failing(*args, nth=nth, **options):
            nonlocal calls
            calls += 1
            if calls == nth + 1:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save(tmp_path, 2)
            except CheckpointError as error:
                assert os.strerror(number) in str(error)
        # A failure after the rename (of the parent's fsync, of reading back) leaves a complete checkpoint.
        assert {path.name for path in tmp_path.iterdir()} <= {"step-00000001", "step-00000002"}
        assert latest_checkpoint(tmp_path) is not None
        if calls <= nth:
            break
    else:
        pytest.fail(f"more than 10 calls of os.{call}")
    assert nth > 0


def test_lock_refuses_a_second_writer(tmp_path):
    program = "from arfast.train.checkpoint import *\nimport sys\nwith lock_directory(sys.argv[1]): print('locked')"
    run = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with ckpt.lock_directory(tmp_path):
        with pytest.raises(CheckpointError, match="must be used by one trainer"), ckpt.lock_directory(tmp_path):
            pass
        refused = subprocess.run(run, capture_output=True, text=True)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].endswith("got " + str(tmp_path) + " that another one holds")
    with ckpt.lock_directory(tmp_path):
        pass


def test_lock_makes_the_directory_and_names_what_is_wrong(tmp_path):
    with ckpt.lock_directory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/below"):
        with pytest.raises(CheckpointError, match="must be writable, got"), ckpt.lock_directory(tmp_path / wrong):
            pass


def test_lock_passes_exceptions_on(tmp_path):
    with pytest.raises(BlockingIOError), ckpt.lock_directory(tmp_path):
        raise BlockingIOError


def test_stale_temporaries_are_removed_and_nothing_else(tmp_path):
    stale = ["step-00000001.tmp-0123456789abcdef", "final.tmp-0123456789abcdef"]
    kept = ["step-00000001.tmp-mine", "final", "notes.tmp-0123456789abcdef", "step-00000001.damaged-01234567"]
    for name in stale + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "step-00000002.tmp-0123456789abcdef").symlink_to(tmp_path / "final")
    (tmp_path / ".metrics.jsonl.tmp-01234567").write_text("")
    with ckpt.lock_directory(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "step-00000002.tmp-0123456789abcdef"])
    assert (tmp_path / "final" / "file").exists()


def test_prune(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    ckpt.prune(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 5
    ckpt.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]
    ckpt.prune(tmp_path, 7)
    assert len(list_checkpoints(tmp_path)) == 2


def test_numbers_are_checked(tmp_path):
    for step in (-1, 1.0, "1"):
        with pytest.raises(CheckpointError, match=f"step must be an integer >= 0, got {step!r}"):
            save_checkpoint(tmp_path, step, write_files(1))
    with pytest.raises(CheckpointError, match="keep_last must be >= 0, got -1"):
        ckpt.prune(tmp_path, -1)


def test_set_aside_damaged(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    ckpt.set_aside_damaged(tmp_path, paths[0])
    assert list_checkpoints(tmp_path) == paths[:1]
    names = os.listdir(tmp_path)
    assert len([name for name in names if re.fullmatch(r"step-0000000[23]\.damaged-[0-9a-f]{8}", name)]) == 2


def test_publish(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier run")
    ckpt.publish(path, tmp_path, ["model.safetensors", "state.json"])
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "state.json", "step-00000001"]
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    # People edit a config.json; that must not change the checkpoint.
    (tmp_path / "state.json").write_text("edited")
    verify(path)


def test_publish_removes_weights_of_another_layout(tmp_path):
    path = save(tmp_path, 1)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.txt"):
        (tmp_path / name).write_text("old")
    ckpt.publish(path, tmp_path, ["model.safetensors"])
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "model.txt", "step-00000001"]


def test_publish_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = save(tmp_path, 1)
    ckpt.publish(path, tmp_path, ["model.safetensors"])
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_publish_refuses_before_it_replaces(tmp_path, kind):
    path = save(tmp_path, 1)
    target = tmp_path / "state.json"
    target.mkdir() if kind == "directory" else target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="state.json must be a regular file, got"):
        ckpt.publish(path, tmp_path, ["model.safetensors", "state.json"])
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "elsewhere").exists()
