"""Compares an op with its peers, interleaved in one process, after a check that the op is right.

Method: a round runs a block of every peer and then a block of ours, each block long enough to be timed; nine rounds,
each begun when the machine is quiet if it becomes so; a round during which other processes used the machine is dropped;
a ratio is the median over the rounds of (peer / ours). On a GPU a block is replayed as a CUDA graph where it can be
captured: else small ops would be timed by the Python that launches them.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accuracy import assert_accurate
from peaks import nominal_matmul_rate, share_of_peak

BLOCK_SECONDS = 0.06
ROUNDS = 9
MIN_QUIET_ROUNDS = 3
FOREIGN_CORES = 0.15  # a round with more of other processes' CPU use than this is disturbed
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
PATIENCE_SECONDS = 5.0  # how long a case waits for the machine to become quiet, in total
MAX_GRAPH_CALLS = 500
# Freed memory stays in the heap, and the heap asks for huge pages: a fresh 4 KiB page costs about 0.7 us.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=34359738368"
GPU_CACHE_BYTES = 256 << 20  # several times the L2 of a GPU


@dataclass(frozen=True)
class Case:
    """One op at one size, and what it is compared with.

    Args:
        name: the test's id, such as "4096x1024-bfloat16".
        make_inputs: device -> the arguments that `ours`, every peer and `check` get. Random: constant data is refused.
        ours: the function under test.
        peers: name -> a function of the same arguments that returns the leading outputs of `ours`.
        gpu_peers: the same, on a GPU only (see peers.py): None is left out, and one that raises too, with a warning.
        check: check(outputs, *inputs) raises AssertionError when `ours` is wrong; see `accurate`.
        bytes: the fewest bytes to move: every input read once, every output written once.
        flops: floating-point operations of the matrix products.
        gates: peer -> the smallest ratio that `--gates` accepts; of a peer that is absent it does not count.
        devices: where the case makes sense.
        dtype: what the matrix products multiply; None: the dtype of the first floating input.
        tokens: how many a call processes, for a rate in the table.
        graph: False when a call waits for the host, and so cannot be replayed as a CUDA graph.

    Raises:
        ValueError: no peer, or a gate for one that does not exist.
    """

    name: str
    make_inputs: Callable[[str], tuple]
    ours: Callable
    peers: Mapping[str, Callable]
    check: Callable[..., None]
    bytes: int = 0
    flops: int = 0
    gpu_peers: Mapping[str, Callable | None] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)
    devices: Sequence[str] = ("cpu", "cuda")
    dtype: torch.dtype | None = None
    tokens: int = 0
    graph: bool = True

    def __post_init__(self):
        known = [*self.peers, *self.gpu_peers]
        if not self.peers or not set(self.gates) <= set(known):
            raise ValueError(f"{self.name}: gates must name peers, got {list(self.gates)} of {known}")

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Result:
    """What one case measured: seconds per call (medians over the quiet rounds) and ratios peer / ours."""

    name: str
    device: str
    seconds: float
    spread: float  # interquartile range of `seconds` over its median
    peers: dict[str, float]
    ratios: dict[str, float]
    gates: dict[str, float]
    bytes: int
    flops: int
    tokens: int
    peak: float | None  # share of the measured bandwidth of a copy or rate of matrix products, whichever is larger
    peak_of: str  # "copy" or "product"
    nominal: float | None  # share of the rate of matrix products that the device's maker names
    quiet_rounds: int
    rounds: int

    @property
    def noisy(self) -> bool:
        """Too few undisturbed rounds: all rounds were used, and no gate is decided."""
        return self.quiet_rounds < MIN_QUIET_ROUNDS

    @property
    def missed_gates(self) -> list[str]:
        return [f"{p}: {self.ratios[p]:.2f}x < {g:.2f}x" for p, g in self.gates.items() if self.ratios[p] < g]


def accurate(reference: Callable) -> Callable[..., None]:
    """A check by the tests' bound: the error is at most twice that of `reference` in the case's dtype."""

    def check(outputs, *inputs):
        exact = leaves(reference(*(_copy(x, torch.float64) for x in inputs)))
        baseline = leaves(reference(*(_copy(x) for x in inputs)))
        for index, (a, e, b) in enumerate(zip(leaves(outputs), exact, baseline, strict=True)):
            assert_accurate(a, e, b, name=f"output {index}")

    return check


def with_gradients(function: Callable) -> Callable:
    """function(*arguments) with its backward pass: (*arguments, dout) -> (out, gradients of what needs one).

    `dout` is the gradient of the output, or a tuple of them.
    """

    def run(*inputs):
        *arguments, dout = inputs
        out = function(*arguments)
        wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        return (out, *torch.autograd.grad(out, wanted, dout))

    return run


def compiled(function: Callable) -> Callable:
    """`torch.compile` for the one shape of a case. It compiles in the first call, before timing."""
    return torch.compile(function, dynamic=False)


def compare(benchmark, case: Case, device: str) -> Result | None:
    """Check `case`, time it through pytest-benchmark's fixture, and give the result (None with --benchmark-disable)."""
    if benchmark.disabled:
        with torch.compiler.set_stance("force_eager"):
            _check(case, device)
        benchmark.pedantic(case.ours, case.make_inputs(device))
        return None
    torch._dynamo.reset()  # the compiler falls back to eager after a few shapes of one function
    functions, overwrites = _check(case, device)
    inputs = Inputs(case, device, overwrites)
    ours = Block(case.ours, inputs)
    peers = {name: Block(function, inputs) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    foreign: list[float] = []  # cores that others used in each round that is over
    watch = ForeignLoad(PATIENCE_SECONDS)

    def begin_round():
        if times[names[0]]:
            foreign.append(watch.cores())
        watch.wait_until_quiet()
        watch.start()
        first = len(foreign) % len(names)  # whoever runs before ours changes from round to round
        for name in names[first:] + names[:first]:
            times[name].append(peers[name].time())
        inputs.prepare()

    names = list(peers)
    round_seconds = sum(block.seconds for block in (ours, *peers.values()))
    rounds = ROUNDS if round_seconds < 1.0 else 5
    benchmark.pedantic(ours.run, setup=begin_round, rounds=rounds)
    foreign.append(watch.cores())
    quiet = [i for i in range(rounds) if foreign[i] <= FOREIGN_CORES]
    used = quiet if len(quiet) >= MIN_QUIET_ROUNDS else range(rounds)
    # pytest-benchmark saw blocks and every round; its own table shall show calls, and only the rounds that count.
    data = benchmark.stats.stats.data
    mine = [seconds / ours.repeats for seconds in data]
    data[:] = [mine[i] for i in used]
    seconds = statistics.median(data)
    quartiles = statistics.quantiles(data, n=4)
    peak, peak_of = share_of_peak(case.bytes, case.flops, seconds, device, inputs.dtype) or (None, "")
    nominal_rate = nominal_matmul_rate(device, inputs.dtype)
    return Result(
        name=case.name,
        device=device,
        seconds=seconds,
        spread=(quartiles[2] - quartiles[0]) / seconds,
        peers={name: statistics.median(times[name][i] for i in used) for name in names},
        ratios={name: statistics.median(times[name][i] / mine[i] for i in used) for name in names},
        gates={name: gate for name, gate in case.gates.items() if name in names},
        bytes=case.bytes,
        flops=case.flops,
        tokens=case.tokens,
        peak=peak,
        peak_of=peak_of,
        nominal=case.flops / seconds / nominal_rate if case.flops and nominal_rate else None,
        quiet_rounds=len(quiet),
        rounds=rounds,
    )


class Inputs:
    """The arguments of a case, shared by ours and the peers; new ones for every call if a function overwrites them."""

    def __init__(self, case: Case, device: str, fresh: bool):
        self.case, self.device, self.fresh = case, device, fresh
        # On a GPU, calls take turns with sets that do not fit its cache together.
        copies = min(16, GPU_CACHE_BYTES // max(case.bytes, 1) + 1) if device == "cuda" and not fresh else 1
        self.sets = [case.make_inputs(device) for _ in range(copies)]
        floating = (t.dtype for t in leaves(self.sets) if t.is_floating_point())
        self.dtype = case.dtype or next(floating, torch.float32)

    def prepare(self) -> None:
        """What comes before the clock starts."""
        if self.fresh:
            self.sets = [self.case.make_inputs(self.device)]
        if self.device == "cuda":
            torch.cuda.synchronize()


class Block:
    """Calls of one function in a row, as many as fill BLOCK_SECONDS."""

    def __init__(self, function: Callable, inputs: Inputs):
        self.function, self.inputs, self.repeats, self.graph = function, inputs, 1, None
        self.time()  # the first call may compile, load code and grow the heap
        call = min(self.time() for _ in range(2))
        if not inputs.fresh:
            self.repeats = max(1, round(BLOCK_SECONDS / call))
        if inputs.device == "cuda" and not inputs.fresh and inputs.case.graph:
            self.repeats = min(self.repeats, MAX_GRAPH_CALLS)
            self.graph = captured(self.calls)
            call = min(self.time() for _ in range(2))
        self.seconds = call * self.repeats

    def calls(self) -> None:
        """Outputs are dropped at once, so that every call allocates its own."""
        sets = self.inputs.sets
        for i in range(self.repeats):
            self.function(*sets[i % len(sets)])

    def run(self) -> None:
        """The timed region."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.calls()
        if self.inputs.device == "cuda":
            torch.cuda.synchronize()

    def time(self) -> float:
        """Seconds per call over one block."""
        self.inputs.prepare()
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) / self.repeats


def captured(calls: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of the calls, or None with a warning where they cannot be captured: if they synchronise, say."""
    try:
        torch.cuda.synchronize()
        _refuse_waits(calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        graph.replay()
        torch.cuda.synchronize()
        return graph
    except RuntimeError as error:
        warnings.warn(f"timed call by call, not as a CUDA graph: {error}", stacklevel=2)
        return None


def _refuse_waits(calls: Callable[[], None]) -> None:
    """RuntimeError if the calls wait for the host. A capture that fails of it leaves torch's random state and allocator
    as if it went on, and nothing after it could be measured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class ForeignLoad:
    """Cores that other processes (or other guests of the host) used since `start`, from /proc/stat."""

    def __init__(self, patience: float):
        self.patience = patience

    def wait_until_quiet(self) -> None:
        """Returns after a quiet instant, or when the patience of all calls together is used up."""
        while self.patience > 0:
            self.start()
            time.sleep(BLOCK_SECONDS)
            if self.cores() <= FOREIGN_CORES:
                return
            self.patience -= BLOCK_SECONDS

    def start(self) -> None:
        self._begin = self._now()

    def cores(self) -> float:
        wall, busy, own = (end - begin for begin, end in zip(self._begin, self._now(), strict=True))
        # /proc/stat counts ticks per CPU: two of them are within its error.
        return max(0.0, busy - own - 2 * TICK_SECONDS) / wall

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = os.times()
        try:
            with open("/proc/stat") as stat:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) * TICK_SECONDS
        except OSError:  # not Linux: no round is known to be disturbed
            busy = own.user + own.system
        return time.perf_counter(), busy, own.user + own.system


def leaves(value) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in leaves(item)] if isinstance(value, (tuple, list)) else []


def _copy(value, dtype: torch.dtype | None = None):
    """Detached copies of the tensors in `value`; floating ones in `dtype` if given."""
    if isinstance(value, (tuple, list)):
        return tuple(_copy(item, dtype) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    wide = value.detach().to(dtype) if dtype and value.is_floating_point() else value.detach()
    return wide.clone().requires_grad_(value.requires_grad)


def _check(case: Case, device: str) -> tuple[dict[str, Callable], bool]:
    """Refuses constant data, a wrong op, a peer that computes something else.

    Gives the peers to compare with on `device`, and whether one of the functions overwrites its inputs.
    """
    inputs = case.make_inputs(device)
    for tensor in leaves(inputs):
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            raise ValueError(f"{case.name}: make_inputs must give random data, got a constant tensor")
    overwrites = False

    def call(function):
        nonlocal overwrites
        given = _copy(inputs)
        outputs = leaves(function(*given))
        overwrites |= not all(torch.equal(a, b) for a, b in zip(leaves(given), leaves(inputs), strict=True))
        return outputs

    ours = call(case.ours)
    case.check(ours, *inputs)

    def check_peer(name, peer):
        for index, (a, b) in enumerate(zip(ours, call(peer), strict=False)):
            if a.shape != b.shape:
                raise ValueError(f"{case.name}: {name}: output {index} has shape {list(b.shape)}, ours {list(a.shape)}")
            if a.is_floating_point() and (a.double() - b.double()).norm() > 0.05 * a.double().norm():
                raise ValueError(f"{case.name}: {name}: output {index} differs from ours by more than 5 %")

    peers = dict(case.peers)
    for name, peer in case.peers.items():
        check_peer(name, peer)
    for name, peer in case.gpu_peers.items():
        if device != "cuda" or peer is None:
            continue
        try:
            check_peer(name, peer)
            peers[name] = peer
        except Exception as error:  # what others installed here must not cost the comparison with torch
            warnings.warn(f"{case.name}: {name} is left out: {error!r}", stacklevel=2)
    return peers, overwrites
