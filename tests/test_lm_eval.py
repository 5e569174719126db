"""arfast in lm-evaluation-harness against the harness's `hf` model: transformers on the same checkpoint."""

import json
import os
import textwrap
from types import SimpleNamespace

import pytest
import torch

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(_name, "1")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # the harness's `hf` model needs it

from lm_eval.tasks import TaskManager  # noqa: E402

from arfast.data import Tokenizer  # noqa: E402
from arfast.lm_eval import ArfastLM, generation_arguments  # noqa: E402
from arfast.models import CausalLM, CausalLMConfig  # noqa: E402

TEXT = open(textwrap.__file__, encoding="utf-8").read()
CONTEXT = 128

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", " the"]
  max_gen_toks: 24
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def documents():
    """Records for the three tasks, from pieces of one text: contexts of very different lengths, some too long."""
    words = TEXT.split(" ")
    pieces = [" ".join(words[i : i + 2 + i % 29]) for i in range(0, 600, 25)]
    choices = [[pieces[i - 1][:9], pieces[i][-7:], "x = 1", pieces[i - 2][:20]] for i in range(len(pieces))]
    choice = [dict(question=p, choices=c, label=i % 4) for i, (p, c) in enumerate(zip(pieces, choices, strict=True))]
    choice.append(dict(question=TEXT[:900], choices=["a", "b", "c", "d"], label=0))
    rolling = [dict(text=text) for text in (TEXT[:1500], TEXT[1500:1700], "x", TEXT[3000:4100])]
    generate = [dict(question=piece, answer="\n") for piece in pieces] + [dict(question=TEXT[:900], answer="")]
    return dict(tiny_choice=choice, tiny_rolling=rolling, tiny_generate=generate)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer.train([TEXT], 400)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(num_hidden_layers=2, initializer_range=0.15, max_position_embeddings=CONTEXT)
    config = CausalLMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **sizes, **special)
    CausalLM(config, seed=5).save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for (name, records), text in zip(documents().items(), (CHOICE, ROLLING, GENERATE), strict=True):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        data = dict(data_files=dict(test=str(folder / f"{name}.jsonl")), cache_dir=str(folder / "cache"))
        header = dict(task=name, dataset_path="json", dataset_kwargs=data, test_split="test", fewshot_split="test")
        lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML
        (folder / f"{name}.yaml").write_text("\n".join(lines) + text)
    return folder


