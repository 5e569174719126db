"""C4, C9: disks that are full, broken, slow or read-only, and targets that are not what they should be."""

import ctypes
import errno
import os
import stat

import pytest
from saving_runs import SavingRun
from tracing import WRITES, Do
from train_doubles import TinyConfig, TinyLM, assert_same_outcome, content, make_trainer, outcome, write_files

from arfast.train import checkpoint as ckpt
from arfast.train.checkpoint import CheckpointError, save_checkpoint

BACKGROUND = pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
_CLONE_NEWNS, _MS_PRIVATE, _MS_REC, _MS_RDONLY, _MS_REMOUNT = 0x20000, 1 << 18, 1 << 14, 1, 32


def changes(run, traced, names=None):
    """Numbers and names of the calls of a save that change files; numbers count such calls only."""
    calls = []
    assert traced(run.save, lambda number, call: calls.append(call.name) if call.changes_files else None) == 0
    run.restore()
    return [(i, name) for i, name in enumerate(calls) if names is None or name in names]


def do_at(target, do, from_there_on=False):
    """A decision for `traced`: do this to the change of this number, or to every write from there on."""
    count = -1

    def decide(number, call):
        nonlocal count
        if not call.changes_files:
            return None
        count += 1
        hit = count >= target and call.name in (*WRITES, "ftruncate") if from_there_on else count == target
        return do if hit else None

    return decide


def refused_save(run):
    """The save must fail with one sentence that says which path, how many bytes it needs and how many are free."""

    def work():
        try:
            run.save()
        except CheckpointError as error:
            text = str(error)
            assert str(run.root) in text and "\n" not in text, text
            assert "bytes free" in text, text
            os._exit(7)

    return work


@BACKGROUND
def test_every_change_fails_once(memory_path, traced, amount, record, background):
    run = SavingRun(memory_path / "run", async_save=background)
    numbers = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
    points = [(i, name, number) for i, name in changes(run, traced) for number in numbers]
    chosen, committed = points[:: amount(7, 1)], 0
    for i, name, number in chosen:
        status = traced(refused_save(run), do_at(i, Do(error=number)), quietly=False)
        there = run.check()
        # A failure to make the rename durable, or to remove what is old, comes when the checkpoint is whole already.
        assert status in (0, 7), (i, name, number)
        committed += there
        run.restore()
    assert committed < len(chosen) / 3
    kind = "background" if background else "inline"
    fault = f"ENOSPC, EIO, EDQUOT, EROFS from each call that changes files ({kind} save)"
    record("C4", fault, len(chosen), "refused in a sentence, the checkpoint before untouched, no temporary left")


def test_disk_full_from_a_write_on(memory_path, traced, amount, record):
    run = SavingRun(memory_path / "run")
    points = changes(run, traced, names=(*WRITES, "ftruncate"))
    for i, _ in points:
        assert traced(refused_save(run), do_at(i, Do(error=errno.ENOSPC), from_there_on=True), quietly=False) == 7
        assert os.listdir(run.root) == ["step-00000001"]
        run.check()
    record("C4", "ENOSPC from each write of a save on", len(points), "refused, nothing left behind, previous untouched")


def test_fsync_errors(memory_path, traced, record):
    """After a failed fsync the kernel may have dropped the pages: such a checkpoint must not be committed."""
    run = SavingRun(memory_path / "run")
    points = changes(run, traced, names=("fsync", "fdatasync"))
    for i, _ in points[:-1]:
        assert traced(refused_save(run), do_at(i, Do(error=errno.EIO)), quietly=False) == 7
        assert not run.check()
    # The last one is of the directory above, after the rename.
    assert traced(refused_save(run), do_at(points[-1][0], Do(error=errno.EIO)), quietly=False) == 7
    run.check()
    record("C4", "EIO from each fsync", len(points), "never committed (the fsync after the rename: reported)")


@BACKGROUND
def test_short_and_interrupted_writes(memory_path, traced, record, background):
    run = SavingRun(memory_path / "run", async_save=background)
    points = changes(run, traced, names=WRITES)
    for i, _ in points:
        for do in (Do(at_most=1), Do(at_most=100), Do(error=errno.EINTR)):
            assert traced(run.save, do_at(i, do), quietly=False) == 0
            assert run.check()
            run.restore()
    kind = "background" if background else "inline"
    record("C4", f"short writes and EINTR ({kind} save)", 3 * len(points), "written in full all the same")


