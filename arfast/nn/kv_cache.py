"""Keys and values of past tokens in memory that is allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arfast import ops

if TYPE_CHECKING:
    from .cross_attention import PaddedSource


class KVCache:
    """What a forward pass does with a cache of R sequences of at most `max_length` tokens.

    It calls `begin` once, then `append` in every layer (`update` in a pass that does not extend), then `commit`. If it
    fails in between, `lengths` are unchanged and the slots past them are garbage that nobody reads.

    A pass that extends changes its state in place and never waits for the device, so a CUDA graph of it can be replayed
    for the tokens that follow: see `advance`. What the host knows is a bound on the lengths.

    Attributes:
        k, v: [layers, rows, max_length, Hkv, D]; position p of sequence r is at [:, r, p], or at [:, slots[r, p], p].
        slots: int32 [R, max_length] or None: `beam_slots` of `ops.attention_decode` and `ops.kv_append`.
        lengths: int32 [R], tokens stored per sequence.
        seqlens: int32 [R], lengths including the tokens of the forward pass that runs.
        extends: whether that pass attends to tokens stored before it.
        source: what an encoder-decoder's sequences are translations of, or None.
    """

    slots: Tensor | None = None
    source: PaddedSource | None = None

    def __init__(self, k: Tensor, v: Tensor, batch_size: int):
        self.k, self.v = k, v
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=k.device)
        self.seqlens = torch.zeros_like(self.lengths)
        self.extends = False
        self._longest = 0  # bound on lengths that the host knows without waiting for the device
        self._next_longest = 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self.k.shape[2]

    def begin(self, seqlen: int) -> Tensor:
        """Reserve the next `seqlen` positions of every sequence; returns them, int64 [R, seqlen]."""
        self._reserve(self._longest + seqlen)
        self.extends = self._longest > 0
        torch.add(self.lengths, seqlen, out=self.seqlens)
        return self.lengths[:, None] + torch.arange(seqlen, device=self.lengths.device)

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Store keys, rotated, and values of one layer in a pass that extends; q, rotated: see `ops.kv_append`."""
        self._check_dtype(k)
        caches = self.k[layer], self.v[layer]
        return ops.kv_append(q, k, v, cos, sin, *caches, self.seqlens, beam_slots=self.slots)

    def commit(self) -> None:
        """Count the tokens of this pass as stored."""
        self.lengths.copy_(self.seqlens)
        self._longest = self._next_longest

    def advance(self, seqlen: int = 1) -> None:
        """Before a CUDA graph of a pass with `seqlen` tokens is replayed: what `begin` does on the host alone.

        The replay itself changes `lengths`. Raises ValueError when there is no room for the tokens.
        """
        self._reserve(self._longest + seqlen)
        self._longest = self._next_longest

    def set_lengths(self, lengths: Tensor, longest: int | None = None) -> None:
        """Forget the tokens past `lengths` [R], which must not exceed the present lengths.

        With `longest`, their maximum, nothing is checked and the host does not wait for the device.
        """
        if longest is not None:
            self.lengths.copy_(lengths)
            self._longest = longest
            return
        if lengths.shape != self.lengths.shape or bool(((lengths < 0) | (lengths > self.lengths)).any()):
            name, limits = type(self).__name__, self.lengths.tolist()
            raise ValueError(f"{name}: lengths must be in [0, {limits}], got {lengths.tolist()}")
        self.lengths.copy_(lengths)
        self._longest = int(self.lengths.max())

    def _reserve(self, longest: int) -> None:
        if longest > self.max_length:
            name = type(self).__name__
            raise ValueError(f"{name}: max_length must be at least {longest} for this, got {self.max_length}")
        self._next_longest = longest

    def _check_dtype(self, k: Tensor) -> None:
        if k.dtype != self.k.dtype:
            raise TypeError(f"{type(self).__name__}: dtype must be the model's, {k.dtype}, got {self.k.dtype}")


