"""Continuations and rankings against scoring every alternative with its prompt from the start."""

import random
import textwrap

import pytest
import torch

from arfast.data import Tokenizer
from arfast.generate import FewShotPrompt, continuations, encode_pair, rank, score, score_continuations
from arfast.models import CausalLM, CausalLMConfig

TEXT = open(textwrap.__file__, encoding="utf-8").read()[:6000]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=300, num_hidden_layers=2, initializer_range=0.2, max_position_embeddings=128)
    return CausalLM(CausalLMConfig.preset("tiny", **sizes), seed=3)


class Counting:
    """A model that counts the tokens it is fed."""

    def __init__(self, model):
        self.model, self.config, self.head_weight, self.fed = model, model.config, model.head_weight, []

    def __call__(self, input_ids, **options):
        self.fed.append(tuple(input_ids.shape))
        return self.model(input_ids, **options)


def alone(model, context, continuation):
    """(log-probability, whether greedy decoding gives it) without a cache, padding or neighbours."""
    row = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        best = model(row).logits[0, len(context) - 1 : -1].argmax(-1)
    return float(score(model, row, [len(context)]).sums), best.tolist() == [*continuation]


def random_tokens(rng, least, most):
    return [rng.randrange(300) for _ in range(rng.randint(least, most))]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_groups_give_what_each_row_gives_alone(batch_size, model):
    """Contexts of 1 to 40 tokens, groups of 1 to 9 rows, some contexts that part before their ends."""
    rng = random.Random(batch_size)
    groups = []
    for size in (1, 9, 2, 1, 4, 3):
        context = random_tokens(rng, 1, 40)
        contexts = [context if rng.random() < 0.7 else context[:-1] + random_tokens(rng, 1, 3) for _ in range(size)]
        groups.append([(context, random_tokens(rng, 1, 12)) for context in contexts])
    with torch.no_grad():  # one that greedy decoding gives
        context = groups[1][0][0]
        groups[1].append((context, [int(model(torch.tensor([context])).logits[0, -1].argmax())]))
    results = score_continuations(model, groups, batch_size=batch_size)
    assert [len(scores) for scores in results] == [len(group) for group in groups]
    for group, scores in zip(groups, results, strict=True):
        for (context, continuation), scored in zip(group, scores, strict=True):
            logprob, is_greedy = alone(model, context, continuation)
            assert scored.logprob == pytest.approx(logprob, rel=1e-5)
            assert (scored.is_greedy, scored.num_tokens) == (is_greedy, len(continuation))
    assert results[1][-1].is_greedy


