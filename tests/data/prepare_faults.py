"""Accidents while a data set is prepared; run by test_prepare.py as `prepare_faults.py SOURCE FOLDER`.

Children are forked, so that each accident costs milliseconds and not the import of torch.
"""

import errno
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from arfast.data import DatasetManifest, prepare_dataset

VOCAB_SIZE = 320


def fork(work):
    """The process id of a child that runs ``work`` and ends with status 0, or 1 after an exception."""
    if child := os.fork():
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def wait(child):
    """Exit status of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(source, out_dir):
    return lambda: prepare_dataset(source, out_dir, vocab_size=VOCAB_SIZE)


def assert_absent_or_complete(out_dir):
    """What stands under the final name is nothing, an empty directory, or a data set that verifies."""
    if out_dir.exists() and any(out_dir.iterdir()):
        DatasetManifest.load(out_dir).verify()
        return True
    return False


def assert_recovers(source, out_dir, expected):
    """The next process makes the same data set, and sweeps away what the dead one left."""
    assert wait(fork(prepare(source, out_dir))) == 0
    assert DatasetManifest.load(out_dir).splits == expected
    DatasetManifest.load(out_dir).verify()
    assert os.listdir(out_dir.parent) == [out_dir.name]
    shutil.rmtree(out_dir)


def die_at(number, folder):
    """Ends this process, without clean-up, just before its call ``number`` that changes the folder or waits for it."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == number:
            os._exit(9)

    def audit(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        )
        if changes and str(folder) in str(arguments[0]):
            count()

    os.fsync = lambda descriptor: count()
    sys.addaudithook(audit)


def killed_at_each_call(source, out_dir, expected):
    number, complete = 0, []
    status = 9
    while status == 9:
        number += 1

        def work(number=number):
            die_at(number, out_dir.parent)
            prepare(source, out_dir)()

        status = wait(fork(work))
        complete.append(assert_absent_or_complete(out_dir))
        assert_recovers(source, out_dir, expected)
    # The data set appears with one call, the rename; only the last fsync and the removal of nothing come after it.
    assert status == 0 and number > 15, (status, number)
    assert complete == sorted(complete) and complete.count(False) > 12, complete


def killed_at_random(source, out_dir, expected):
    generator = random.Random(0)
    start = time.perf_counter()
    assert_recovers(source, out_dir, expected)
    duration = time.perf_counter() - start
    for _ in range(15):
        child = fork(prepare(source, out_dir))
        time.sleep(generator.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        assert wait(child) in (0, -signal.SIGKILL)
        assert_absent_or_complete(out_dir)
        if generator.random() < 0.5:
            assert_recovers(source, out_dir, expected)
    assert_recovers(source, out_dir, expected)


def with_full_disk(source, out_dir, limit):
    """A child's work under a limit on the size of files: it fails where a full disk does, and ends with status 7."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare(source, out_dir)()
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert "prepare_dataset: out_dir must have room for the data set, got 'File too large' with" in str(error)
            os._exit(7)

    return work


def disk_full(source, out_dir, expected):
    for limit in (0, 1, 100, 1000, 5000, 10_000):
        assert wait(fork(with_full_disk(source, out_dir, limit))) == 7, limit
        assert not os.listdir(out_dir.parent), limit
    assert_recovers(source, out_dir, expected)


def together(source, out_dir, expected):
    """Several at once; the first ones die or fail while the others wait."""
    for first in ("live", "die", "fail"):
        work = with_full_disk(source, out_dir, 1000) if first == "fail" else prepare(source, out_dir)
        children = [fork(work) for _ in range(2)]
        time.sleep(0.02)
        others = [fork(prepare(source, out_dir)) for _ in range(3)]
        if first == "die":
            for child in children:
                os.kill(child, signal.SIGKILL)
        assert [wait(child) for child in others] == [0, 0, 0], first
        # A process that comes late finds a complete data set, for which any disk has room.
        statuses = {wait(child) for child in children}
        assert statuses <= {"live": {0}, "die": {0, -signal.SIGKILL}, "fail": {0, 7}}[first], (first, statuses)
        assert_recovers(source, out_dir, expected)


def main():
    source, folder = sys.argv[1:]
    out_dir = Path(folder) / "data"
    # Processes die here, the machine does not: waiting for the disk would only slow the test.
    os.fsync = lambda descriptor: None
    # In this process, so that its children find all modules loaded; without threads, which a fork would not copy.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.monitor_interval = 0
    expected = prepare(source, out_dir)().splits
    shutil.rmtree(out_dir)
    for fault in (killed_at_each_call, killed_at_random, together, disk_full):
        fault(source, out_dir, expected)


if __name__ == "__main__":
    main()
