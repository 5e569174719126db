"""Language models and their configurations."""

from .causal_lm import CausalLM, CausalLMOutput
from .config import CausalLMConfig

__all__ = ["CausalLM", "CausalLMConfig", "CausalLMOutput"]
