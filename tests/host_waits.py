"""Finds code that would make the host wait for a GPU, without a GPU: the tensors are on the CPU and say otherwise.

Such code cannot be captured in a CUDA graph, and lets a GPU idle until the host has caught up.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ANSWERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
COPIES = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.to}
# Their results, or the sizes of these, depend on values of the tensors.
READS = {
    "_local_scalar_dense",  # item, int, float, bool
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class HostWait(AssertionError):
    """The host would wait for the GPU here."""


@contextlib.contextmanager
def no_host_waits():
    """Within it, code sees CPU tensors as tensors on a GPU, and HostWait is raised wherever it would wait for them.

    Ops of arfast are taken at their word: what their bindings do for a GPU, only the emulated one sees.

    Raises:
        HostWait: a value is read, a result has a size that hangs on values, or data are copied from or to the host.
    """
    with pretended_gpu(COPIES), _Watch():
        yield


@contextlib.contextmanager
def pretended_gpu(refused=frozenset()):
    """Within it, Python code goes the way it goes for a GPU (`tensor.device`, `is_cuda` and `is_cpu` say so); the
    arithmetic is that of the CPU. `refused`: methods of Tensor that raise HostWait."""
    pretended, run_backward = _PretendedGPU(refused), torch.autograd._engine_run_backward

    def run_pretending(*args, **kwargs):
        with pretended:  # torch suspends it within torch.autograd.backward and grad
            return run_backward(*args, **kwargs)

    with mock.patch("torch.autograd._engine_run_backward", run_pretending), pretended:
        yield


class _PretendedGPU(TorchFunctionMode):
    """What Python asks of tensors. A copy that torch leaves out on the CPU is seen here alone."""

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in ANSWERS:
            return ANSWERS[function]
        devices = {argument for argument in (*args, *kwargs.values()) if isinstance(argument, (torch.device, str))}
        if function in self.refused and (function is not Tensor.to or devices & {CPU, "cpu"}):
            raise HostWait(f"Tensor.{function.__name__} copies from a GPU to the host")
        args = [_real(argument) for argument in args]
        return function(*args, **{name: _real(argument) for name, argument in kwargs.items()})


def _real(argument):
    return CPU if isinstance(argument, torch.device) and argument == GPU else argument


class _Watch(TorchDispatchMode):
    """What torch runs in the end, also from within its own C++ code."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in READS:
            raise HostWait(f"{function} reads values on the host")
        if name == "lift_fresh":
            raise HostWait("torch.tensor copies values of the host to a GPU")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostWait(f"{function} without output_size reads a size on the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                raise HostWait(f"{function} with a mask reads a size on the host (torch.where does not)")
        return function(*args, **kwargs)
