"""The emulator under test: it must report every probe with a bug, and none that is right, in any schedule."""

import functools

import pytest
from emulator import build

SEEDS = 50


@functools.cache
def probes():
    """(name, expected report or None, run) of each probe, and the emulator."""
    if build.unavailable():
        return [], None
    library, emulator = build.load_probes()

    def entry(i):
        expected = library.probe_expected(i)
        name = library.probe_name(i).decode()
        return name, None if expected is None else expected.decode(), lambda: (library.probe_run(i) or b"").decode()

    return [entry(i) for i in range(library.probe_count())], emulator


def schedules(seeds):
    yield dict()
    yield dict(schedule="lifo", asynchrony="early")
    for seed in range(seeds):
        yield dict(schedule="random", asynchrony="mixed", seed=seed, jitter=5 if seed % 2 else 0)


def pytest_generate_tests(metafunc):
    if "right" in metafunc.fixturenames or "wrong" in metafunc.fixturenames:
        argument = "right" if "right" in metafunc.fixturenames else "wrong"
        chosen = [entry for entry in probes()[0] if (entry[1] is None) == (argument == "right")]
        metafunc.parametrize(argument, chosen, ids=[entry[0] for entry in chosen])


def test_right_probes_raise_no_alarm(right):
    """Proofs of maps do not depend on the schedule."""
    name, _, run = right
    for schedule in schedules(0 if name.startswith("map: ") else SEEDS):
        probes()[1].configure(**schedule)
        assert run() == "", f"{name} under {schedule}"


def test_bugs_are_reported(wrong):
    """In the fixed schedule, else in one of ten others."""
    name, expected, run = wrong
    reports = []
    for schedule in schedules(10):
        probes()[1].configure(**schedule)
        reports.append(run())
        if reports[-1] and expected in reports[-1]:
            return
    pytest.fail(f"{name}: no report has {expected!r}: {reports}")


def test_values_without_checks():
    for name, expected, run in probes()[0]:
        if expected is None:
            probes()[1].configure(check=False)
            assert run() == "", name


@pytest.mark.parametrize("name", ["pipeline", "ring", "gather", "wgmma bf16 64", "tensor 2d"])
def test_an_older_gpu_refuses_what_needs_sm_90(name):
    run = next(entry[2] for entry in probes()[0] if entry[0] == name)
    probes()[1].configure(capability=80)
    assert "compute capability 9.0" in run()


def test_an_older_gpu_runs_the_rest():
    probes()[1].configure(capability=80)
    for name, _, run in probes()[0]:
        if name in ("rounds", "cp.async", "mma bf16", "last block", "turns", "named barriers", "dependent launch"):
            assert run() == "", name


def test_strict_acquire_wants_a_fence_after_the_atomic_operation():
    run = {name: run for name, _, run in probes()[0]}
    probes()[1].configure(strict_acquire=True)
    assert run["last block"]() == ""
    assert "race: write, then read without order" in run["last block: no fence after the count"]()


def test_a_seed_repeats_its_schedule():
    run = next(run for name, _, run in probes()[0] if name == "histogram: plain increments")
    emulator = probes()[1]
    reports = []
    for seed in (1, 2, 1):
        emulator.configure(schedule="random", asynchrony="mixed", seed=seed, jitter=3)
        before = emulator.stats()["switches"]
        reports.append((run(), emulator.stats()["switches"] - before))
    assert reports[0] == reports[2] != reports[1]
