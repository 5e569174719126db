"""Choosing among given answers by their log-probability, with zero, one or a few worked examples before the question.

Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, section 2.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arfast.data import Tokenizer
from arfast.data.checks import check_text
from arfast.generate.continuations import encode_pair, score_continuations

_NORMALIZATIONS = ("none", "tokens", "bytes")


@dataclass(frozen=True, slots=True)
class Ranked:
    """alternative: as it was given; logprob: of its tokens after the prompt, natural; num_tokens: their number;
    score: logprob, or that per token or byte; what the ranking goes by."""

    alternative: str
    logprob: float
    num_tokens: int
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotPrompt:
    """Renders a task as a prompt: an instruction, worked examples, and the question to answer.

    Args:
        instruction: what to do; comes first, may be empty.
        examples: (question, answer); none for zero-shot, one for one-shot.
        question_prefix, answer_prefix: stand before each question and each answer.
        separator: stands between instruction, examples and question.

    Example:
        >>> prompt = FewShotPrompt(examples=[("grass", "green")])
        >>> prompt.render("sky")
        'Question: grass\\nAnswer: green\\n\\nQuestion: sky\\nAnswer: '
    """

    instruction: str = ""
    examples: Sequence[tuple[str, str]] = ()
    question_prefix: str = "Question: "
    answer_prefix: str = "\nAnswer: "
    separator: str = "\n\n"

    def render(self, question: str) -> str:
        """The prompt up to where the answer begins. `rank` counts the white space at its end to every alternative;
        strip it before `generate`."""
        parts = [self.instruction] if self.instruction else []
        parts += [f"{self.question_prefix}{asked}{self.answer_prefix}{answer}" for asked, answer in self.examples]
        parts.append(f"{self.question_prefix}{question}{self.answer_prefix}")
        return self.separator.join(parts)


def rank(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    alternatives: Sequence[str],
    *,
    normalize: str = "none",
    batch_size: int = 16,
) -> list[Ranked]:
    """Order alternatives by how likely they continue a prompt.

    The prompt goes through the model once. Text is cut into tokens by `encode_pair`: white space at the end of the
    prompt counts as the beginning of every alternative.

    Args:
        model: a CausalLM.
        tokenizer: its tokenizer.
        prompt: text; may be empty if the tokenizer has a start token.
        alternatives: at least one; equal ones get equal scores.
        normalize: "none": by log p, which favours short alternatives; "tokens", "bytes": by log p per token or per
            byte of the alternative in UTF-8.
        batch_size: alternatives at a time.

    Returns:
        One Ranked per alternative, the best first; exact ties in the order given.

    Raises:
        ValueError, TypeError: `rank: <argument> must <rule>, got <actual>`; the errors of `score_continuations`, among
            them a prompt that does not fit the model's context.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> tokenizer = Tokenizer.train(["the sky is blue, the grass is green"], vocab_size=280)
        >>> best, *rest = rank(model, tokenizer, "the sky is", [" blue", " green"])
    """
    check_text("rank: prompt", prompt)
    if isinstance(alternatives, str) or len(alternatives) == 0:
        raise ValueError(f"rank: alternatives must be at least one text, got {alternatives!r}")
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"rank: normalize must be one of {', '.join(_NORMALIZATIONS)}, got {normalize!r}")
    pairs = {}
    for alternative in alternatives:
        check_text("rank: alternatives", alternative)
        context, continuation = encode_pair(tokenizer, prompt, alternative)
        if not context:
            raise ValueError(f"rank: prompt must not be empty for a tokenizer without a start token, got {prompt!r}")
        if not alternative or not continuation:
            raise ValueError(f"rank: alternatives must add at least one token to the prompt, got {alternative!r}")
        pairs[alternative] = context, continuation
    [scores] = score_continuations(model, [list(pairs.values())], batch_size=batch_size)
    by_text = dict(zip(pairs, scores, strict=True))
    ranked = []
    for alternative in alternatives:
        scored = by_text[alternative]
        length = dict(none=1, tokens=scored.num_tokens, bytes=len(alternative.encode()))[normalize]
        ranked.append(Ranked(alternative, scored.logprob, scored.num_tokens, scored.logprob / length))
    return sorted(ranked, key=lambda item: -item.score)
