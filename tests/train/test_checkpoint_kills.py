"""A process that dies anywhere in a save, at any call and any byte, leaves every earlier checkpoint as it was."""

import os
import re
import resource
import signal

import pytest

from arfast.train import checkpoint as ckpt
from arfast.train.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint, verify

CALLS = ("mkdir", "open", "fsync", "posix_fadvise", "close", "rename", "replace", "link", "unlink", "rmdir")


def file_content(step, size):
    return bytes((step * 31 + i * 7) % 256 for i in range(size))


def writer(step, size):
    def write(directory):
        for name in ("model.safetensors", "state.json"):
            (directory / name).write_bytes(file_content(step, size))

    return write


def in_child(work):
    """Run in a fork; returns how it ended, as `os.waitpid` tells."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die_at_call(number):
    """From now on count calls that change a file system; SIGKILL before the one of this number, or after it if it is
    half-way between two."""
    count = 0

    def wrap(real):
        def counted(*args, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if count == number + 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def check_survivors(root, always, possible, size):
    """The checkpoints are whole, are `always` and perhaps others of `possible`, and saving goes on."""
    with ckpt.lock_directory(root):
        steps = [int(path.name[5:]) for path in list_checkpoints(root)]
        assert set(always) <= set(steps) <= set(possible)
        for step, path in zip(steps, list_checkpoints(root)):
            verify(path)
            assert (path / "model.safetensors").read_bytes() == file_content(step, size)
        assert all(re.fullmatch(r"step-\d{8}|model\.safetensors|state\.json", name) for name in os.listdir(root))
        save_checkpoint(root, 90, writer(90, size))
        assert latest_checkpoint(root, pytest.fail).name == "step-00000090"


def every_boundary(root, prepare, work, always, possible, size=500):
    """Kill before and after each call of `work` until it gets through; returns how many points there were."""
    for half in range(2, 400):
        directory = root / str(half)
        directory.mkdir()
        prepare(directory)

        def child(directory=directory, number=half / 2):
            die_at_call(number)
            work(directory)

        status = in_child(child)
        check_survivors(directory, always, possible, size)
        if status == 0:
            return half - 2
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("the work never ended")


def save_steps(*steps):
    def prepare(root):
        for step in steps:
            save_checkpoint(root, step, writer(step, 500))

    return prepare


def test_kill_at_every_call_of_a_save(memory_path):
    assert every_boundary(memory_path, save_steps(1), save_steps(2), always=[1], possible=[1, 2]) > 20


def test_kill_at_every_call_of_a_first_save(memory_path):
    assert every_boundary(memory_path, save_steps(), save_steps(2), always=[], possible=[2]) > 20


def test_kill_at_every_call_of_a_replacement(memory_path):
    """The one moment without the replaced step lies between two renames; the step before it is there then."""
    assert every_boundary(memory_path, save_steps(1, 2), save_steps(2), always=[1], possible=[1, 2]) > 20


def test_kill_at_every_call_of_prune(memory_path):
    work = lambda root: ckpt.prune(root, 1)
    assert every_boundary(memory_path, save_steps(1, 2, 3), work, always=[3], possible=[1, 2, 3]) > 8


def test_kill_at_every_call_of_publish(memory_path):
    def prepare(root):
        save_steps(1, 2)(root)
        ckpt.publish(root / "step-00000001", root, ["model.safetensors", "state.json"])

    def work(root):
        ckpt.publish(root / "step-00000002", root, ["model.safetensors", "state.json"])

    assert every_boundary(memory_path, prepare, work, always=[1, 2], possible=[1, 2]) > 8
    for directory in memory_path.iterdir():
        assert (directory / "model.safetensors").read_bytes() in (file_content(1, 500), file_content(2, 500))


@pytest.mark.parametrize(("size", "stride"), [(900, 9), (1, 5)], ids=["in a file", "in the manifest"])
def test_kill_at_byte_offsets(memory_path, size, stride):
    """SIGXFSZ with its default action kills a process at the byte where a file passes RLIMIT_FSIZE."""
    save_checkpoint(memory_path, 1, writer(1, size))
    killed = 0
    for limit in range(0, 1000, stride):

        def work(limit=limit):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_checkpoint(memory_path, 2, writer(2, size))

        status = in_child(work)
        assert latest_checkpoint(memory_path, pytest.fail) == memory_path / f"step-{1 if status else 2:08d}"
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGXFSZ
        killed += 1
    largest = max(path.stat().st_size for path in (memory_path / "step-00000002").iterdir())
    assert killed == -(-largest // stride)
    assert len(os.listdir(memory_path)) == 2 + killed
    with ckpt.lock_directory(memory_path):
        assert sorted(os.listdir(memory_path)) == ["step-00000001", "step-00000002"]
