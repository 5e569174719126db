"""Encoder-decoder with cross-attention (Vaswani et al., arXiv 1706.03762), trained and used as a CausalLM is: a
document is a source, a separator and a target, p(target | source) = product over t of p(y[t] | source, y[1..t - 1]).

The encoder reads what stands before a document's first separator, the decoder begins with the separator and predicts
what follows. Layers are those of Llama (RMSNorm before each part, rotary positions in self-attention, SwiGLU); encoder,
decoder and output head share one embedding (Press and Wolf, arXiv 1608.05859).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from arfast.nn import (
    Attention,
    CrossAttention,
    Embedding,
    KVCache,
    PackedSource,
    RMSNorm,
    RotaryEmbedding,
    Source,
    SwiGLU,
    TokenLayout,
)
from arfast.nn.layout import packed_positions

from .causal_lm import IGNORE_INDEX, CausalLM, shift_labels
from .checks import ConfigChecks, is_integer

FAMILY = "arfast_encoder_decoder"
_INTEGERS = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "encoder_layers": (1, 4096),
    "decoder_layers": (1, 4096),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "max_position_embeddings": (1, 2**31 - 1),
}
_NUMBERS = {
    "rope_theta": ("(", 0.0, math.inf, ")"),
    "rms_norm_eps": ("[", 0.0, 1.0, ")"),
    "initializer_range": ("[", 0.0, math.inf, ")"),
}


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ConfigChecks):
    """Sizes of an EncoderDecoder.

    Args:
        vocab_size, hidden_size, intermediate_size: V, d, I.
        encoder_layers, decoder_layers: numbers of layers.
        num_attention_heads, num_key_value_heads: H and Hkv, a divisor of H (None: H); heads have D = d / H channels, an
            even number.
        separator_token_id: ends the source, and is the decoder's first input.
        max_position_embeddings: most tokens of a document that the model is meant for.
        rope_theta: see `arfast.nn.inverse_frequencies`.
        rms_norm_eps, initializer_range: as of CausalLMConfig.
        bos_token_id, eos_token_id, pad_token_id: special tokens (eos may be several).

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    encoder_layers: int
    decoder_layers: int
    num_attention_heads: int
    separator_token_id: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    num_experts: ClassVar[int] = 0
    tie_word_embeddings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        self._check_integers(_INTEGERS)
        heads = self.num_attention_heads
        self._require(heads % self.num_key_value_heads == 0, "num_key_value_heads", f"divide {heads} heads")
        self._require(self.hidden_size % (2 * heads) == 0, "hidden_size", f"be a multiple of {2 * heads}")
        self._check_numbers(_NUMBERS)
        self._check_special_tokens()
        valid = is_integer(self.separator_token_id) and 0 <= self.separator_token_id < self.vocab_size
        self._require(valid, "separator_token_id", f"be in [0, vocab_size={self.vocab_size})")

    @property
    def num_hidden_layers(self) -> int:
        """Those that a cache has keys and values of: the decoder's."""
        return self.decoder_layers

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def flops_per_token(self, seqlen: int) -> float:
        """As of CausalLMConfig, for documents of `seqlen` tokens of which one half are sources."""
        d, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = 2 * d * self.num_key_value_heads * self.head_dim
        attention, feed_forward = 2 * d * heads + keys, 3 * d * self.intermediate_size
        encoder = self.encoder_layers * (attention + feed_forward) + self.decoder_layers * keys
        decoder = self.decoder_layers * (2 * attention - keys + feed_forward)
        # Half of the tokens see seqlen / 2 others in the encoder; the rest as many there, and half of them behind them.
        visible = (self.encoder_layers + 1.5 * self.decoder_layers) * seqlen / 2
        return 6.0 * self.vocab_size * d + (6.0 * (encoder + decoder) + 12.0 * heads * visible) / 2


class Sides(NamedTuple):
    """Where in N packed tokens the sources and the targets stand.

    source, target: int64 [M] and [T], indices of tokens, rising.
    cu_sources, cu_targets: int32 [documents + 1], the documents' boundaries in either.
    """

    source: Tensor
    target: Tensor
    cu_sources: Tensor
    cu_targets: Tensor


