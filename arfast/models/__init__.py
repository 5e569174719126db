"""Language models and their configurations."""

from .causal_lm import CausalLM, CausalLMOutput
from .config import CausalLMConfig
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .image_tokenizer import ImageTokenizer, ImageTokenizerConfig, ImageTokenizerOutput
from .least_squares import LeastSquaresAR, OrderSelection, select_order
from .linear_lm import LinearLM, LinearLMConfig

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "CausalLMOutput",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "ImageTokenizerOutput",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LeastSquaresAR",
    "LinearLM",
    "LinearLMConfig",
    "OrderSelection",
    "select_order",
]
