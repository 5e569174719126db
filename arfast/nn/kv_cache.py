"""Keys and values of past tokens in memory that is allocated once."""

import torch
from torch import Tensor

from arfast import ops


class StaticKVCache:
    """Keys and values of `batch_size` sequences of at most `max_length` tokens; every sequence starts at slot 0.

    A forward pass calls `begin` once, then `append` in every layer (`update` in a pass that does not extend), then
    `commit`. If it fails in between, `lengths` are unchanged and the slots past them are garbage that nobody reads.

    A pass that extends changes its state in place and never waits for the device, so a CUDA graph of it can be replayed
    for the tokens that follow: see `advance`. What the host knows is a bound on the lengths.

    Args:
        config: a CausalLMConfig (num_hidden_layers, num_key_value_heads and head_dim are read).
        batch_size: number of sequences.
        max_length: slots per sequence.
        dtype, device: of the keys and values; the dtype must be that of the model's activations.

    Attributes:
        k, v: [layers, batch, max_length, Hkv, D].
        lengths: int32 [batch], tokens stored per sequence.
        seqlens: int32 [batch], lengths including the tokens of the forward pass that runs.
        extends: whether that pass attends to tokens stored before it.

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
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.seqlens = torch.zeros_like(self.lengths)
        self.extends = False
        self._longest = 0  # bound on lengths that the host knows without waiting for the device
        self._next_longest = 0
        self._slots = None

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_length(self) -> int:
        return self.k.shape[2]

    def begin(self, seqlen: int) -> Tensor:
        """Reserve the next `seqlen` slots of every sequence; returns their positions, int64 [batch, seqlen]."""
        self._reserve(self._longest + seqlen)
        self.extends = self._longest > 0
        torch.add(self.lengths, seqlen, out=self.seqlens)
        positions = self.lengths[:, None] + torch.arange(seqlen, device=self.lengths.device)
        if not self.extends:
            first = torch.arange(self.batch_size, device=self.lengths.device) * self.max_length
            self._slots = (first[:, None] + positions).view(-1)
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
        self._slots = document * self.max_length + positions

    def _reserve(self, longest: int) -> None:
        if longest > self.max_length:
            raise ValueError(f"StaticKVCache: max_length must be at least {longest} for this, got {self.max_length}")
        self._next_longest = longest

    def update(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store keys and values [..., Hkv, D] of the reserved slots of one layer, in a pass that does not extend."""
        self._check_dtype(k)
        self.k[layer].view(-1, *k.shape[-2:]).index_copy_(0, self._slots, k.reshape(-1, *k.shape[-2:]))
        self.v[layer].view(-1, *v.shape[-2:]).index_copy_(0, self._slots, v.reshape(-1, *v.shape[-2:]))

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Store keys, rotated, and values of one layer in a pass that extends; q, rotated: see `ops.kv_append`."""
        self._check_dtype(k)
        return ops.kv_append(q, k, v, cos, sin, self.k[layer], self.v[layer], self.seqlens)

    def _check_dtype(self, k: Tensor) -> None:
        if k.dtype != self.k.dtype:
            raise TypeError(f"StaticKVCache: dtype must be the model's, {k.dtype}, got {self.k.dtype}")

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
        """Forget the tokens past `lengths` [batch], which must not exceed the present lengths.

        With `longest`, their maximum, nothing is checked and the host does not wait for the device.
        """
        if longest is not None:
            self.lengths.copy_(lengths)
            self._longest = longest
            return
        if lengths.shape != self.lengths.shape or bool(((lengths < 0) | (lengths > self.lengths)).any()):
            raise ValueError(f"StaticKVCache: lengths must be in [0, {self.lengths.tolist()}], got {lengths.tolist()}")
        self.lengths.copy_(lengths)
        self._longest = int(self.lengths.max())

    def reset(self) -> None:
        """Forget everything."""
        self.lengths.zero_()
        self._longest = 0

    def select(self, parents: Tensor) -> None:
        """Let sequence i continue what is stored as sequence parents[i]: int64, in [0, batch).

        With as many parents as sequences the memory is reused (a step of beam search); another number gives the cache
        another batch size (beams that start from one prompt, finished sequences that leave).
        """
        if len(parents) == self.batch_size:
            used = slice(0, self._longest)
            self.k[:, :, used] = self.k[:, parents, used]
            self.v[:, :, used] = self.v[:, parents, used]
            self.lengths.copy_(self.lengths[parents])
        else:
            self.k, self.v = self.k[:, parents], self.v[:, parents]
            self.lengths, self.seqlens = self.lengths[parents], self.seqlens[parents]
