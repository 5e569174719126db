"""Accidents while a data set is prepared; run by test_prepare.py as `prepare_faults.py SOURCE FOLDER`."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from forks import die_at, fork, wait, with_full_disk
from tqdm import tqdm

from arfast.data import DatasetManifest, prepare_dataset

VOCAB_SIZE = 320


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


def on_full_disk(source, out_dir, limit):
    sentence = "prepare_dataset: out_dir must have room for the data set, got 'File too large' with"
    return lambda: with_full_disk(prepare(source, out_dir), limit, sentence)


def disk_full(source, out_dir, expected):
    for limit in (0, 1, 100, 1000, 5000, 10_000):
        assert wait(fork(on_full_disk(source, out_dir, limit))) == 7, limit
        assert not os.listdir(out_dir.parent), limit
    assert_recovers(source, out_dir, expected)


def together(source, out_dir, expected):
    """Several at once; the first ones die or fail while the others wait."""
    for first in ("live", "die", "fail"):
        work = on_full_disk(source, out_dir, 1000) if first == "fail" else prepare(source, out_dir)
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
