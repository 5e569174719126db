"""The benchmark harness refuses what must not be measured, and reports what it measured."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import harness
import peaks
import pytest
import report
import torch
from harness import Case, accurate, compare, with_gradients
from peers import gpu_peer


class Clock:
    """Stands in for the module `time`: it moves only when a function under test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


clock = Clock()


class Benchmark:
    """pytest-benchmark's fixture, as far as the harness uses it."""

    disabled = False

    def pedantic(self, target, args=(), setup=None, rounds=1):
        data = []
        for _ in range(rounds):
            if setup:
                setup()
            start = clock.now
            target(*args)
            data.append(clock.now - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def lasting(seconds, function=lambda x: 2 * x):
    def run(*inputs):
        clock.now += seconds
        return function(*inputs)

    return run


def case(**changes):
    arguments = dict(
        name="double",
        make_inputs=lambda device: (torch.randn(4, 5, device=device),),
        ours=lasting(2e-3),
        peers={"slow": lasting(6e-3), "same": lasting(2e-3)},
        check=accurate(lambda x: x + x),
        bytes=160,
    )
    return Case(**(arguments | changes))


@pytest.fixture(autouse=True)
def fake_time(monkeypatch):
    monkeypatch.setattr(harness, "time", clock)
    monkeypatch.setattr(harness, "PATIENCE_SECONDS", 0.0)


def test_ratios():
    benchmark = Benchmark()
    result = compare(benchmark, case(), "cpu")
    assert result.ratios == pytest.approx({"slow": 3.0, "same": 1.0})
    assert result.seconds == pytest.approx(2e-3) and result.peers["slow"] == pytest.approx(6e-3)
    assert result.rounds == harness.ROUNDS and len(benchmark.stats.stats.data) in (result.rounds, result.quiet_rounds)


def test_disturbed_rounds_are_dropped(monkeypatch):
    foreign = iter([0.0, 0.0, 3.0, 0.0] + [0.0] * 5)
    monkeypatch.setattr(harness.ForeignLoad, "cores", lambda self: next(foreign))
    benchmark = Benchmark()
    result = compare(benchmark, case(), "cpu")
    assert (result.quiet_rounds, result.rounds, result.noisy) == (8, 9, False)
    assert len(benchmark.stats.stats.data) == 8


def test_a_busy_machine_is_reported(monkeypatch):
    monkeypatch.setattr(harness.ForeignLoad, "cores", lambda self: 1.0)
    result = compare(Benchmark(), case(), "cpu")
    assert result.noisy and "0/9 noisy" in report.table([result])


def test_gates():
    result = compare(Benchmark(), case(gates={"slow": 1.5, "same": 100.0}), "cpu")
    assert [missed.split()[0] for missed in result.missed_gates] == ["same:"]
    assert "100.00 missed" in report.table([result]) and "1.50 missed" not in report.table([result])


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(make_inputs=lambda device: (torch.zeros(4, 5),)), ValueError, "must give random data"),
        (dict(ours=lasting(1e-3, lambda x: 2.001 * x)), AssertionError, "output 0: maximum error"),
        (dict(peers={"other": lambda x: 3 * x}), ValueError, "other: output 0 differs from ours by more than 5 %"),
        (dict(peers={"other": lambda x: x[0]}), ValueError, r"other: output 0 has shape \[5\], ours \[4, 5\]"),
    ],
)
def test_what_is_wrong_is_not_timed(change, error, message):
    benchmark = Benchmark()
    with pytest.raises(error, match=message):
        compare(benchmark, case(**change), "cpu")
    assert not hasattr(benchmark, "stats")


@pytest.mark.parametrize("change", [dict(peers={}), dict(gates={"nobody": 2.0})])
def test_a_case_names_its_peers(change):
    with pytest.raises(ValueError, match="double: gates must name peers"):
        case(**change)


def fail(x):
    raise RuntimeError("no kernel image")


def test_gpu_peers_that_fail_are_left_out():
    peers = {"good": lasting(4e-3), "absent": None, "broken": fail, "other": lambda x: 3 * x}
    inputs = (torch.randn(4, 5),)
    made = case(gpu_peers=peers, gates={"good": 1.5, "absent": 9.0}, make_inputs=lambda device: inputs)
    with pytest.warns(UserWarning, match="double: (broken|other) is left out") as warned:
        kept, _ = harness._check(made, "cuda")
    assert list(kept) == ["slow", "same", "good"] and len(warned) == 2
    result = compare(Benchmark(), made, "cpu")
    assert list(result.ratios) == ["slow", "same"] and result.gates == {} and not result.missed_gates