def in_own_mounts(work):
    """Run in a fork with a mount namespace of its own; None where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
                os._exit(77)
            status = work(libc) or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == 77 else status


def mount(libc, root, kilobytes):
    if libc.mount(b"tmpfs", os.fsencode(root), b"tmpfs", 0, f"size={kilobytes}k".encode()):
        os._exit(77)


def test_small_disks(tmp_path, amount, record):
    """A real file system, page by page larger, with room for the first checkpoint and a part of the next."""
    root = tmp_path / "disk"
    root.mkdir()
    size, count = 160_000, amount(8, 100)
    pages = [41 + 2 + (45 * i) // count for i in range(count)]

    def work(libc, pages):
        mount(libc, root, 4 * pages)
        save_checkpoint(root, 1, write_files(1, size))
        before = content(root / "step-00000001")
        try:
            save_checkpoint(root, 2, write_files(2, size))
        except CheckpointError as error:
            assert "bytes free" in str(error)
            assert os.listdir(root) == ["step-00000001"]
            assert content(root / "step-00000001") == before
            return 7
        ckpt.verify(root / "step-00000002")
        return 0

    statuses = [in_own_mounts(lambda libc, p=p: work(libc, p)) for p in pages]
    if None in statuses:
        pytest.skip("mount namespaces are not allowed here")
    assert set(statuses) <= {0, 7} and statuses == sorted(statuses, reverse=True)
    refused = statuses.count(7)
    assert refused > 0.8 * count
    record("C4", "a tmpfs too small for the second checkpoint", refused, "refused, the first untouched, nothing left")

    trainer = make_trainer(root, model=TinyLM(TinyConfig(hidden_size=64)))

    def refused_before_writing(libc):
        mount(libc, root, 64)
        with pytest.raises(CheckpointError, match=r"must find \d+ bytes free on its disk, got \d+"):
            trainer.save()
        assert os.listdir(root) == []

    assert in_own_mounts(refused_before_writing) == 0
    record("C9", "a disk with less room than the checkpoint needs", 1, "refused before anything is written")


def test_read_only_disk(tmp_path, record):
    root = tmp_path / "disk"
    root.mkdir()
    trainer = make_trainer(root)

    def work(libc):
        mount(libc, root, 1 << 16)
        if libc.mount(b"none", os.fsencode(root), None, _MS_REMOUNT | _MS_RDONLY, b"size=64m"):
            os._exit(77)
        with pytest.raises(CheckpointError, match="must be writable.*Read-only file system"):
            trainer.save()

    status = in_own_mounts(work)
    if status is None:
        pytest.skip("mount namespaces are not allowed here")
    assert status == 0
    record("C4", "a read-only file system", 1, "refused in a sentence")


def targets(root):
    """Things that may stand where the checkpoint of step 0 is to be, and how to make them."""
    target = root / "step-00000000"
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    yield "file", lambda: target.write_text("mine")
    yield "link to a directory", lambda: target.symlink_to(elsewhere)
    yield "dangling link", lambda: target.symlink_to(root / "nowhere")
    yield "pipe", lambda: os.mkfifo(target)
    if os.geteuid() == 0:
        yield "device node", lambda: os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(1, 3))


def test_targets_that_are_no_directories(tmp_path, record):
    trainer, made = make_trainer(tmp_path), []
    target = tmp_path / "step-00000000"
    for name, make in targets(tmp_path):
        make()
        before = os.lstat(target)
        with pytest.raises(CheckpointError, match="must be a directory or absent, got something else"):
            trainer.save()
        after = os.lstat(target)
        assert (before.st_mode, before.st_ino, before.st_mtime_ns) == (after.st_mode, after.st_ino, after.st_mtime_ns)
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "step-00000000"] and not os.listdir(tmp_path / "elsewhere")
        target.unlink()
        made.append(name)
    record("C9", f"target is a {', '.join(made)}", len(made), "refused before any write, the target as it was")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file of somebody else")
def test_directories_that_others_can_write(tmp_path, record, capsys):
    os.chmod(tmp_path, 0o777)
    make_trainer(tmp_path / "run").save()
    os.chmod(tmp_path / "run", 0o777)
    make_trainer(tmp_path / "run").save()
    assert (
        "run can be written by everybody: a checkpoint in it is as trustworthy as they are" in capsys.readouterr().err
    )
    os.chmod(tmp_path / "run", 0o755)
    os.chown(tmp_path / "run", 65534, 65534)
    make_trainer(tmp_path / "run").save()
    assert "run belongs to another user (65534)" in capsys.readouterr().err
    record("C9", "output directory that others can write, or own", 2, "a warning on stderr")


def test_rename_across_disks(tmp_path, record):
    """Temporaries lie in the directory itself, whatever TMPDIR says, so that no rename crosses to another disk."""
    run = SavingRun(tmp_path / "run")
    seen = []
    real = os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path))
        patch.setattr(os, "rename", lambda a, b: (seen.append((os.path.dirname(a), os.path.dirname(b))), real(a, b)))
        run.save()
    assert seen and all(a == b == str(run.root) for a, b in seen)
    assert run.check()
    record("T8", "TMPDIR on another file system", 1, "not used: every rename stays in the output directory")


def test_file_size_limit_in_a_run(worker, memory_path, amount, record):
    """RLIMIT_FSIZE at many points, in whole runs: exit status 1, the sentence, and the next run goes on."""
    config = {"max_steps": 3, "save_every": 1, "keep_last": 0}
    assert worker(memory_path / "undisturbed", config=config)[0] == 0
    expected = outcome(memory_path / "undisturbed")
    largest = max(path.stat().st_size for path in (memory_path / "undisturbed/step-00000003").iterdir())
    # Below some kilobytes the process could not even tell: the limit is that of what it prints too.
    limits = [4000 + (largest - 4000) * i // amount(4, 100) for i in range(amount(4, 100))]
    for limit in limits:
        path = memory_path / f"run-{limit}"
        status, _, log = worker(path, config=config, file_size_limit=limit)
        assert status == 1 and "Error: " in log.splitlines()[-1], log
        status, _, log = worker(path, config=config)
        assert status == 0, log
        assert_same_outcome(outcome(path), expected)
    record("C4", "RLIMIT_FSIZE during a run", len(limits), "exit status 1 with a sentence; continued bit-identically")
