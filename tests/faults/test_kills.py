"""C1, C6: a process that dies at any system call or byte of a save, of either kind, leaves whole checkpoints only."""

import random
import signal

import pytest
from saving_runs import SavingRun
from tracing import WRITES, Do
from train_doubles import assert_same_outcome, outcome

BACKGROUND = pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])


@BACKGROUND
@pytest.mark.parametrize("keep_last", [1, 2])
def test_kill_at_every_system_call(memory_path, traced, amount, record, background, keep_last):
    run = SavingRun(memory_path / "run", keep_last=keep_last, async_save=background)
    kills, committed, number, status = 0, [], 0, -1
    while status != 0:
        status = traced(run.save, lambda n, call, number=number: Do(kill_before=True) if n == number else None)
        assert status in (0, -signal.SIGKILL)
        committed.append(run.check(may_lose_first=keep_last == 1))
        run.restore()
        kills += status != 0
        number += amount(9, 1)
    assert committed[-1] and not committed[0]
    # It appears at one of the calls, and stays; in the background the two threads take turns as they like.
    assert background or committed == sorted(committed)
    assert kills >= amount(10, 100)
    kind = "background" if background else "inline"
    fault = f"SIGKILL before each system call of a save ({kind}, keep_last={keep_last})"
    happened = f"whole checkpoints only; new one there after {sum(committed) - 1}, the one before after the others"
    record("C6" if background else "C1", fault, kills, happened)


@BACKGROUND
def test_kill_at_bytes(memory_path, traced, amount, record, background):
    """Some bytes of a write reach the file, and the process dies."""
    run = SavingRun(memory_path / "run", async_save=background)
    sizes = []

    def note(number, call):
        if call.changes_files and call.name in WRITES:
            sizes.append(call.arguments[2])

    assert traced(run.save, note) == 0
    run.restore()
    count, total = amount(25, 1000), sum(sizes)
    for point in range(count):
        target = point * total // count
        writes, offset = 0, 0

        def decide(number, call, target=target):
            nonlocal writes, offset
            if not (call.changes_files and call.name in WRITES):
                return None
            start, offset = offset, offset + call.arguments[2]
            writes += 1
            return Do(at_most=target - start, kill_after=True) if start <= target < offset else None

        assert traced(run.save, decide) == -signal.SIGKILL
        assert not run.check(), "it must not appear before its last byte"
    fault = f"SIGKILL at byte offsets of a save ({'background' if background else 'inline'})"
    happened = f"evenly over the {total} bytes; the checkpoint before untouched, nothing half written stays"
    record("C6" if background else "C1", fault, count, happened)


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_kill_at_every_change_of_files_in_a_run(memory_path, traced, worker, amount, record, background):
    """A whole run, publication included; each one that was killed is continued and ends as if it had not been."""
    config = {"max_steps": 3, "save_every": 1, "keep_last": 1, "async_save": background}
    assert worker(memory_path / "undisturbed", config=config)[0] == 0
    expected = outcome(memory_path / "undisturbed")
    number, kills, status = 1, 0, -1
    while status != 0:
        path = memory_path / f"run-{number}"
        status, _, log = worker(path, config=config, kill_at_change=number)
        assert status in (0, -signal.SIGKILL), log
        if status != 0:
            kills += 1
            status_after, _, log = worker(path, config=config)
            assert status_after == 0, log
        assert_same_outcome(outcome(path), expected)
        number += amount(13, 1)
    assert kills >= amount(8, 100)
    kind = "background" if background else "inline"
    fault = f"SIGKILL before each change of a file in a whole run ({kind} saves)"
    record("C6" if background else "C1", fault, kills, "continued; weights, optimizer, logs bit-identical")


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_random_kills_of_a_run(memory_path, worker, amount, record, background):
    """SIGKILL at random times, each run continuing the one before, until one gets through."""
    config = {"max_steps": 20, "save_every": 2, "async_save": background, "eval_every": 5}
    status, seconds, _ = worker(memory_path / "undisturbed", config=config)
    expected = outcome(memory_path / "undisturbed")
    generator, path, kills, limit = random.Random(background), memory_path / "run-0", 0, seconds
    attempt = 0
    while kills < amount(5, 100):
        attempt += 1
        status, _, log = worker(path, config=config, signals=[(generator.uniform(0, limit), signal.SIGKILL)])
        assert status in (0, -signal.SIGKILL), log
        kills += status != 0
        if status == 0:
            assert_same_outcome(outcome(path), expected)
            path = memory_path / f"run-{attempt}"
            limit *= 0.9
    status, _, log = worker(path, config=config)
    assert status == 0, log
    assert_same_outcome(outcome(path), expected)
    kind = "background" if background else "inline"
    record("C6" if background else "C1", f"SIGKILL at random times of a run ({kind} saves)", kills,
           "continued; weights, optimizer, logs bit-identical")  # fmt: skip
