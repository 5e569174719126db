"""Accidents while a corpus is prepared; run by test_run.py as `run_faults.py SOURCES FOLDER`."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from forks import die_at, fork, wait, with_full_disk
from tqdm import tqdm

from arfast.data.pipeline import Recipe, prepare_corpus, source, tokenize

# ARFAST_PREPARE_KILLS=all: more of them at random, and one at every single call that changes the disk.
THOROUGH = os.environ.get("ARFAST_PREPARE_KILLS") == "all"
RANDOM_KILLS = 40 if THOROUGH else 6
CALLS = 1 if THOROUGH else 11


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


class Accidents:
    def __init__(self, sources, folder):
        sources, self.folder = Path(sources), Path(folder)
        self.out = self.folder / "corpus"
        self.recipe = Recipe.from_json(
            {
                "sources": [
                    {"name": "code", "path": str(sources / "code")},
                    {"name": "web", "path": str(sources / "pages" / "en-US")},
                ],
                "quality": {"gopher": {"min_words": 20}, "fineweb": None, "c4": None, "repetition": None},
                "tokenizer": {"vocab_size": 300},
            }
        )
        self.prepare(1)()
        self.expected = contents(self.out)
        shutil.rmtree(self.out)

    def prepare(self, workers):
        return lambda: prepare_corpus(self.recipe, self.out, workers=workers)

    def assert_absent_or_complete(self):
        if self.out.exists() and any(self.out.iterdir()):
            assert contents(self.out) == self.expected
            return True
        return False

    def assert_recovers(self, workers=1):
        assert wait(fork(self.prepare(workers))) == 0
        assert contents(self.out) == self.expected
        assert os.listdir(self.folder) == [self.out.name]
        shutil.rmtree(self.out)

    def killed_at_each_call(self):
        """Dies just before the n-th call that changes the folder, and again at a later one before it may finish."""
        number, status = 1 - CALLS, 9
        while status == 9:
            number += CALLS
            status = wait(fork(lambda number=number: self.dying_at(number)))
            self.assert_absent_or_complete()
            if number // CALLS % 3:
                self.assert_recovers()
        assert status == 0 and number > 60, (status, number)
        self.assert_recovers()

    def dying_at(self, number):
        die_at(number, self.folder)
        self.prepare(1)()

    def killed_at_random(self):
        """The process alone, whose workers then end by themselves, or all of its group."""
        generator = random.Random(0)
        start = time.perf_counter()
        self.assert_recovers(2)
        duration = time.perf_counter() - start
        for number in range(RANDOM_KILLS):
            child = fork(self.prepare(1 + number % 2))
            time.sleep(generator.uniform(0, duration))
            if generator.random() < 0.5:
                os.kill(child, signal.SIGKILL)
            else:
                os.killpg(child, signal.SIGKILL)
            assert wait(child) in (0, -signal.SIGKILL)
            self.assert_absent_or_complete()
            if generator.random() < 0.5:
                self.assert_recovers(2)
        self.assert_recovers()

    def disk_full(self):
        for limit in (0, 100, 1000, 10_000, 30_000) if THOROUGH else (100, 10_000):
            for workers in (1, 2):
                assert wait(fork(lambda limit=limit, workers=workers: self.on_full_disk(limit, workers))) == 7, limit
                assert not self.out.exists()
                assert not list(self.folder.rglob("*.tmp-*")), limit
        self.assert_recovers()

    def on_full_disk(self, limit, workers):
        sentence = "prepare: output_dir must have room for the work and the result, got 'File too large'"
        with_full_disk(self.prepare(workers), limit, sentence)

    def together(self):
        """Several at once: one works, the others wait and find its result."""
        children = [fork(self.prepare(2)) for _ in range(3)]
        time.sleep(0.05)
        os.kill(children[0], signal.SIGKILL)
        assert [wait(child) for child in children][1:] == [0, 0]
        self.assert_recovers()


def main():
    # Processes die here, the machine does not: waiting for the disk would only slow the test.
    os.fsync = lambda descriptor: None
    # In this process, so that its children find all modules loaded; without threads, which a fork would not copy.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.monitor_interval = 0
    source._BLOCK_CHARACTERS, tokenize._MAX_SHARD_TOKENS, tokenize._BATCH_CHARACTERS = 40_000, 20_000, 20_000
    accidents = Accidents(*sys.argv[1:])
    for accident in ("killed_at_random", "together", "disk_full", "killed_at_each_call"):
        start = time.perf_counter()
        getattr(accidents, accident)()
        print(f"{accident}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
