"""arfast: fast autoregressive language models.

>>> from arfast import CausalLM, CausalLMConfig
>>> model = CausalLM(CausalLMConfig.preset("tiny"))

`arfast.generate` is the function; the package of that name is reached as `from arfast.generate import ...`.
"""

from arfast.data import Tokenizer
from arfast.generate import generate
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer

__all__ = ["CausalLM", "CausalLMConfig", "Tokenizer", "TrainConfig", "Trainer", "generate"]
