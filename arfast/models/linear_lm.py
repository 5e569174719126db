"""Language models that are linear in the embeddings of the tokens so far: p(y | x[1..t]) = softmax(U h[t]) with
h[t] the mean of E[x[i]] over all tokens or the last n, or as an n-gram model h[t] = sum over k < n of E_k[x[t - k]].

The n-gram model is the log-bilinear one of Mnih and Hinton, "Three new graphical models for statistical language
modelling" (ICML 2007), r = sum over k of C_k R[x[t - k]], with its products E_k = R C_k as the parameters; or that of
Bengio et al., "A neural probabilistic language model" (JMLR 2003), without its hidden layer.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arfast import ops
from arfast.nn import Embedding, KVCache
from arfast.nn.layout import packed_positions
from arfast.nn.trailing_sums import shift, trailing_sums

from .causal_lm import CausalLM
from .checks import ConfigChecks, is_integer

FAMILY = "arfast_linear"
_MAX_HEAD_DIM = 128
_INTEGERS = {"vocab_size": (1, 2**31 - 1), "hidden_size": (8, 2**20), "window": (1, 2**31 - 1)}
_NUMBERS = {"initializer_range": ("[", 0.0, math.inf, ")")}


@dataclass(frozen=True, kw_only=True)
class LinearLMConfig(ConfigChecks):
    """Sizes of a LinearLM.

    Args:
        vocab_size: V.
        hidden_size: d, a multiple of 8.
        window: how many tokens count, itself included; None: all since the start of the document.
        ngram: an embedding for each of the window's places, summed, instead of one embedding, averaged.
        initializer_range: standard deviation of the initial weights.
        bos_token_id, eos_token_id, pad_token_id: special tokens (eos may be several).

    The other attributes say how a cache stores the embeddings of tokens so far: as the values of attention with
    `num_hidden_layers` layers, one per table of embeddings.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    vocab_size: int
    hidden_size: int
    window: int | None = None
    ngram: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    num_experts: ClassVar[int] = 0
    tie_word_embeddings: ClassVar[bool] = False
    max_position_embeddings: ClassVar[int] = 2**31 - 1

    def __post_init__(self) -> None:
        self._check_integers(_INTEGERS, optional=("window",))
        self._require(self.hidden_size % 8 == 0, "hidden_size", "be a multiple of 8")
        self._check_booleans("ngram")
        if self.ngram:
            self._require(self.window is not None and self.window <= 4096, "window", "be at most 4096 with ngram")
        self._check_numbers(_NUMBERS)
        self._check_special_tokens()

    @property
    def num_hidden_layers(self) -> int:
        return self.window if self.ngram else 1

    @property
    def num_key_value_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def head_dim(self) -> int:
        return math.gcd(self.hidden_size, _MAX_HEAD_DIM)

    def flops_per_token(self, seqlen: int) -> float:
        """Of forward and backward pass: 6 per weight of the head, which is the only matrix that multiplies a token."""
        return 6.0 * self.vocab_size * self.hidden_size