class StaticKVCache(KVCache):
    """Keys and values of `batch_size` sequences of at most `max_length` tokens; every sequence starts at slot 0.

    Args:
        config: a CausalLMConfig (num_hidden_layers, num_key_value_heads and head_dim are read).
        batch_size: number of sequences.
        max_length: slots per sequence.
        dtype, device: of the keys and values; the dtype must be that of the model's activations.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> cache = StaticKVCache(model.config, batch_size=1, max_length=64)
        >>> with torch.no_grad():
        ...     logits = model(torch.tensor([[1, 2, 3]]), cache=cache).logits[:, -1]
        ...     logits = model(logits.argmax(-1, keepdim=True), cache=cache).logits[:, -1]
        >>> cache.lengths.tolist()
        [4]
    """

    def __init__(
        self,
        config,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StaticKVCache: {name} must be a positive integer, got {value!r}")
        shape = (config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        super().__init__(k, v, batch_size)
        self._places = None

    @classmethod
    def over(cls, k: Tensor, v: Tensor) -> StaticKVCache:
        """A cache in memory that stands: [layers, batch, max_length, Hkv, D]."""
        cache = cls.__new__(cls)
        KVCache.__init__(cache, k, v, k.shape[1])
        cache._places = None
        return cache

    def begin(self, seqlen: int) -> Tensor:
        positions = super().begin(seqlen)
        if not self.extends:
            first = torch.arange(self.batch_size, device=self.lengths.device) * self.max_length
            self._places = (first[:, None] + positions).view(-1)
        return positions

    def begin_packed(self, cu_seqlens: Tensor, positions: Tensor, document: Tensor) -> None:
        """Reserve slots for a packed batch of prompts, one per sequence, in an empty cache (see `packed_positions`)."""
        if len(cu_seqlens) != self.batch_size + 1:
            raise ValueError(
                f"StaticKVCache: cu_seqlens must hold one document per sequence, {self.batch_size}, "
                f"got {len(cu_seqlens) - 1}"
            )
        if self._longest > 0:
            raise ValueError(f"StaticKVCache: a packed batch must come first, got a cache of length {self._longest}")
        self.seqlens.copy_(cu_seqlens.diff())
        self._reserve(int(self.seqlens.max()))
        self.extends = False
        self._places = document * self.max_length + positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store keys and values [..., Hkv, D] of the reserved slots of one layer, in a pass that does not extend."""
        self._check_dtype(k)
        heads = k.shape[-2:]
        rows = self.batch_size * self.max_length
        self.k[layer].view(rows, *heads).index_copy_(0, self._places, k.reshape(-1, *heads))
        self.v[layer].view(rows, *heads).index_copy_(0, self._places, v.reshape(-1, *heads))

    def reset(self) -> None:
        """Forget everything."""
        self.lengths.zero_()
        self._longest = 0
        self.source = None

    def select(self, parents: Tensor) -> None:
        """Let sequence i continue what is stored as sequence parents[i]: int64, in [0, R).

        With as many parents as sequences the memory is reused; another number gives the cache another batch size
        (finished sequences that leave).
        """
        if len(parents) == self.batch_size:
            used = slice(0, self._longest)
            self.k[:, :, used] = self.k[:, parents, used]
            self.v[:, :, used] = self.v[:, parents, used]
            self.lengths.copy_(self.lengths[parents])
        else:
            self.k, self.v = self.k[:, parents], self.v[:, parents]
            self.lengths, self.seqlens = self.lengths[parents], self.seqlens[parents]
        if self.source is not None:
            self.source = self.source.select(parents)


class BranchedKVCache(KVCache):
    """Keys and values of R sequences that continue B prompts, each of which is stored once: beams or samples.

    The memory is one run of tokens, B prompts of up to P and then R continuations of up to T. It is seen as a cache
    whose batch stride is one token, as its row stride is: position p at slot s is token s + p, so that one slot serves
    a whole prompt, and one a whole continuation. A beam that continues another one takes over its slots: nothing is
    copied.

    Args:
        config: a CausalLMConfig.
        num_prompts, prompt_length: B and P.
        num_rows, max_new_tokens: R and T.
        shortest_prompt: a bound on the prompts' lengths from below. The memory holds prompt_length - shortest_prompt
            tokens more than are ever stored.
        dtype, device: as for StaticKVCache.

    Attributes:
        prompts: a StaticKVCache of B sequences, to be filled first; then `branch`.
        slots: int32 [R, P + T], see KVCache; those of generated tokens may be changed between passes.
        own_slots: int32 [R], where a row stores its own tokens.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> cache = BranchedKVCache(model.config, num_prompts=1, prompt_length=3, num_rows=4, max_new_tokens=9)
        >>> with torch.no_grad():
        ...     logits = model(torch.tensor([[1, 2, 3]]), cache=cache.prompts).logits[:, -1]
        ...     cache.branch(torch.zeros(4, dtype=torch.int64))
        ...     logits = model(logits.topk(4).indices.view(4, 1), cache=cache).logits
        >>> logits.shape, cache.lengths.tolist()
        (torch.Size([4, 1, 4096]), [4, 4, 4, 4])
    """

    def __init__(
        self,
        config,
        num_prompts: int,
        prompt_length: int,
        num_rows: int,
        max_new_tokens: int,
        shortest_prompt: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        self._prompt_length, self._max_new_tokens = prompt_length, max_new_tokens
        prompt_tokens, max_length = num_prompts * prompt_length, prompt_length + max_new_tokens
        heads = (config.num_key_value_heads, config.head_dim)
        # The last slot is that of the last row, if its prompt is short; it has P + T positions all the same.
        num_tokens = prompt_tokens + num_rows * max_new_tokens + prompt_length - shortest_prompt
        memory = [
            torch.zeros((config.num_hidden_layers, num_tokens, *heads), dtype=dtype, device=device) for _ in range(2)
        ]
        super().__init__(*(_overlapping(tokens, max_length) for tokens in memory), num_rows)
        prompts = (tokens[:, :prompt_tokens].unflatten(1, (num_prompts, prompt_length)) for tokens in memory)
        self.prompts = StaticKVCache.over(*prompts)
        self.slots = torch.zeros(num_rows, max_length, dtype=torch.int32, device=device)
        self.own_slots = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def begin(self, seqlen: int) -> Tensor:
        if self._longest == 0:
            raise ValueError("BranchedKVCache: prompts must be stored and branched first, got an empty cache")
        return super().begin(seqlen)

    def branch(self, prompt_of: Tensor) -> None:
        """Let row r begin as a continuation of the stored prompt prompt_of[r]: int64 [R], in [0, B)."""
        self.lengths.copy_(self.prompts.lengths[prompt_of])
        self._longest = self.prompts._longest
        self.source = None if self.prompts.source is None else self.prompts.source.select(prompt_of)
        rows = torch.arange(self.batch_size, device=self.slots.device)
        generated = self.prompts.batch_size * self._prompt_length + rows * self._max_new_tokens
        self.own_slots.copy_(generated - self.lengths)
        in_prompt = torch.arange(self.max_length, device=self.slots.device) < self.lengths[:, None]
        self.slots.copy_(torch.where(in_prompt, (prompt_of * self._prompt_length)[:, None], self.own_slots[:, None]))


def _overlapping(tokens: Tensor, max_length: int) -> Tensor:
    """[layers, N, Hkv, D] as [layers, slots, max_length, Hkv, D]: slot s begins at token s."""
    layers, num_tokens, *heads = tokens.shape
    layer_stride, token_stride, *strides = tokens.stride()
    shape = (layers, num_tokens - max_length + 1, max_length, *heads)
    return tokens.as_strided(shape, (layer_stride, token_stride, token_stride, *strides))