def evaluate(model, tasks, names=("tiny_choice", "tiny_rolling", "tiny_generate"), **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = dict(task_manager=manager, bootstrap_iters=0, device="cpu") | options
    return lm_eval.simple_evaluate(model=model, tasks=list(names), **options)


def responses(result, task):
    """What the model answered, in the order of the documents."""
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for [response] in sample["resps"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_fewshot,batch_size", [(0, 5), (2, 1)])
def test_equals_the_harness_with_transformers(num_fewshot, batch_size, checkpoint, tasks):
    arguments = dict(pretrained=str(checkpoint), dtype="float32")
    options = dict(num_fewshot=num_fewshot, batch_size=batch_size)
    expected = evaluate("hf", tasks, model_args=arguments, **options)
    actual = evaluate("arfast", tasks, model_args=arguments, **options)
    for task in ("tiny_choice", "tiny_rolling"):
        for ours, theirs in zip(responses(actual, task), responses(expected, task), strict=True):
            logprob, greedy = ours if task == "tiny_choice" else (ours, None)
            if task == "tiny_choice":
                assert greedy == (str(theirs[1]) == "True")
            assert float(logprob) == pytest.approx(float(theirs[0] if task == "tiny_choice" else theirs), rel=1e-4)
    texts = responses(actual, "tiny_generate")
    assert texts == responses(expected, "tiny_generate")
    assert len(set(texts)) > 3 and not any("\n" in text or " the" in text for text in texts)
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert actual["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    accuracies = [expected["results"]["tiny_choice"][f"{name},none"] for name in ("acc", "acc_norm")]
    assert all(0 < accuracy < 1 for accuracy in accuracies)


@pytest.fixture(scope="module")
def adapter(checkpoint):
    return ArfastLM(checkpoint, dtype="float32", device="cpu", batch_size=3)


def requests(*arguments):
    return [SimpleNamespace(args=argument) for argument in arguments]


def test_models_and_argument_strings(checkpoint, adapter):
    text = requests(("def wrap(", "self)"))
    expected = adapter.loglikelihood(text, disable_tqdm=True)
    own = ArfastLM(adapter.model, adapter.tokenizer)
    assert own.loglikelihood(text, disable_tqdm=True) == expected
    options = dict(batch_size="auto", max_batch_size=None, device="cpu")
    made = ArfastLM.create_from_arg_string(f"pretrained={checkpoint},dtype=bfloat16,max_length=64", options)
    assert made.model.head_weight.dtype == torch.bfloat16 and (made.batch_size, made.max_length) == (16, 64)
    assert made.loglikelihood(text, disable_tqdm=True)[0][0] == pytest.approx(expected[0][0], rel=0.05)
    assert made.tokenizer_name == adapter.tokenizer_name
    assert ArfastLM(checkpoint, device="cuda:0").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_long_contexts_lose_their_beginning_with_a_warning(adapter):
    with pytest.warns(UserWarning, match="1 of 2 contexts lost their beginning to fit 128 tokens"):
        long, _ = adapter.loglikelihood(requests((TEXT[:900], "ab"), ("x", "ab")), disable_tqdm=True)
    tokens = adapter.tok_encode(TEXT[:900] + "ab")[-129:]
    count = len(adapter.tok_encode(TEXT[:900] + "ab")) - len(adapter.tok_encode(TEXT[:900]))
    with torch.no_grad():
        logprobs = adapter.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[t - 1, tokens[t]]) for t in range(129 - count, 129))
    assert long[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="ArfastLM: continuation must be at most as long as the context of 128 tokens"):
        adapter.loglikelihood(requests(("x", TEXT[:900])), disable_tqdm=True)


def test_rolling_scores_every_token_once(adapter):
    """The harness puts the start token before the text's own, so that is a target too."""
    tokens = adapter.tok_encode(TEXT[:300])[:100]
    text = adapter.tokenizer.decode(tokens)
    row = torch.tensor([[adapter.prefix_token_id, *adapter.tok_encode(text)]])
    expected = float(adapter.model.score(row).sums)
    assert adapter.loglikelihood_rolling(requests((text,)), disable_tqdm=True)[0] == pytest.approx(expected, rel=1e-5)


def test_generation_ends_as_soon_as_all_have_stopped(adapter, monkeypatch):
    steps = []
    generate = type(adapter.model).generate

    def watched(model, input_ids, streamer, **options):
        put = streamer.put
        streamer.put = lambda value: (steps.append(value), put(value))
        return generate(model, input_ids, streamer=streamer, **options)

    monkeypatch.setattr(type(adapter.model), "generate", watched)
    contexts = ["import re, textwrap", "def"]  # the longest first, as they are batched
    whole = adapter.generate_until(requests(*((text, dict(max_gen_toks=40)) for text in contexts)), disable_tqdm=True)
    rows = torch.stack(steps[1:], dim=1)  # behind the prompts
    decode = adapter.tokenizer.decode
    spans = [[decode(row[i : i + 3]) for i in range(first, 30)] for row, first in zip(rows, (4, 15), strict=True)]
    stops = [next(text for text in texts if "\N{REPLACEMENT CHARACTER}" not in text) for texts in spans]
    ends = [next(n for n in range(41) if any(stop in decode(row[:n]) for stop in stops)) for row in rows]
    assert 0 < ends[0] < ends[1] < 40
    steps.clear()
    arguments = dict(until=[*stops, ""], max_gen_toks=40)
    stopped = adapter.generate_until(requests(*((text, arguments) for text in contexts)), disable_tqdm=True)
    assert stopped == [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert len(steps) == 1 + ends[1]


def test_a_special_token_can_be_a_stop_string(adapter, monkeypatch):
    """Decoded text does not show it."""
    pad, end = adapter.tokenizer.pad_token_id, adapter.tokenizer.eos_token_id
    tokens = torch.tensor([[*adapter.tokenizer.encode("so", add_special_tokens=False), pad, 65, 66]])

    def given(model, input_ids, eos_token_id, streamer, **options):
        assert eos_token_id == [end, pad]
        return torch.cat([input_ids, tokens], 1)

    monkeypatch.setattr(type(adapter.model), "generate", given)
    assert adapter.generate_until(requests(("x", dict(until=["<|pad|>"], max_gen_toks=9))), disable_tqdm=True) == ["so"]


def test_requests_of_several_kinds_keep_their_order(adapter):
    """Other arguments, other batches; the longest contexts go first."""
    kinds = [dict(until=["e"], max_gen_toks=9), dict(max_gen_toks=5)]
    texts = [(TEXT[i : i + 5 * i], kinds[i % 2]) for i in (1, 5, 2, 9, 4, 3, 6)]
    alone = [adapter.generate_until(requests(text), disable_tqdm=True)[0] for text in texts]
    assert adapter.generate_until(requests(*texts), disable_tqdm=True) == alone and len(set(alone)) > 3
    pairs = [(text, TEXT[i : i + 4]) for i, (text, _) in enumerate(texts)]
    alone = [adapter.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    for ours, expected in zip(adapter.loglikelihood(requests(*pairs), disable_tqdm=True), alone, strict=True):
        assert ours == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_sampling_and_beams(adapter):
    arguments = dict(until=["\n"], max_gen_toks=12, do_sample=True, temperature=0.9, top_p=0.9)
    torch.manual_seed(3)
    first = adapter.generate_until(requests(("def ", arguments)), disable_tqdm=True)
    torch.manual_seed(3)
    assert adapter.generate_until(requests(("def ", arguments)), disable_tqdm=True) == first
    beams = adapter.generate_until(requests(("def ", dict(max_gen_toks=8, num_beams=3))), disable_tqdm=True)
    row = torch.tensor([adapter.tok_encode("def ")])
    ends = adapter.tokenizer.eos_token_id
    tokens = adapter.model.generate(row, max_new_tokens=8, num_beams=3, eos_token_id=ends)[0, row.shape[1] :]
    assert beams == [adapter.tokenizer.decode(tokens)]


@pytest.mark.parametrize(
    "given,stops,length,options",
    [
        ({}, [], 256, dict(do_sample=False)),
        (dict(until="\n", max_tokens=7, max_gen_toks=5), ["\n"], 5, dict(do_sample=False)),
        (dict(do_sample=False, temperature=0.7, top_k=3), [], 256, dict(do_sample=False)),
        (dict(temperature=0.7, top_k=3), [], 256, dict(do_sample=True, temperature=0.7, top_k=3)),
        (dict(do_sample=True), [], 256, dict(do_sample=True, temperature=1.0)),
        (dict(do_sample=True, temperature=0.0, num_beams=2), [], 256, dict(do_sample=False, num_beams=2)),
    ],
)
def test_generation_arguments(given, stops, length, options):
    assert generation_arguments(given, 256) == (stops, length, options)


@pytest.mark.filterwarnings("ignore")
def test_errors(adapter, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="ArfastLM: generation_kwargs must be among until, .*, got repetition_penalty"):
        generation_arguments(dict(repetition_penalty=1.2), 256)
    with pytest.raises(ValueError, match="ArfastLM: max_gen_toks must be below the context of 128 tokens, got 128"):
        adapter.generate_until(requests(("x", dict(max_gen_toks=128))), disable_tqdm=True)
    with pytest.raises(ValueError, match="ArfastLM: apply_chat_template must be False .*, got True"):
        adapter.apply_chat_template([dict(role="user", content="x")])
    with pytest.raises(ValueError, match="ArfastLM: tokenizer must be given with a model"):
        ArfastLM(adapter.model)
    with pytest.raises(ValueError, match="ArfastLM: dtype must be auto or a floating-point type of torch, got 'int8'"):
        ArfastLM(checkpoint, dtype="int8")
    with pytest.raises(ValueError, match=r"ArfastLM: max_length must be an integer in \[2, 128\], got 129"):
        ArfastLM(checkpoint, max_length=129)
    for wrong in (0, "many"):
        with pytest.raises(ValueError, match=f"ArfastLM: batch_size must be an integer at least 1, got {wrong!r}"):
            ArfastLM(checkpoint, batch_size=wrong)
    with pytest.raises(FileNotFoundError, match="from_pretrained: path must be an existing directory"):
        ArfastLM(tmp_path / "nowhere")