class ContextEmbedding(nn.Module):
    """Token ids -> h, for all positions at once, or of new tokens and those that a cache holds."""

    def __init__(self, config: LinearLMConfig):
        super().__init__()
        self.config = config
        tables = (Embedding(config.vocab_size, config.hidden_size) for _ in range(config.num_hidden_layers))
        self.embed_tokens = nn.ModuleList(tables)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        with_aux_loss: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Token ids [B, T] -> hidden states [B * T, d], and nothing where `Decoder` has its experts' losses."""
        embedded, positions = [table(input_ids) for table in self.embed_tokens], None
        if cu_seqlens is not None:
            positions, document = packed_positions(cu_seqlens, input_ids.numel())
            embedded = [x.view(1, -1, x.shape[-1]) for x in embedded]
            if cache is not None:
                cache.begin_packed(cu_seqlens, positions, document)
        elif cache is not None:
            cache.begin(input_ids.shape[1])
        if cache is not None and cache.extends:
            hidden = self._with_cache(embedded, cache)
        else:
            hidden = self._combine(embedded, positions)
            for layer, values in enumerate(embedded if cache is not None else ()):
                cache.update(layer, self._heads(values), self._heads(values))
        return hidden.to(embedded[0].dtype).reshape(input_ids.numel(), -1), [], []

    def _combine(self, embedded: list[Tensor], positions: Tensor | None) -> Tensor:
        """h [B, T, d] of the tables' embeddings [B, T, d]."""
        if self.config.ngram:
            wide = torch.promote_types(embedded[0].dtype, torch.float32)
            return sum(shift(x.to(wide), steps, positions) for steps, x in enumerate(embedded))
        (x,), window = embedded, self.config.window
        places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        counts = (places if window is None else places.clamp(max=window - 1)) + 1
        return trailing_sums(x, window, positions) / counts[:, None]

    def _with_cache(self, embedded: list[Tensor], cache: KVCache) -> Tensor:
        """h of new tokens: a mean is attention whose queries are 0, one token before the last is a window of 0."""
        options, hidden = dict(beam_slots=cache.slots), []
        for layer, values in enumerate(map(self._heads, embedded)):
            cos = torch.ones(values.shape[:2].numel(), values.shape[-1] // 2, device=values.device)
            q = cache.append(layer, torch.zeros_like(values), values, values, cos, torch.zeros_like(cos))
            window, seqlens = self.config.window, cache.seqlens
            if self.config.ngram:
                window, seqlens = 1, (seqlens - layer).clamp(min=0)
            window = None if window is None else window - 1
            out = ops.attention_decode(q, cache.k[layer], cache.v[layer], seqlens, window=window, **options)
            hidden.append(out.flatten(2))
        return hidden[0] if len(hidden) == 1 else torch.stack(hidden).sum(0, dtype=torch.float32)

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.config.num_key_value_heads, self.config.head_dim))


class LinearLM(CausalLM):
    """A language model without layers: embeddings of the tokens so far, averaged or summed, then the output head.

    It is called, trained, saved, scored and sampled as `CausalLM`. The embeddings of all positions' contexts come from
    `arfast.nn.trailing_sums`; while generating, embeddings lie in a `KVCache`, so that beams and drafts work. There is
    no bias: a vector that all embeddings have in common serves as one.

    Args:
        vocab_size, hidden_size, window, settings: see `LinearLMConfig`.
        seed, dtype, device: see `CausalLM`.

    Example:
        >>> model = LinearLM(100, 32, window=3, ngram=True)
        >>> ids = torch.randint(0, 100, (2, 16))
        >>> model(ids).logits.shape
        torch.Size([2, 16, 100])
        >>> model(ids, labels=ids).loss.backward()
    """

    config_type = LinearLMConfig
    trunk_type = ContextEmbedding
    takes_positions = False

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        window: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ):
        config = LinearLMConfig(vocab_size=vocab_size, hidden_size=hidden_size, window=window, **settings)
        super().__init__(config, seed=seed, dtype=dtype, device=device)
        self.family = FAMILY

    @classmethod
    def from_config(cls, config: LinearLMConfig, **options: Any) -> "LinearLM":
        """The model of a configuration; options: seed, dtype, device."""
        return cls(**asdict(config), **options)

    def nearest_tokens(self, token: int, count: int = 10, table: int = 0) -> list[tuple[int, float]]:
        """The tokens whose embeddings point most nearly the same way, each with the cosine of the angle, largest first.

        Args:
            token: in [0, vocab_size).
            count: how many, itself not counted.
            table: of the n-gram model, the one of so many places before the last.
        """
        if not (is_integer(token) and 0 <= token < self.config.vocab_size):
            raise ValueError(f"LinearLM: token must be in [0, vocab_size={self.config.vocab_size}), got {token!r}")
        weight = self.model.embed_tokens[table].weight.detach().float()
        weight = nn.functional.normalize(weight - weight.mean(0), dim=1)
        cosines = weight @ weight[token]
        cosines[token] = -math.inf
        best = cosines.topk(min(count, len(cosines) - 1))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
