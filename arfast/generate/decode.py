"""One decode step of a model: a token per sequence in, the logits that follow out; on a GPU as one CUDA graph, on the
CPU as one op."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arfast.generate.dense_step import DenseStep, has_hooks
from arfast.models import CausalLM
from arfast.nn import KVCache, PaddedSource

STEPS_AT_ONCE = 8  # of a model that does not come back to Python for each, where the user may interrupt it


def decode_one_token(model: Any, tokens: Tensor, cache: KVCache) -> Tensor:
    """Store one token per sequence [B]; the logits [B, V] that follow."""
    return model(tokens[:, None], cache=cache).logits[:, -1]


class DecodeStep:
    """`decode_one_token`, again and again, launched as a whole.

    A step of a small batch is hundreds of kernels of a few microseconds, and the host cannot launch them that fast. On
    a GPU the first call runs like any forward pass, the second is captured as a CUDA graph, and from then on a call
    replays it. What a replay would not do as the code says is not captured: models other than CausalLM, hooks,
    autocast (its casts of the weights end with it). A capture that fails warns, and every call is a forward pass then.

    On the CPU a call is one `ops.decode_step`, with the parameters that the model has then, for a dense CausalLM in
    float32, bfloat16 or float16; a forward pass for all others, under autocast, and with hooks that are there in the
    first call.

    The graph reads the memory that it was captured with: changes in place of parameters and cache (an optimizer's step,
    `set_lengths`, `reset`, another prompt) are seen, parameters moved elsewhere are not.

    Args:
        model: a CausalLM.
        cache: the sequences to continue, at least one token each.
        then: called with the logits of every step, and replayed with it: a choice of the next tokens, say. It must do
            all it does on the device and in memory that stays.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> cache = StaticKVCache(model.config, batch_size=1, max_length=64)
        >>> with torch.no_grad():
        ...     logits = model(torch.tensor([[1, 2, 3]]), cache=cache).logits[:, -1]
        >>> step = DecodeStep(model, cache)
        >>> for _ in range(10):
        ...     logits = step(logits.argmax(-1))
        >>> cache.lengths.tolist()
        [13]
    """

    def __init__(self, model: Any, cache: KVCache, then: Callable[[Tensor], None] | None = None):
        self.model, self.cache, self.then = model, cache, then
        self.tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.k.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # the graph's
        self._memory: list[Tensor] = []  # what the graph reads and writes lives as long as the graph
        self._source: PaddedSource | None = None
        self._warm = self._refused = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Store tokens, int64 [B]; the logits [B, V] that follow, which the next call overwrites."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(tokens)
        if tokens.shape != self.tokens.shape:
            expected = f"one per sequence of the cache, {list(self.tokens.shape)}"
            raise ValueError(f"DecodeStep: tokens must be {expected}, got {list(tokens.shape)}")
        if self._is_dense:
            return self._step(tokens)
        self.tokens.copy_(tokens)
        if self.graph is None:
            if not self._warm or not self._can_capture() or not self._capture():
                self._warm = True
                return self._step(self.tokens)
        else:
            if self.cache.k is not self._memory[0] or self.cache.source is not self._source:
                raise ValueError("DecodeStep: cache must keep its memory, got another one (select, another source)")
            self.cache.advance()
        self.graph.replay()
        return self._logits

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Store a few tokens per sequence, int64 [B, T]; the logits [B, T, V] that follow each. Not captured, and
        without `then`."""
        if self._is_dense:
            return self._dense(tokens)
        return self.model(tokens, cache=self.cache).logits

    @property
    def _is_dense(self) -> bool:
        return self._dense is not None and not torch.is_autocast_enabled("cpu")

    @functools.cached_property
    def _dense(self) -> DenseStep | None:
        return DenseStep(self.model, self.cache) if DenseStep.serves(self.model, self.cache) else None

    @property
    def dense(self) -> DenseStep | None:
        """What makes a step one op, where that can be."""
        return self._dense if self._is_dense else None

    def _step(self, tokens: Tensor) -> Tensor:
        logits = self._dense(tokens) if self._is_dense else decode_one_token(self.model, tokens, self.cache)
        if self.then is not None:
            self.then(logits)
        return logits

    def _can_capture(self) -> bool:
        if self._refused or not (self.cache.k.is_cuda and isinstance(self.model, CausalLM)):
            return False
        if torch.is_autocast_enabled("cuda"):
            return False
        return not has_hooks(self.model)

    def _capture(self) -> bool:
        """Records a forward pass, which counts its tokens on the host but does nothing on the GPU."""
        graph, cache = torch.cuda.CUDAGraph(), self.cache
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on with their work
                self._logits = self._step(self.tokens)
        except RuntimeError as error:
            warnings.warn(f"DecodeStep: decoding goes on without a CUDA graph: {error}", stacklevel=3)
            cache.set_lengths(cache.lengths)  # the host may have counted tokens that the GPU has not seen
            self._refused = True
            return False
        # Detached: the memory of today, also if a parameter moves or the rotary tables grow.
        state = [*self.model.parameters(), *self.model.buffers(), cache.v, cache.lengths, cache.seqlens]
        state += [] if cache.slots is None else [cache.slots]
        self._memory = [cache.k, *(tensor.detach() for tensor in state)]
        self._source = cache.source
        self.graph = graph
        return True


def looks_up(step: int, max_steps: int, logits: Tensor) -> bool:
    """Whether a loop asks after this step how it goes: on a GPU, which it would have to wait for, now and then."""
    return not logits.is_cuda or step % 8 == 7 or step + 1 == max_steps
