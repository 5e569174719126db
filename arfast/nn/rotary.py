"""Rotary position embeddings (Su et al., arXiv 2104.09864, eq. 34), with linear and Llama 3 frequency scaling.

Channels are paired as Hugging Face pairs them: i with i + head_dim / 2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

_INITIAL_POSITIONS = 4096


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of every channel pair, float32 [head_dim / 2].

    scaling: None, {"rope_type": "linear", "factor"}: all frequencies divided by factor (Chen et al., arXiv 2306.15595);
    or {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}:
    wavelengths above original / low_freq_factor are divided, those below original / high_freq_factor kept, with a blend
    in between, linear in the frequency (Llama 3.1). float32 throughout, as the released models were trained.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    keep = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / factor + keep * frequencies


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for `arfast.ops.rotary`, float32 [positions, head_dim / 2], shared by all layers.

    The tables are a function of the configuration: they are never saved, any move or cast of the module (`to_empty`
    too) rebuilds them in float32, and they grow on demand.

    Args:
        head_dim: channels per head, even.
        theta: base of the frequencies.
        max_positions: how many positions the model is meant for; up to 4096 are tabulated from the start.
        scaling: see `inverse_frequencies`.
    """

    def __init__(self, head_dim: int, theta: float, max_positions: int, scaling: dict | None = None):
        super().__init__()
        self._head_dim, self._scaling = head_dim, scaling
        self.inverse_frequencies = inverse_frequencies(head_dim, theta, scaling)
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._build(min(max_positions, _INITIAL_POSITIONS), self.cos.device)

    def set_theta(self, theta: float) -> None:
        """Change the base of the frequencies, as a model does whose context grows while it is trained."""
        self.inverse_frequencies = inverse_frequencies(self._head_dim, theta, self._scaling)
        self._build(self.cos.shape[0], self.cos.device)

    def _build(self, num_positions: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # tables that grow while generating must serve the next training step
            self.cos, self.sin = self._tables(torch.arange(num_positions, device=device))

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self.inverse_frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def _apply(self, fn: Callable, recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        self._build(self.cos.shape[0], self.cos.device)
        return self

    def forward(self, positions: Tensor | None, length: int | None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [N, head_dim / 2] each, of N positions in any shape; None: of 0 .. length - 1.

        length: a bound on the positions that the host knows, or None (then they are computed, not looked up).
        """
        if length is None:
            return self._tables(positions.reshape(-1))
        if length > self.cos.shape[0]:
            self._build(1 << (length - 1).bit_length(), self.cos.device)
        if positions is None:
            return self.cos[:length], self.sin[:length]
        positions = positions.reshape(-1)
        return self.cos[positions], self.sin[positions]
