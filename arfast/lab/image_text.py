"""Captioned images as text: a code is a character that no language uses, so that tokenizer, data set, training and
generation of text serve for images as they are.

Ramesh et al., "Zero-shot text-to-image generation" (2021, arXiv 2102.12092), section 2: one transformer for the
caption's tokens and the image's codes in one stream. Here the loss counts for the codes alone.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from arfast.data import Document, Tokenizer
from arfast.generate import generate, score_continuations
from arfast.models import CausalLM

WORDS = "zero one two three four five six seven eight nine".split()
# The first one is a class and nothing else.
WORDINGS = (
    "{numeral}",
    "{word}",
    "digit {numeral}",
    "the number {word}",
    "a handwritten {numeral}",
    "a photo of a {word}",
    "a photo of the digit {word}",
    "a drawing of the digit {numeral}",
)
# Never trained on: words that the others have, in another order; and words that none of them has.
HELD_OUT_WORDINGS = ("a photo of the number {word}", "please show me a {word}")
# Characters for private use: where a caption ends and the image begins, and the codes.
_BEGIN, _FIRST_CODE = "\ue000", 0xF0000
_MAX_WORDS = 256  # more than captions have


def caption(wording: str, digit: int) -> str:
    """
    >>> caption("the number {word}", 7)
    'the number seven'
    """
    return wording.format(numeral=digit, word=WORDS[digit])


def code_text(codes: Sequence[int]) -> str:
    """One character for each code, in the order of reading."""
    return "".join(chr(_FIRST_CODE + code) for code in codes)


def caption_tokenizer(num_codes: int) -> Tokenizer:
    """A token for each word of the captions that are trained on, and for each code."""
    captions = [caption(wording, digit) + _BEGIN for wording in WORDINGS for digit in range(len(WORDS))]
    return Tokenizer.train([*captions, code_text(range(num_codes))], num_codes + _MAX_WORDS, "word")


def captioned_images(codes: Tensor, labels: Tensor) -> Iterator[Document]:
    """Each image with each wording; what follows the caption is the target.

    Args:
        codes: int64 [N, h, w].
        labels: int64 [N], the digits.
    """
    for number, (image, label) in enumerate(zip(codes.flatten(1).tolist(), labels.tolist(), strict=True)):
        for wording in WORDINGS:
            prompt = caption(wording, label) + _BEGIN
            text = prompt + code_text(image)
            yield Document(text, f"image {number}", ((len(prompt), len(text)),))


def code_tokens(tokenizer: Tokenizer, num_codes: int) -> Tensor:
    """The token of each code, int64 [K]."""
    return torch.tensor(tokenizer.encode(code_text(range(num_codes)), add_special_tokens=False))


def draw_codes(
    model: CausalLM, tokenizer: Tokenizer, captions: Sequence[str], count: int, num_codes: int, length: int, **options
) -> Tensor:
    """The codes of `count` images for each caption, int64 [captions, count, length]. Nothing but codes can come.

    Args:
        num_codes, length: K of the image tokenizer, and the codes of an image.
        options: temperature, top_k, seed and others of `arfast.generate`.
    """
    prompts = tokenizer.encode_batch([text + _BEGIN for text in captions])
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    tokens = code_tokens(tokenizer, num_codes)
    allowed = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    allowed[tokens] = True
    options = dict(do_sample=True, num_return_sequences=count, allowed_tokens=allowed, **options)
    code_of = torch.full((tokenizer.vocab_size,), -1)
    code_of[tokens] = torch.arange(num_codes)
    return code_of[generate(model, input_ids, length, **options)[:, longest:]].view(len(captions), count, length)


def bits_per_image(model: CausalLM, tokenizer: Tokenizer, codes: Tensor, labels: Tensor) -> float:
    """Mean of -log2 P(codes | caption) over images, codes int64 [N, h, w], with the longest of the wordings."""
    wording, tokens = max(WORDINGS, key=len), code_tokens(tokenizer, int(codes.max()) + 1)
    prompts = [tokenizer.encode(caption(wording, digit) + _BEGIN) for digit in range(len(WORDS))]
    groups = [
        [(prompts[label], tokens[image].tolist())]
        for image, label in zip(codes.flatten(1), labels.tolist(), strict=True)
    ]
    scores = score_continuations(model, groups)
    return -sum(score.logprob for (score,) in scores) / len(scores) / math.log(2)
