"""The trunk of CausalLM: embedding, pre-normalised layers of attention and feed-forward, final norm.

Touvron et al., arXiv 2302.13971, section 2.2. Parameters have the names of transformers' LlamaModel.
"""

import torch
from torch import Tensor, nn

from arfast.nn import Attention, Embedding, KVCache, MoE, RMSNorm, RotaryEmbedding, SwiGLU, TokenLayout
from arfast.nn.layout import packed_positions
from arfast.nn.recompute import checkpoint

from .config import CausalLMConfig


class DecoderLayer(nn.Module):
    """Attention, then SwiGLU or experts, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: CausalLMConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            layer=layer,
            window=config.window(layer),
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        self.has_experts = config.has_experts(layer)
        self.mlp = _experts(config) if self.has_experts else SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, layout: TokenLayout, with_aux_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(last output, residual stream before it), both [N, d] -> the same pair one layer on; with experts, the
        auxiliary loss and the choices of each expert [E].

        The sum of the pair is left to the next norm, which fuses it.
        """
        if residual is None:
            normed, residual = self.input_layernorm(hidden), hidden
        else:
            normed, residual = self.input_layernorm(hidden, residual)
        with self.input_layernorm.recomputed(normed, residual):
            hidden = self.self_attn(normed, layout)
        normed, residual = self.post_attention_layernorm(hidden, residual)
        with self.post_attention_layernorm.recomputed(normed, residual):
            if not self.has_experts:
                return self.mlp(normed), residual, None, None
            hidden, aux_loss, tokens_per_expert = self.mlp(normed, with_aux_loss)
        return hidden, residual, aux_loss, tokens_per_expert


def _experts(config: CausalLMConfig) -> MoE:
    return MoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        num_shared_experts=config.num_shared_experts,
        score=config.router_score,
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        balance_coef=config.router_aux_loss_coef,
        z_loss_coef=config.router_z_loss_coef,
        score_bias=config.router_bias,
    )


class Decoder(nn.Module):
    """Embedding, layers and final norm.

    Attributes:
        activation_checkpointing: keep only the input of each layer for the backward pass, which computes the rest again
            (Chen et al., arXiv 1604.06174).
    """

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.activation_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.max_position_embeddings, config.rope_scaling
        )

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        with_aux_loss: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Token ids [B, T] -> hidden states [B * T, d]; the auxiliary losses of the layers with experts, and how often
        each expert was chosen."""
        hidden = self.embed_tokens(input_ids.reshape(-1))
        layout = self._layout(input_ids, cu_seqlens, position_ids, cache)
        residual, aux_losses, counts = None, [], []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            arguments = (hidden, residual, layout, with_aux_loss)
            outputs = checkpoint(layer, *arguments) if recompute else layer(*arguments)
            hidden, residual, aux_loss, tokens_per_expert = outputs
            if aux_loss is not None:
                aux_losses.append(aux_loss)
            if tokens_per_expert is not None:
                counts.append(tokens_per_expert)
        return self.norm(hidden, residual)[0], aux_losses, counts

    def _layout(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> TokenLayout:
        seqlen = input_ids.shape[1]
        positions, length = None, seqlen
        if cu_seqlens is not None:
            length = input_ids.numel()
            positions, document = packed_positions(cu_seqlens, length)
            if cache is not None:
                cache.begin_packed(cu_seqlens, positions, document)
        elif cache is not None:
            positions, length = cache.begin(seqlen), cache.max_length
        if position_ids is not None:
            positions, length = position_ids, None
        shape = tuple(input_ids.shape) if cu_seqlens is None else (input_ids.numel(),)
        cos, sin = self.rotary(positions, length)
        return TokenLayout(shape, cos, sin, cu_seqlens, cache=cache)