@pytest.mark.parametrize("max_logits", [1, 300 * 4, 300 * 11])
def test_logits_held_at_a_time_change_nothing(max_logits, model, monkeypatch):
    rng = random.Random(0)
    groups = [[([5, 6, 7], random_tokens(rng, 1, 6)) for _ in range(size)] for size in (5, 1, 2)]
    expected = score_continuations(model, groups)
    monkeypatch.setattr(continuations, "_MAX_LOGITS", max_logits)
    for scores, others in zip(score_continuations(model, groups), expected, strict=True):
        for scored, other in zip(scores, others, strict=True):
            assert scored.logprob == pytest.approx(other.logprob, rel=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_the_prompt_goes_through_the_model_once(window, model):
    config = model.config.replace(sliding_window=window)
    counting = Counting(CausalLM(config, seed=3))
    context = list(range(50))
    group = [(context, [1]), (context, [2, 3, 4]), (context, [5, 6])]
    [scores] = score_continuations(counting, [group], batch_size=2)
    assert counting.fed == [(1, 49), (2, 3), (1, 2)]
    for (context, continuation), scored in zip(group, scores, strict=True):
        assert scored.logprob == pytest.approx(alone(counting.model, context, continuation)[0], rel=1e-5)


def test_experts(model):
    """A token goes to the same experts in any batch."""
    config = model.config.replace(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    sparse = CausalLM(config, seed=3)
    groups = [[([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7])], [([8], [9, 10])]]
    for group, scores in zip(groups, score_continuations(sparse, groups), strict=True):
        for (context, continuation), scored in zip(group, scores, strict=True):
            assert scored.logprob == pytest.approx(alone(sparse, context, continuation)[0], rel=1e-5)


def test_a_row_alone_is_one_pass(model):
    counting = Counting(model)
    score_continuations(counting, [[(list(range(50)), [1])], [(list(range(30)), [1, 2])]])
    assert counting.fed == [(2, 50)]


def test_bfloat16_and_autocast(model):
    groups = [[([5, 6, 7], [8, 9]), ([5, 6, 7], [10])]]
    half = CausalLM(model.config, seed=3, dtype=torch.bfloat16)
    [expected] = score_continuations(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        [cast] = score_continuations(model, groups)
    [stored] = score_continuations(half, groups)
    for scored, also, exact in zip(cast, stored, expected, strict=True):
        assert scored.logprob == pytest.approx(exact.logprob, rel=0.1)
        assert also.logprob == pytest.approx(exact.logprob, rel=0.1)


def test_pairs_are_cut_as_the_whole_text_is_encoded(tokenizer):
    for context, continuation in (("def main(", "self)"), ("the ", "text"), ("a\n", "  b"), ("", "x"), ("wid", "th")):
        first, second = encode_pair(tokenizer, context, continuation)
        assert first + second == tokenizer.encode(context + continuation)
        assert len(first) == len(tokenizer.encode(context.rstrip()))
    assert encode_pair(tokenizer, "the ", "text") == encode_pair(tokenizer, "the", " text")


def test_ranking(model, tokenizer):
    alternatives = [" wide", " a longer alternative", " text", " 数"]
    prompt = "def wrap("
    scores = {text: alone(model, *encode_pair(tokenizer, prompt, text))[0] for text in alternatives}
    lengths = dict(
        none=dict.fromkeys(alternatives, 1),
        tokens={text: len(encode_pair(tokenizer, prompt, text)[1]) for text in alternatives},
        bytes={text: len(text.encode()) for text in alternatives},
    )
    for normalize, length in lengths.items():
        ranked = rank(model, tokenizer, prompt, alternatives, normalize=normalize, batch_size=2)
        expected = sorted(alternatives, key=lambda text: -scores[text] / length[text])
        assert [item.alternative for item in ranked] == expected
        for item in ranked:
            assert item.logprob == pytest.approx(scores[item.alternative], rel=1e-5)
            assert item.score == item.logprob / length[item.alternative]
            assert item.num_tokens == lengths["tokens"][item.alternative]


def test_equal_alternatives_tie_in_the_order_given(model, tokenizer):
    """Also when they do not fit into one batch."""
    ranked = rank(model, tokenizer, "def ", ["wrap", "fill", "wrap", "fill", "wrap"], batch_size=1)
    assert sorted(item.alternative for item in ranked[:3]) in (["wrap"] * 3, ["fill", "fill", "wrap"])
    assert len({item.score for item in ranked}) == 2

    class Uniform:  # all alternatives of a token are as likely
        config, head_weight = model.config, model.head_weight

        def __call__(self, input_ids, **options):
            out = model(input_ids, **options)
            out.logits.zero_()
            return out

    ranked = rank(Uniform(), tokenizer, "x", ["b", "a", "c", "a"])
    assert [item.alternative for item in ranked] == ["b", "a", "c", "a"]


def test_a_token_across_the_boundary(model):
    """Where prompt and alternative merge, the text is cut after as many tokens as the prompt has alone."""
    tokenizer = Tokenizer.train(["abc abc abc abd abd abe abe"] * 3, 270)
    prompt, alternatives = "x ab", ["cab", "d abc", "q"]
    whole = [tokenizer.encode(prompt + text) for text in alternatives]
    length = len(tokenizer.encode(prompt))
    assert len({tuple(row[:length]) for row in whole}) > 1
    scores = {
        text: float(score(model, torch.tensor([row]), [length]).sums)
        for text, row in zip(alternatives, whole, strict=True)
    }
    for item in rank(model, tokenizer, prompt, alternatives):
        assert item.logprob == pytest.approx(scores[item.alternative], rel=1e-5)


def test_an_empty_prompt_is_the_start_token(model, tokenizer):
    [item] = rank(model, tokenizer, "", ["text"])
    row = tokenizer.encode("text")
    assert item.logprob == pytest.approx(float(score(model, torch.tensor([row])).sums), rel=1e-5)
    assert item.num_tokens == len(row) - 1


def test_few_shot_prompts():
    examples = [("2 + 2", "4"), ("3 + 4", "7")]
    assert FewShotPrompt().render("1 + 1") == "Question: 1 + 1\nAnswer: "
    assert FewShotPrompt(examples=examples[:1]).render("{x}") == "Question: 2 + 2\nAnswer: 4\n\nQuestion: {x}\nAnswer: "
    prompt = FewShotPrompt(
        instruction="Add.", examples=examples, question_prefix="", answer_prefix=" = ", separator="\n"
    )
    assert prompt.render("1 + 1") == "Add.\n2 + 2 = 4\n3 + 4 = 7\n1 + 1 = "


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(alternatives=[]), r"rank: alternatives must be at least one text, got \[\]"),
        (dict(alternatives="ab"), "rank: alternatives must be at least one text, got 'ab'"),
        (dict(alternatives=["a", ""]), "rank: alternatives must add at least one token to the prompt, got ''"),
        (dict(prompt="x ", alternatives=[""]), "rank: alternatives must add at least one token to the prompt, got ''"),
        (dict(normalize="words"), "rank: normalize must be one of none, tokens, bytes, got 'words'"),
        (dict(batch_size=0), "score_continuations: batch_size must be an integer at least 1, got 0"),
        (
            dict(prompt="\x01" * 130),
            "context and continuation must have at most max_position_embeddings=128 tokens but the last, got 131",
        ),
    ],
)
def test_errors(change, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        rank(model, tokenizer, **(dict(prompt="x", alternatives=["a"]) | change))


def test_an_alternative_that_merges_into_the_prompt_is_an_error(model):
    tokenizer = Tokenizer.train(["ab ab ab"] * 3, 262)
    assert len(tokenizer.encode("ab")) == len(tokenizer.encode("a"))
    with pytest.raises(ValueError, match="rank: alternatives must add at least one token to the prompt, got 'b'"):
        rank(model, tokenizer, "a", ["b"])


def test_a_tokenizer_without_a_start_token_needs_a_prompt(model, tokenizer):
    class Bare:
        def encode(self, text):
            return tokenizer.encode(text, add_special_tokens=False)

    with pytest.raises(
        ValueError, match="rank: prompt must not be empty for a tokenizer without a start token, got ''"
    ):
        rank(model, Bare(), "", ["text"])


def test_tokens_that_the_model_does_not_know(tokenizer):
    small = CausalLM(CausalLMConfig.preset("tiny", vocab_size=290, num_hidden_layers=1))
    word = max((tokenizer.encode(word) for word in TEXT.split()), key=max)
    assert max(word) >= 290
    with pytest.raises(ValueError, match=rf"continuation must be in \[0, vocab_size=290\), got {max(word)}"):
        rank(small, tokenizer, "x", [tokenizer.decode(word)])
    with pytest.raises(ValueError, match=r"context must be in \[0, vocab_size=290\), got -1"):
        score_continuations(small, [[([-1], [1])]])


@pytest.mark.parametrize("pair,name", [(([], [1]), "context"), (([1], []), "continuation")])
def test_rows_without_a_token(pair, name, model):
    with pytest.raises(ValueError, match=f"score_continuations: {name} must have at least one token, got none"):
        score_continuations(model, [[([1], [2]), pair]])


def test_nan_is_an_error(model):
    broken = CausalLM(model.config, seed=3)
    broken.head_weight.data[100, 0] = torch.nan
    with pytest.raises(ValueError, match="score_continuations: logits must not be NaN, got NaN"):
        score_continuations(broken, [[([1], [2])]])