def test_blocks_are_replayed_as_graphs_on_a_gpu(monkeypatch):
    replayed = []

    def captured(calls):
        return SimpleNamespace(replay=lambda: (replayed.append(1), calls()))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "share_of_peak", lambda *arguments: None)
    inputs = (torch.randn(4, 5),)
    result = compare(Benchmark(), case(make_inputs=lambda device: inputs), "cuda")
    assert result.ratios == pytest.approx({"slow": 3.0, "same": 1.0}) and len(replayed) >= 3 * harness.ROUNDS


def test_what_cannot_be_captured_is_timed_call_by_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fail(None))
    with pytest.warns(UserWarning, match="timed call by call, not as a CUDA graph: no kernel image"):
        assert harness.captured(lambda: None) is None


def test_gpu_peer_is_looked_up_where_it_is_installed(monkeypatch):
    assert gpu_peer("math:sqrt") is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_peer("math:sqrt", lambda f: f(4)) == 2
    assert gpu_peer("not_a_package.ops:op") is None
    with pytest.warns(UserWarning, match="math:squirt is installed but left out"):
        assert gpu_peer("math:squirt") is None


@pytest.mark.parametrize("overwrites", [False, True])
def test_overwritten_inputs_are_made_anew_for_every_call(overwrites):
    made = []

    def make_inputs(device):
        made.append(torch.randn(3))
        return (made[-1],)

    ours = lasting(2e-3, (lambda x: x.mul_(2)) if overwrites else (lambda x: x * 2))
    compare(Benchmark(), case(make_inputs=make_inputs, ours=ours), "cpu")
    assert (len(made) > 2 * harness.ROUNDS) == overwrites


def test_disabled_checks_without_timing():
    benchmark = Benchmark()
    benchmark.disabled = True
    assert compare(benchmark, case(), "cpu") is None
    with pytest.raises(AssertionError, match="maximum error"):
        compare(benchmark, case(ours=lambda x: 3 * x), "cpu")


def test_gradients():
    x, w, dout = torch.randn(4, requires_grad=True), torch.randn(4), torch.randn(4)
    out, dx = with_gradients(lambda x, w: x * w)(x, w, dout)
    torch.testing.assert_close((out, dx), (x * w, w * dout))


def test_saved_table(tmp_path):
    result = compare(Benchmark(), case(), "cpu")
    markdown, data = report.save([result], tmp_path / "results")
    assert "| double " in markdown.read_text() and "* commit: " in markdown.read_text()
    saved = json.loads(data.read_text())
    assert saved["results"][0]["ratios"] == result.ratios and saved["machine"]["allocator"]


def test_what_waits_for_the_host_is_not_captured(monkeypatch):
    """A capture that fails spoils torch's state: the calls are tried before, where waiting is an error."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "graph", None)
    with pytest.warns(UserWarning, match="timed call by call, not as a CUDA graph: no kernel image"):
        assert harness.captured(lambda: fail(None)) is None
    assert modes == ["error", "default"]


def test_a_case_that_waits_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "captured", fail)
    monkeypatch.setattr(harness, "share_of_peak", lambda *arguments: None)
    inputs = (torch.randn(4, 5),)
    result = compare(Benchmark(), case(make_inputs=lambda device: inputs, graph=False), "cuda")
    assert result.ratios == pytest.approx({"slow": 3.0, "same": 1.0})


def test_shares(monkeypatch):
    """A step of 10 tokens in 2 ms that multiplies at 3/4 of what torch reaches, at half of what the maker promises."""
    monkeypatch.setattr(peaks, "matmul_rate", lambda device, dtype: {torch.bfloat16: 4e12, torch.float32: 1e12}[dtype])
    monkeypatch.setattr(harness, "nominal_matmul_rate", lambda device, dtype: 6e12)
    made = case(bytes=0, flops=6 * 10**9, tokens=10, dtype=torch.bfloat16)
    result = compare(Benchmark(), made, "cpu")
    assert (result.peak, result.peak_of, result.nominal) == (pytest.approx(0.75), "product", pytest.approx(0.5))
    row = report.table([result]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")][8:13] == ["", "3e+03", "5000", "75% product", "50%"]


def test_nominal_rates(monkeypatch):
    assert peaks.nominal_matmul_rate("cpu", torch.bfloat16) is None
    for name, rate in (("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989.4e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peaks.nominal_matmul_rate("cuda", torch.bfloat16) == rate
        assert peaks.nominal_matmul_rate("cuda", torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peaks.nominal_matmul_rate("cuda", torch.bfloat16) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_marked_when_what_is_measured_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code, results = tmp_path / "benchmarks" / "bench_op.py", tmp_path / "benchmarks" / "results" / "cpu.md"
    results.parent.mkdir(parents=True)
    code.write_text("before")
    results.write_text("before")
    assert report._commit(code.parent) == "unknown"
    author = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "All"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = report._commit(code.parent)
    results.write_text("after")
    assert report._commit(code.parent) == commit and len(commit) >= 7
    code.write_text("after")
    assert report._commit(code.parent) == f"{commit}-dirty"