def split_documents(input_ids: Tensor, cu_seqlens: Tensor | None, separator: int) -> Sides:
    """Cut documents, packed or the rows of input_ids [B, T], before the first separator of each; one without is left
    out, as padding is. Waits for the device."""
    batch, length = input_ids.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * length
    document = packed_positions(cu_seqlens, input_ids.numel())[1]
    separators = nn.functional.pad((input_ids.reshape(-1) == separator).cumsum(0), (1, 0))
    before, total = separators[cu_seqlens[:-1].long()], separators[cu_seqlens.long()].diff()
    is_target = separators[1:] > before[document]
    is_source = ~is_target & (total > 0)[document]
    offsets = (nn.functional.pad(side.cumsum(0), (1, 0))[cu_seqlens.long()].int() for side in (is_source, is_target))
    return Sides(is_source.nonzero().flatten(), is_target.nonzero().flatten(), *offsets)


class EncoderLayer(nn.Module):
    """Attention in both directions, then SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.self_attn = Attention(*_attention_sizes(config), causal=False)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, residual: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """(last output, residual stream before it), both [M, d] -> the same pair one layer on."""
        normed, residual = self.input_layernorm(hidden, residual)
        normed, residual = self.post_attention_layernorm(self.self_attn(normed, layout), residual)
        return self.mlp(normed), residual


class DecoderLayer(nn.Module):
    """Causal attention, attention to the source, then SwiGLU, each behind an RMSNorm and added to the residual
    stream."""

    def __init__(self, config: EncoderDecoderConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(*_attention_sizes(config), layer=layer)
        self.cross_attn = CrossAttention(*_attention_sizes(config), layer=layer)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, residual: Tensor, layout: TokenLayout, source: Source) -> tuple[Tensor, Tensor]:
        """(last output, residual stream before it), both [N, d] -> the same pair one layer on."""
        normed, residual = self.input_layernorm(hidden, residual)
        normed, residual = self.cross_attention_layernorm(self.self_attn(normed, layout), residual)
        normed, residual = self.post_attention_layernorm(self.cross_attn(normed, layout.shape, source), residual)
        return self.mlp(normed), residual


def _attention_sizes(config: EncoderDecoderConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim


class Stack(nn.Module):
    """Layers and a final norm."""

    def __init__(self, layers: list[nn.Module], config: EncoderDecoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedded: Tensor, *context: Any) -> Tensor:
        """Embedded tokens [N, d] -> hidden states [N, d]; context: what the layers take beside them."""
        hidden, residual = embedded, torch.zeros_like(embedded)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, *context)
        return self.norm(hidden, residual)[0]


class EncoderAndDecoder(nn.Module):
    """The trunk of EncoderDecoder: token ids to the decoder's hidden states, at the places of the targets."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.separator = config.separator_token_id
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack([EncoderLayer(config) for _ in range(config.encoder_layers)], config)
        self.decoder = Stack([DecoderLayer(config, layer) for layer in range(config.decoder_layers)], config)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_position_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        with_aux_loss: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Token ids [B, T] -> hidden states [B * T, d], 0 in the sources; and nothing where `Decoder` has its experts'
        losses. With a cache: documents whose sources are to be stored, or tokens that continue the stored ones."""
        if cache is not None and cache.source is not None and cu_seqlens is None:
            return self._continue(input_ids, cache), [], []
        sides, ids = split_documents(input_ids, cu_seqlens, self.separator), input_ids.reshape(-1)
        source = self.encode(ids[sides.source], sides.cu_sources, sides.cu_targets)
        layout = self._layout(sides.cu_targets, len(sides.target), cache)
        hidden = self.decoder(self.embed_tokens(ids[sides.target]), layout, source)
        if cache is not None:
            cache.source = source.padded()
        return hidden.new_zeros(len(ids), hidden.shape[1]).index_copy(0, sides.target, hidden), [], []

    def encode(self, source_ids: Tensor, cu_sources: Tensor, cu_targets: Tensor) -> PackedSource:
        """Packed sources, int64 [M], to the keys and values that the decoder reads for targets with these offsets."""
        encoded = self.encoder(self.embed_tokens(source_ids), self._layout(cu_sources, len(source_ids), None))
        pairs = [layer.cross_attn.keys_and_values(encoded) for layer in self.decoder.layers]
        return PackedSource(*zip(*pairs, strict=True), cu_sources, cu_targets)

    def _continue(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Tokens [B, T] that follow those in the cache -> [B * T, d]."""
        cos, sin = self.rotary(cache.begin(input_ids.shape[1]), cache.max_length)
        layout = TokenLayout(tuple(input_ids.shape), cos, sin, cache=cache)
        return self.decoder(self.embed_tokens(input_ids.reshape(-1)), layout, cache.source)

    def _layout(self, cu_seqlens: Tensor, num_tokens: int, cache: KVCache | None) -> TokenLayout:
        positions, document = packed_positions(cu_seqlens, num_tokens)
        if cache is not None:
            if bool((cu_seqlens.diff() == 0).any()):
                rule = f"hold the separator, token {self.separator}, in every prompt"
                raise ValueError(f"EncoderDecoder: input_ids must {rule}, got prompts without")
            cache.begin_packed(cu_seqlens, positions, document)
        cos, sin = self.rotary(positions, num_tokens)
        return TokenLayout((num_tokens,), cos, sin, cu_seqlens, cache=cache)


