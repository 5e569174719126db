"""Several gloo ranks of a function on one machine, with a deadline: `run_ranks`.

Ranks are forked from a server that has imported torch, so that one costs some 50 ms and not an import.
"""

import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_GRACE = 3.0  # seconds that the other ranks have to tell their own error after the first one
_START = 60.0  # seconds that the server may need, once, to import torch on a busy machine
_PRELOADED = [  # what every rank would import otherwise; torch._dynamo comes with the first optimizer
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.profiler",
    "arfast.models",
    "arfast.train",
    "arfast.distributed",
]


class RanksFailed(AssertionError):
    """Not every rank returned; ``errors``: what each of the others has to say, by rank."""

    def __init__(self, errors: dict[int, str]):
        super().__init__("\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(errors.items())))
        self.errors = errors


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, init: bool = True
) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world_size`` ranks.

    The ranks have one thread each, and the variables that torchrun sets.

    Args:
        function: of a module's top level; its module is imported again in every rank.
        args: anything that can be pickled without the test's own classes.
        timeout: seconds until a rank is ended, and its stacks reported.
        init: with a default process group (gloo) around the call, which ends with a barrier.

    Raises:
        RanksFailed: a rank raised, died or did not return in time. No rank is left running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        source = (inspect.getsourcefile(function), function.__qualname__)
        pipes, processes = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                options = dict(rank=rank, world_size=world_size, port=port, folder=folder, timeout=timeout, init=init)
                process = context.Process(target=_rank_main, args=(theirs, source, args, options), daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            results = _collect(pipes, processes, folder, timeout + _START)
            for process in processes:
                process.join(_GRACE)
            return results
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _collect(pipes: list, processes: list, folder: str, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(errors) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in errors]
        ready = multiprocessing.connection.wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                processes[rank].join(1.0)
                ok, value = False, f"died with exit code {processes[rank].exitcode}\n{_log(folder, rank)}"
            (results if ok else errors)[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + _GRACE)
    for rank in set(range(len(pipes))) - results.keys() - errors.keys():
        errors[rank] = f"did not return\n{_log(folder, rank)}"
    if errors:
        raise RanksFailed(errors)
    return [results[rank] for rank in range(len(pipes))]


def _log(folder: str, rank: int) -> str:
    with contextlib.suppress(OSError):
        return (Path(folder) / f"rank-{rank}.log").read_text()[-4000:]
    return ""


def _rank_main(pipe: Any, source: tuple[str, str], args: tuple, options: dict[str, Any]) -> None:
    rank, world_size, folder = options["rank"], options["world_size"], options["folder"]
    log = os.open(os.path.join(folder, f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    # Also when the test itself has been killed, nothing stays.
    faulthandler.dump_traceback_later(options["timeout"], exit=True, file=sys.stderr)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options["port"]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    try:
        answer = True, _call(source, args, options)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


def _call(source: tuple[str, str], args: tuple, options: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function = _load(*source)
    if not options["init"]:
        return function(*args)
    store = dist.FileStore(os.path.join(options["folder"], "store"), options["world_size"])
    ranks = dict(rank=options["rank"], world_size=options["world_size"])
    dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=options["timeout"]), **ranks)
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function of a file; by path, since tests are not importable by name."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[Path(path).stem] = module
    specification.loader.exec_module(module)
    return getattr(module, name)
