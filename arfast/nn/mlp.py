"""Gated feed-forward layer (Shazeer, arXiv 2002.05202, eq. 6)."""

from torch import Tensor, nn

from arfast import ops

from .recompute import recomputed


class SwiGLU(nn.Module):
    """down(silu(gate(hidden)) * up(hidden)): hidden [N, d] -> [N, d], without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        activation = ops.swiglu(gate, up)
        with recomputed(activation, ops.swiglu, gate, up):
            return self.down_proj(activation)