class EncoderDecoder(CausalLM):
    """An encoder-decoder with its loss, called, trained, saved, scored and decoded as `CausalLM`.

    What it is given, rows or packed documents, are sources, separators and targets in one: the source of a document
    ends before its first separator. Each side is packed anew, so that no padding is computed, and a token of a target
    depends on the source and on what stands before it in the target. Labels of sources and separators are ignored, and
    logits there are those of a hidden state of 0. A document without a separator is left out, as padding is.

    A cache holds the decoder's keys and values, and, computed once, those of the sources; it counts tokens from the
    separator on. The prompts of `arfast.generate.generate` end with the separator, or with tokens of a target.

    Args:
        config: sizes.
        seed, dtype, device: see `CausalLM`.

    Raises:
        ValueError: labels of a document without a separator, or a prompt without one.

    Example:
        >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=4)
        >>> config = EncoderDecoderConfig(encoder_layers=2, decoder_layers=2, separator_token_id=3, **sizes)
        >>> model = EncoderDecoder(config)
        >>> pair = torch.tensor([[1, 17, 25, 3, 30, 41, 2]])  # start, source, separator, target, end
        >>> model(pair, labels=pair).num_tokens
        tensor(3)
        >>> model.generate(pair[:, :4], max_new_tokens=5, num_beams=4).shape
        torch.Size([1, 9])
    """

    config_type = EncoderDecoderConfig
    trunk_type = EncoderAndDecoder
    splits_documents = True
    takes_positions = False

    def __init__(self, config: EncoderDecoderConfig, **options: Any):
        super().__init__(config, **options)
        self.family = FAMILY

    def cached_tokens(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """bool [B, P]: which tokens of prompts a cache counts, of those where mask [B, P] is true."""
        return mask & ((mask & (input_ids == self.config.separator_token_id)).cumsum(-1) > 0)

    def _targets(self, labels: Tensor, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        sides = split_documents(input_ids, cu_seqlens, self.config.separator_token_id)
        is_labelled = labels.reshape(-1) != IGNORE_INDEX
        lost = is_labelled.index_fill(0, torch.cat([sides.source, sides.target]), False)
        if bool(lost.any()):
            rule = f"be -100 in a document without the separator, token {self.config.separator_token_id}"
            raise ValueError(f"EncoderDecoder: labels must {rule}, got {int(lost.sum())} others")
        separators = sides.target[sides.cu_targets[:-1][sides.cu_targets.diff() > 0].long()]
        ignored = torch.cat([sides.source, separators])
        labels = labels.reshape(-1).index_fill(0, ignored, IGNORE_INDEX).view(labels.shape)
        return shift_labels(labels, cu_seqlens)
