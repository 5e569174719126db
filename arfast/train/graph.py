"""Forward and backward pass of a micro-batch as a CUDA graph, launched as a whole for every micro-batch of its shapes.

Gray, "Getting started with CUDA graphs" (NVIDIA, 2019); as torch captures whole networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

_WARM_UP_RUNS = 2  # what is loaded, tuned or allocated once must not be part of a graph


class GraphedBackward:
    """A backward pass that is captured once for all arguments of the same shapes, and replayed.

    The memory of the activations stays taken; graphs of several shapes share it.

    Args:
        backward: adds to the gradients of ``parameters``, never waits for the device, and returns detached tensors; it
            gets the arguments by name.
        model: whose parameters and buffers ``backward`` reads; they must stay where they are.
        parameters: whose gradients it adds to.
    """

    def __init__(
        self, backward: Callable[..., list[Tensor]], model: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> None:
        self._backward, self._model, self._parameters = backward, model, parameters
        self._graphs: dict[tuple, _Graph] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # the ones that the graphs add to
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, batches: Sequence[Mapping[str, Tensor | None]]) -> list[list[Tensor]]:
        """Set the gradients to the sums over ``batches``, arguments on any device; what each of them returned."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for arguments in batches:
            if _shapes(arguments) not in self._graphs:
                self._graphs[_shapes(arguments)] = self._capture(arguments)
        torch._foreach_zero_([gradient for _, gradient in self._gradients])
        return [self._graphs[_shapes(arguments)].replay(arguments) for arguments in batches]

    def _capture(self, arguments: Mapping[str, Tensor | None]) -> _Graph:
        device = self._parameters[0].device
        static = {name: None if t is None else t.to(device, copy=True) for name, t in arguments.items()}
        # On the stream of the capture: autograd adds up a gradient where the forward pass met its parameter.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                self._backward(**static)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        options = dict(pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **options):
            outputs = self._backward(**static)
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        # Detached: the memory of today, also if the rotary tables grow.
        memory = [tensor.detach() for tensor in (*self._model.parameters(), *self._model.buffers())]
        return _Graph(graph, static, outputs, memory)


class _Graph:
    def __init__(
        self, graph: torch.cuda.CUDAGraph, static: dict[str, Tensor | None], outputs: list[Tensor], memory: list[Tensor]
    ) -> None:
        self._graph, self._static, self._outputs = graph, static, outputs
        self._memory = memory  # what the graph reads lives as long as the graph

    @torch.no_grad()
    def replay(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        for name, tensor in arguments.items():
            if tensor is not None:
                self._static[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]


def _shapes(arguments: Mapping[str, Tensor | None]) -> tuple:
    return tuple((name, None if t is None else tuple(t.shape)) for name, t in sorted(arguments.items()))


def with_empty_documents(cu_seqlens: Tensor) -> Tensor:
    """Offsets [documents + 1] with empty documents at the end, a power of two in all: few shapes serve all batches."""
    documents = len(cu_seqlens) - 1
    spare = (1 << (documents - 1).bit_length()) - documents
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(spare)])
