"""Peaks are those of the fastest block of calls, on data that is not constant, measured once."""

import pytest
import torch

from arfast import peaks


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes when a test says so; nothing measured before is known."""
    clock = lambda: clock.now
    clock.now = 0.0
    monkeypatch.setattr(peaks.time, "perf_counter", clock)
    for function in (peaks._matmul_rate, peaks._copy_bandwidth):
        function.cache_clear()
    yield clock
    for function in (peaks._matmul_rate, peaks._copy_bandwidth):
        function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_rate(monkeypatch, clock, dtype):
    """Three calls take longer than a block here; the third of the five is the fastest."""
    seconds = iter([3.0] * 3 + [2.0] * 3 + [0.25, 0.5, 0.75] + [1.0] * 6)
    seen = set()

    def timed(a, b, out):
        clock.now += next(seconds)
        assert a.std() > 0.9 and b.std() > 0.9
        seen.add((a.dtype, *a.shape, *b.shape, *out.shape))

    monkeypatch.setattr(torch, "mm", timed)
    rate = peaks.matmul_rate("cpu", dtype)
    assert seen == {(dtype, *[1024] * 6)}
    assert rate == 2 * 1024**3 / 0.5
    assert peaks.matmul_rate(torch.device("cpu"), dtype) == rate


def test_random_state_stays(clock, monkeypatch):
    """Of a run, which may or may not measure."""
    monkeypatch.setattr(peaks, "_best_seconds", lambda function, device: 1.0)
    before = torch.get_rng_state()
    peaks.matmul_rate("cpu", torch.float32), peaks.copy_bandwidth("cpu", 1 << 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_copy_bandwidth(monkeypatch, clock):
    class Bytes:
        def __init__(self, low, high, shape, dtype, device, generator):
            assert high > low and dtype == torch.uint8
            self.size = shape[0]

        def copy_(self, source):
            clock.now += self.size / 1e9

    monkeypatch.setattr(torch, "randint", Bytes)
    assert peaks.copy_bandwidth("cpu", 1 << 20) == pytest.approx(2e9)
    assert peaks.copy_bandwidth("cpu") == pytest.approx(2e9)
