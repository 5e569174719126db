"""A Llama in plain torch and the training loop of nanoGPT around it: the peer of `compare_training.py`.

The facts of github.com/karpathy/nanoGPT (train.py, model.py), in code of our own: crops of the concatenated training
tokens at random places, without a thought for documents; autocast to bfloat16 over float32 weights; fused scaled dot
product attention; the loss by `F.cross_entropy` over all logits; AdamW with betas 0.9 and 0.95, weight decay 0.1 on
matrices alone; gradients clipped to norm 1; a linear warm-up and one cosine to a tenth of the peak.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS, WEIGHT_DECAY, MAX_GRAD_NORM, FLOOR = (0.9, 0.95), 0.1, 1.0, 0.1


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]; cos, sin [T, D]."""
        heads = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = heads
        q, k = (rotated(t, cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], channel i paired with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainLlama(nn.Module):
    """The dense, tied `CausalLM` of a configuration, with its parameters' names, in torch's own operators."""

    def __init__(self, config):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        channels = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), config.rope_theta**-channels)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats of predicting targets [B, T], which follow ids [B, T] by one place."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class PlainConfig:
    """max_tokens, warmup_tokens: input positions; batch_size: crops of ``seqlen`` tokens per step."""

    max_tokens: int
    warmup_tokens: int
    learning_rate: float
    batch_size: int
    seqlen: int
    dtype: str = "bfloat16"
    compile: bool = True
    seed: int = 0


class PlainTrainer:
    """Trains a `PlainLlama` on a token stream, int64 [N]; `tokens` says how far it is."""

    def __init__(self, model: PlainLlama, config: PlainConfig, stream: np.ndarray) -> None:
        self.model, self.config, self.tokens = model, config, 0
        self._stream = torch.from_numpy(stream)
        self._forward = torch.compile(model, dynamic=False) if config.compile else model
        self._generator = torch.Generator().manual_seed(config.seed)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)

    def warm_up(self) -> None:
        """Compile, and change nothing."""
        self._loss(*self._crops(torch.Generator().manual_seed(0))).backward()
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        config = self.config
        self.tokens += config.batch_size * config.seqlen
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._loss(*self._crops(self._generator)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def learning_rate(self) -> float:
        """Of the step that ends after ``tokens`` tokens."""
        config = self.config
        if self.tokens < config.warmup_tokens:
            return config.learning_rate * self.tokens / config.warmup_tokens
        progress = min(1.0, (self.tokens - config.warmup_tokens) / (config.max_tokens - config.warmup_tokens))
        return config.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))

    def _crops(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, T] each."""
        size, length = self.config.batch_size, self.config.seqlen
        starts = torch.randint(len(self._stream) - length, (size, 1), generator=generator)
        windows = self._stream[starts + torch.arange(length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self._forward(ids, targets)
