"""Time and memory of attention by sequence length: with the scores materialised, and fused.

One layer, forward and backward: q [1, T, H, D], k and v [1, T, Hkv, D] to all gradients. Every figure is measured in a
process of its own: the median of some passes, and how far the resident memory rose above what the inputs and the
libraries had (on a GPU: the allocator's maximum above the inputs).
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PATHS = ("eager", "fused")
_MAX_LENGTH = 1 << 20
# A pass may take this share of the memory that is free now.
_MEMORY_SHARE = 0.6
_SECONDS_PER_CASE, _MAX_PASSES = 2.0, 20


def measure_sequence_lengths(
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> Iterator[dict]:
    """One row per length: ``{"seqlen": T, "eager": {...}, "fused": {...}}``, each ``{"seconds", "bytes"}``, or
    ``{"error": why}`` for what does not fit into memory.

    Raises:
        ValueError: a length is out of range.
    """
    for seqlen in lengths:
        if not 1 <= seqlen <= _MAX_LENGTH:
            raise ValueError(f"doctor: sequence_lengths must be in [1, {_MAX_LENGTH}], got {seqlen}")
    shape = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device)
    for seqlen in lengths:
        yield {"seqlen": seqlen} | {path: _measure_apart(dict(shape, path=path, seqlen=seqlen)) for path in PATHS}


def table(rows: Sequence[dict]) -> str:
    """Markdown, aligned, so that it reads in a terminal too."""
    head = ["T", "eager, ms", "fused, ms", "times as fast", "eager, MiB", "fused, MiB", "times the memory"]
    cells = [head]
    for row in rows:
        eager, fused = (row[path] for path in PATHS)
        both = "error" not in eager and "error" not in fused
        cells.append([str(row["seqlen"]), *(_number(side, "seconds", 1e3) for side in (eager, fused))])
        cells[-1].append(f"{eager['seconds'] / fused['seconds']:.1f}" if both else "")
        cells[-1] += [_number(side, "bytes", 2**-20) for side in (eager, fused)]
        cells[-1].append(f"{eager['bytes'] / fused['bytes']:.1f}" if both else "")
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(lines)


def _number(side: dict, key: str, factor: float) -> str:
    return side["error"] if "error" in side else f"{side[key] * factor:,.1f}"


def _measure_apart(case: dict) -> dict:
    command = [
        sys.executable,
        "-m",
        "arfast.doctor.sequence_lengths",
        json.dumps(case | dict(threads=torch.get_num_threads())),
    ]
    # Python puts the current folder first, and in the source tree that is the package without its compiled library.
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    if result.returncode != 0:  # killed by the system
        return {"error": "out of memory" if result.returncode < 0 else result.stderr.strip().splitlines()[-1][:80]}
    return json.loads(result.stdout.splitlines()[-1])


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as a chain of torch's operators: scores and probabilities are [1, H, T, T]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1, dtype=torch.float32)
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)


def _measure_here(case: dict) -> dict:
    from arfast import ops

    torch.set_num_threads(case["threads"])
    function = eager_attention if case["path"] == "eager" else ops.attention
    device, dtype = case["device"], getattr(torch, case["dtype"])

    def inputs(seqlen: int) -> list[Tensor]:
        heads = (case["num_heads"], case["num_kv_heads"], case["num_kv_heads"])
        shapes = [(1, seqlen, h, case["head_dim"]) for h in heads]
        return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]

    def one_pass(tensors: list[Tensor], dout: Tensor) -> None:
        torch.autograd.grad(function(*tensors), tensors, dout)

    small = inputs(32)
    one_pass(small, torch.ones_like(small[0]))  # loads what is loaded once
    tensors = inputs(case["seqlen"])
    dout = torch.randn_like(tensors[0])
    memory = _GpuMemory() if device == "cuda" else ProcessMemory()
    if device == "cpu":
        limit = int(_MEMORY_SHARE * _free_bytes())
        used = int(_status("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    try:
        seconds = _timed(lambda: one_pass(tensors, dout), device)
        return {"seconds": seconds, "bytes": memory.peak()}
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        return {"error": "out of memory"}


def _timed(function, device: str) -> float:
    """Median seconds of a pass, after one that is not counted where it is short."""
    durations: list[float] = []
    while not durations or (len(durations) < _MAX_PASSES and sum(durations) < _SECONDS_PER_CASE):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:] or durations)


class ProcessMemory:
    """How far the resident set of this process rises, by the kernel's own high-water mark."""

    def __init__(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark falls to what is resident now
        self.before = int(_status("VmRSS"))

    def peak(self) -> int:
        return max(0, int(_status("VmHWM")) - self.before) * 1024


class _GpuMemory:
    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


def _status(key: str) -> str:
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{key}:"))


def _free_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.loads(sys.argv[1]))))
