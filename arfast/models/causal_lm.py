"""Decoder-only language model of the Llama family with its loss (Touvron et al., arXiv 2302.13971).

Parameters have the names of transformers' LlamaForCausalLM.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arfast import ops
from arfast.nn import KVCache, normal_
from arfast.nn.lora import LoraConfig, LoraLinear
from arfast.nn.moe import SCORE_BIAS

from .config import CausalLMConfig
from .decoder import Decoder

IGNORE_INDEX = -100


@dataclass(slots=True)
class CausalLMOutput:
    """What CausalLM returns.

    logits: [B, T, V] (or of the kept positions), None when labels were given.
    loss: scalar, or [B, T] with reduction="none"; None without labels.
    aux_loss: scalar, the experts' auxiliary losses times their coefficients, None for a dense model or without labels.
    num_tokens: int64 scalar, how many targets the loss was taken over; None without labels.
    tokens_per_expert: int32 [layers with experts, E], how often each was chosen; None for a dense model or without
        labels.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    num_tokens: Tensor | None = None
    tokens_per_expert: Tensor | None = None


class CausalLM(nn.Module):
    """A causal language model with its loss.

    Args:
        config: sizes and options.
        seed: parameters are a pure function of (seed, parameter name, element index), see `init_parameters`.
        dtype: of the parameters; None: torch's default.
        device: None: torch's default; "meta": shapes only.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> ids = torch.randint(0, model.config.vocab_size, (2, 16))
        >>> model(ids).logits.shape
        torch.Size([2, 16, 4096])
        >>> model(ids, labels=ids).loss.backward()
    """

    config_type: type = CausalLMConfig
    trunk_type: type[nn.Module] = Decoder
    splits_documents = False  # whether tokens of one document go different ways, as those of an encoder-decoder do
    takes_positions = True  # whether forward takes position_ids

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if not isinstance(config, self.config_type):
            expected, got = self.config_type.__name__, type(config).__name__
            raise TypeError(f"{type(self).__name__}: config must be a {expected}, got {got}")
        self.config = config
        self.family: str | None = None  # of Hugging Face, that the model was read as
        self.lora: LoraConfig | None = None  # of the adapters, see `arfast.nn.lora.apply_lora`
        with torch.device("meta"):
            self.model = self.trunk_type(config)
            head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head = head
        self.to(dtype or torch.get_default_dtype())
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_parameters(seed)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, d]: the embedding when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def init_parameters(self, seed: int = 0) -> None:
        """Set every parameter as `init_parameter` does."""
        for name, parameter in self.named_parameters():
            init_parameter(self.config, name, parameter.data, seed)

    def num_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        num_items: float | Tensor | None = None,
        reduction: str = "mean",
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Logits, or with labels the loss of predicting every next token.

        Args:
            input_ids: int64 [B, T], in [0, vocab_size).
            labels: int64 [B, T], aligned with input_ids and shifted here; -100 is ignored, and so is the first token of
                a row or document, which nothing predicts.
            cu_seqlens: int32 [documents + 1], offsets 0 .. B * T of documents packed into input_ids (usually [1, N]);
                a token sees its own document only.
            position_ids: int64 [B, T]; None: counted from the start of the row or document, or on from the cache.
            cache: keys and values of earlier tokens; those of input_ids are appended. Needs torch.no_grad().
            label_smoothing, z_loss: see `arfast.ops.cross_entropy`.
            num_items: divisor of the summed loss: the number of targets in the whole optimizer step, which makes
                gradient accumulation exact. None: the number of targets in this batch (NaN when there are none). A
                scalar tensor is never read by the host, so that a CUDA graph can be given another value.
            reduction: "mean", "sum" or "none".
            logits_to_keep: 0: logits of all positions; k: of the last k of each row; integers [M]: of these indices
                into the B * T flattened positions, as logits [1, M, V].

        Raises:
            ValueError, TypeError, IndexError: `CausalLM: <argument> must <rule>, got <actual>`.
        """
        self._check(input_ids, labels, cu_seqlens, position_ids, cache, num_items, logits_to_keep)
        with_aux_loss = labels is not None and self.config.num_experts > 0
        hidden, aux_losses, counts = self.model(input_ids, cu_seqlens, position_ids, cache, with_aux_loss)
        if cache is not None:
            cache.commit()
        if labels is None:
            return CausalLMOutput(logits=self._logits(hidden, input_ids.shape, logits_to_keep))
        targets = self._targets(labels, input_ids, cu_seqlens)
        hidden, head_weight = self._head_product(hidden)
        # A number becomes part of a compiled or captured graph, which then serves it alone: dividing by it does not.
        divides = isinstance(num_items, Tensor) or (num_items is not None and torch.compiler.is_compiling())
        divides = divides and reduction == "mean"
        loss = ops.linear_cross_entropy(
            hidden,
            head_weight,
            targets.view(-1),
            ignore_index=IGNORE_INDEX,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction="sum" if divides else reduction,
            num_items=None if divides or num_items is None else float(num_items),
        )
        if divides:
            loss = loss / num_items
        if reduction == "none":
            loss = loss.view(labels.shape)
        aux_loss = sum(aux_losses) / len(aux_losses) if aux_losses else None
        return CausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            num_tokens=(targets != IGNORE_INDEX).sum(),
            tokens_per_expert=torch.stack(counts) if counts else None,
        )

    def _targets(self, labels: Tensor, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """What each position is to predict, [B, T]; -100: nothing."""
        return shift_labels(labels, cu_seqlens)

    def _logits(self, hidden: Tensor, shape: torch.Size, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            hidden = hidden[keep][None]
        else:
            hidden = hidden.view(*shape, -1)[:, -keep:]
        return F.linear(*self._head_product(hidden))

    def _head_product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of the logits: hidden states and head, each with the columns of an adapter where there is one."""
        if isinstance(self.lm_head, LoraLinear):
            return self.lm_head.as_one_product(hidden)
        return hidden, self.head_weight

    def _check(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        num_items: float | Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> None:
        device = self.head_weight.device
        _check_tensor("input_ids", input_ids, "[B, T]", 2, device, torch.int64)
        if input_ids.numel() == 0:
            raise ValueError(f"CausalLM: input_ids must not be empty, got shape {tuple(input_ids.shape)}")
        if position_ids is not None and not self.takes_positions:
            raise ValueError(f"{type(self).__name__}: position_ids must be None, got a tensor")
        for name, value in (("labels", labels), ("position_ids", position_ids)):
            if value is None:
                continue
            _check_tensor(name, value, "[B, T]", 2, device, torch.int64)
            if value.shape != input_ids.shape:
                shapes = f"{tuple(input_ids.shape)}, got {tuple(value.shape)}"
                raise ValueError(f"CausalLM: {name} must have the shape of input_ids, {shapes}")
        if cu_seqlens is not None:
            _check_tensor("cu_seqlens", cu_seqlens, "[documents + 1]", 1, device, torch.int32)
        if isinstance(num_items, Tensor) and num_items.dim() > 0:
            raise ValueError(f"CausalLM: num_items must be a number or a scalar, got shape {tuple(num_items.shape)}")
        if isinstance(logits_to_keep, Tensor):
            _check_tensor("logits_to_keep", logits_to_keep, "[M]", 1, device, torch.int64, torch.int32)
        elif not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"CausalLM: logits_to_keep must be at least 0, or integers [M], got {logits_to_keep!r}")
        if cache is not None:
            self._check_cache(cache, None if cu_seqlens is not None else input_ids.shape[0])
        # values are looked at where that costs no wait for a device; a GPU's kernels check for themselves
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range("input_ids", input_ids, f"vocab_size={self.config.vocab_size}", self.config.vocab_size)
            if cu_seqlens is not None:
                _check_offsets(cu_seqlens, input_ids.numel())
            if isinstance(logits_to_keep, Tensor):
                _check_range("logits_to_keep", logits_to_keep, f"B * T = {input_ids.numel()}", input_ids.numel())

    def _check_cache(self, cache: KVCache, batch_size: int | None) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"CausalLM: cache must be a KVCache, got {type(cache).__name__}")
        if torch.is_grad_enabled():
            raise ValueError("CausalLM: cache must be used under torch.no_grad(), got gradients enabled")
        if batch_size is not None and cache.batch_size != batch_size:
            size = cache.batch_size
            raise ValueError(f"CausalLM: input_ids must have the cache's batch size {size}, got {batch_size}")

    def cached_tokens(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """bool [B, P]: which tokens of prompts a cache counts, of those where mask [B, P] is true: here all."""
        return mask

    def generate(self, input_ids: Tensor, **options) -> Tensor:
        """Continue prompts: see `arfast.generate.generate`."""
        from arfast.generate import generate

        return generate(self, input_ids, **options)

    def score(self, input_ids: Tensor, prompt_lengths: Tensor | None = None, **options):
        """Log-probabilities of given tokens: see `arfast.generate.score`."""
        from arfast.generate import score

        return score(self, input_ids, prompt_lengths, **options)

    def save_pretrained(self, path, **options) -> None:
        """Write config.json and safetensors: see `arfast.hub.save_pretrained`; of a model with adapters, these alone:
        see `arfast.adapter.save_adapter`."""
        from arfast.adapter import save_adapter
        from arfast.hub import save_pretrained

        (save_pretrained if self.lora is None else save_adapter)(self, path, **options)

    @classmethod
    def from_pretrained(
        cls, path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "CausalLM":
        """Read a directory of safetensors: see `arfast.hub.from_pretrained`."""
        from arfast.hub import from_pretrained

        return from_pretrained(path, dtype=dtype, device=device)


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Target of every position: the label of the next one, -100 at the end of each row and of each packed document."""
    rows = labels if cu_seqlens is None else labels.reshape(1, -1)
    targets = F.pad(rows[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        targets[0].index_fill_(0, cu_seqlens[1:].long() - 1, IGNORE_INDEX)
    return targets.view(labels.shape)


def init_parameter(config: CausalLMConfig, name: str, tensor: Tensor, seed: int = 0, start: int = 0) -> None:
    """Fill `tensor` with elements [start, start + numel) of the flat initial value of parameter `name`.

    Norms are 1, biases 0, everything else normal; the projections that end on the residual stream are scaled down by
    sqrt(2 L). A rank that holds a slice of a parameter gets exactly the elements it would cut from the whole.
    """
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    elif name.endswith((".bias", SCORE_BIAS)):
        tensor.zero_()
    else:
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        depth = math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
        normal_(tensor, seed, name, config.initializer_range / depth, start)


def _check_tensor(
    name: str, value: Tensor, shape: str, num_dims: int, device: torch.device, *dtypes: torch.dtype
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"CausalLM: {name} must be {dtypes[0]} {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes or value.dim() != num_dims:
        raise TypeError(f"CausalLM: {name} must be {dtypes[0]} {shape}, got {value.dtype} {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"CausalLM: {name} must be on the model's device {device}, got {value.device}")


def _check_range(name: str, values: Tensor, bound: str, stop: int) -> None:
    low, high = (int(value) for value in values.aminmax())
    if low < 0 or high >= stop:
        raise IndexError(f"CausalLM: {name} must be in [0, {bound}), got {low if low < 0 else high}")


def _check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or bool((lengths < 0).any()):
        raise ValueError(
            f"CausalLM: cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {cu_seqlens.tolist()}"
        )
