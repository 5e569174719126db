"""CUDA graphs without a GPU: operations are recorded once and done again on the same tensors, without the Python code
between them.

A value that the host worked out while recording stays what it was, and a tensor that the code replaces in every pass
stays the first one: what goes wrong with a CUDA graph goes wrong here.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def recorded_graphs():
    """In place of torch.cuda.CUDAGraph and torch.cuda.graph within the block."""
    with mock.patch("torch.cuda.CUDAGraph", RecordedGraph), mock.patch("torch.cuda.graph", capture):
        yield


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []  # (function, args, kwargs, the tensors that it gave)

    def replay(self):
        for function, args, kwargs, outputs in self.operations:
            for out, new in zip(outputs, _tensors(function(*args, **kwargs)), strict=True):
                if out.data_ptr() != new.data_ptr():  # else it is what an operation in place, or a view, gave
                    out.copy_(new)


@contextlib.contextmanager
def capture(graph, **options):
    """In place of torch.cuda.graph: nothing has happened afterwards to the tensors that there were before."""
    recorder = _Recorder(graph)
    with recorder:
        yield
    for tensor, before in recorder.changed:
        tensor.copy_(before)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.changed = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensor = args[i] if i < len(args) else kwargs[argument.name]
                if tensor is not None:
                    self.changed.insert(0, (tensor, tensor.clone()))
        outputs = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, _tensors(outputs)))
        return outputs


def _tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
