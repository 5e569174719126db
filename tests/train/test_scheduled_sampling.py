"""Scheduled sampling: which inputs are replaced, by what, from when on; a run that is killed loses nothing of it."""

import doctest
import random
import signal

import pytest
import torch
from tiny_models import TINY
from train_doubles import TinyConfig, TinyLM, assert_same_outcome, outcome

from arfast.data import Batch, Document, prepare_dataset
from arfast.models import CausalLM, EncoderDecoder, EncoderDecoderConfig, LinearLM
from arfast.train import TrainConfig, scheduled_sampling
from arfast.train.engine import Engine
from arfast.train.scheduled_sampling import ScheduledSampling, replacement_probability

BOS, EOS, PAD = 0, 1, 2
SPECIAL = TINY.replace(bos_token_id=BOS, eos_token_id=(EOS, 60), pad_token_id=PAD)


def config(peak, **options):
    settings = dict(max_steps=10, batch_size=8, seqlen=16, scheduled_sampling=peak, scheduled_sampling_tokens=0)
    return TrainConfig(**settings | options)


def make_batch(rows, seqlen=16, seed=0):
    """Random tokens; the first of each row is no target, nor are those of a prompt in every second row."""
    ids = torch.randint(0, 61, (rows, seqlen), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = -100
    labels[1::2, : seqlen // 4] = -100
    return Batch(ids, labels, None, int((labels != -100).sum()))


def rows_of(batch, sizes):
    parts = zip(batch.input_ids.split(sizes), batch.labels.split(sizes))
    return [Batch(ids, labels, None, int((labels != -100).sum())) for ids, labels in parts]


@pytest.mark.parametrize("shape", ["linear", "sigmoid"])
def test_probability_rises_from_zero_to_its_peak(shape):
    found = [replacement_probability(tokens, shape, peak=0.6, rise_tokens=1000) for tokens in range(0, 1001, 10)]
    assert found[0] == 0 and found[-1] == pytest.approx(0.6) and found[50] == pytest.approx(0.3)
    assert all(a < b for a, b in zip(found, found[1:]))
    assert replacement_probability(5000, shape, peak=0.6, rise_tokens=1000) == pytest.approx(0.6)
    assert replacement_probability(0, shape, peak=0.6, rise_tokens=0) == pytest.approx(0.6)


def test_sigmoid_is_slow_at_both_ends():
    """The logistic function on [-5, 5], moved and stretched to [0, 1]."""
    found = [replacement_probability(i, "sigmoid", peak=1.0, rise_tokens=1000) for i in range(0, 1001, 200)]
    curve = torch.linspace(-5, 5, 6, dtype=torch.float64).sigmoid()
    assert found == pytest.approx(((curve - curve[0]) / (curve[-1] - curve[0])).tolist())


def test_only_ordinary_targets_are_replaced_and_only_by_ordinary_tokens():
    model, batch = CausalLM(SPECIAL), make_batch(400)
    (mixed,) = ScheduledSampling(model, config(1.0))([batch], step=3, tokens=0)
    special = torch.isin(batch.input_ids, torch.tensor([BOS, EOS, PAD, 60]))
    kept = (batch.labels == -100) | special
    assert torch.equal(mixed.input_ids[kept], batch.input_ids[kept])
    changed = mixed.input_ids != batch.input_ids
    assert changed[~kept].float().mean() > 0.9  # the others are drawn as they were
    assert not torch.isin(mixed.input_ids[changed], torch.tensor([BOS, EOS, PAD, 60])).any()
    assert mixed.labels is batch.labels and mixed.num_tokens == batch.num_tokens


def test_first_tokens_of_documents_stay():
    """Also where a data set has them as targets, and with an empty document at the end."""
    batch = make_batch(1, 640)
    offsets = torch.tensor([0, 7, 8, 300, 640, 640], dtype=torch.int32)
    batch = Batch(batch.input_ids, batch.input_ids.clone(), offsets, 640)
    (mixed,) = ScheduledSampling(CausalLM(TINY), config(1.0))([batch], step=0, tokens=0)
    first = offsets[:4].long()
    assert torch.equal(mixed.input_ids[0, first], batch.input_ids[0, first])
    assert (mixed.input_ids != batch.input_ids).float().mean() > 0.8


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_share_of_replaced_tokens(share):
    model, batch = LinearLM(61, 8), make_batch(2000)
    for weight in model.parameters():
        weight.data.zero_()  # all tokens equally likely
    (mixed,) = ScheduledSampling(model, config(share))([batch], step=1, tokens=0)
    targets = batch.labels != -100
    count, expected = int(targets.sum()), share * 60 / 61
    found = (mixed.input_ids != batch.input_ids)[targets].double().mean().item()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_replaced_tokens_are_drawn_from_the_models_distribution():
    """Of one row many times over, what is new at a place has the distribution of other tokens after those before it."""
    stats = pytest.importorskip("scipy.stats")
    model, rows = CausalLM(SPECIAL), 8000
    row = torch.tensor([[BOS, 17, 5, 44]])
    ids = row.expand(rows, 4)
    batch = Batch(ids, torch.where(ids == BOS, -100, ids), None, 3 * rows)
    (mixed,) = ScheduledSampling(model, config(0.5))([batch], step=7, tokens=0)
    with torch.no_grad():
        logits = model(row).logits[0].double()
    logits[:, [BOS, EOS, PAD, 60]] = -torch.inf
    for place in (1, 2, 3):
        probabilities = logits[place - 1].index_fill(0, row[0, place], -torch.inf).softmax(-1)
        found = torch.bincount(mixed.input_ids[:, place], minlength=61).index_fill(0, row[0, place], 0).double()
        expected = found.sum() * probabilities
        common = expected >= 5
        pooled = [torch.cat([counts[common], counts[~common].sum()[None]]) for counts in (found, expected)]
        assert common.sum() > 5 and stats.chisquare(*pooled).pvalue > 1e-3
    changed = mixed.input_ids[:, 1:] != row[:, 1:]
    both, each = (changed[:, 0] & changed[:, 1]).double().mean(), changed.double().mean(0)
    assert both.item() == pytest.approx((each[0] * each[1]).item(), abs=0.02)  # places are drawn independently


def test_predictions_are_those_of_generation():
    """Without dropout, and without gradients; afterwards the model trains on."""
    model, modes = CausalLM(TINY).train(), []
    model.register_forward_pre_hook(lambda model, inputs: modes.append((model.training, torch.is_grad_enabled())))
    ScheduledSampling(model, config(0.5))([make_batch(8)], step=0, tokens=0)
    assert modes == [(False, False)] and model.training


def test_draws_depend_on_seed_step_and_position_alone():
    model, batch = CausalLM(TINY), make_batch(8)
    sampling = ScheduledSampling(model, config(0.5))
    whole = sampling([batch], step=4, tokens=0)[0].input_ids
    for sizes in ([1] * 8, [3, 5]):
        cut = sampling(rows_of(batch, sizes), step=4, tokens=0)
        assert torch.equal(torch.cat([part.input_ids for part in cut]), whole)
    assert torch.equal(sampling([batch], step=4, tokens=0)[0].input_ids, whole)
    assert not torch.equal(sampling([batch], step=5, tokens=0)[0].input_ids, whole)
    other = ScheduledSampling(model, config(0.5, seed=1))
    assert not torch.equal(other([batch], step=4, tokens=0)[0].input_ids, whole)


def weights(engine):
    return torch.cat([parameter.detach().flatten() for parameter in engine.model.parameters()])


def test_no_replaced_token_is_plain_training():
    """In the first step, where the probability is 0, and where it is so small that nothing is drawn."""
    batches = [make_batch(8, seed=seed) for seed in range(3)]
    plain = Engine(CausalLM(TINY), config(0.0))
    rising = Engine(CausalLM(TINY), config(0.9, scheduled_sampling_tokens=10**15))
    results = [[engine.step([batch]) for batch in batches] for engine in (plain, rising)]
    assert results[0] == results[1]
    assert torch.equal(weights(plain), weights(rising))
    whole_run = Engine(CausalLM(TINY), config(0.9, scheduled_sampling_tokens=None))
    assert whole_run.step([batches[0]]) == results[0][0]
    assert whole_run.step([batches[1]]) != results[0][1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_one_on_the_mixed_inputs(dtype):
    """With the true targets, in micro-batches as in one."""
    batch = make_batch(8)
    engine = Engine(CausalLM(TINY), config(0.5, dtype=dtype))
    mixed = ScheduledSampling(engine.compute_model, engine.config)([batch], step=0, tokens=0)
    expected = Engine(CausalLM(TINY), config(0.0, dtype=dtype)).step(mixed)
    assert engine.step([batch]) == expected
    assert Engine(CausalLM(TINY), config(0.0, dtype=dtype)).step([batch]).loss != expected.loss
    if dtype == "float32":
        cut = Engine(CausalLM(TINY), config(0.5)).step(rows_of(batch, [3, 5]))
        assert (cut.loss, cut.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)


def test_a_repeated_step_has_the_same_inputs():
    engines = [Engine(CausalLM(TINY), config(0.5, recheck_every=every)) for every in (0, 1)]
    for engine in engines:
        for seed in range(2):
            engine.step([make_batch(8, seed=seed)])
    assert torch.equal(weights(engines[0]), weights(engines[1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    generator, path = random.Random(0), tmp_path_factory.mktemp("data") / "words"
    texts = [" ".join(generator.choice(["up", "down", "left"]) for _ in range(40)) + f" {i}" for i in range(40)]
    prepare_dataset([Document(text, "") for text in texts], path, vocab_size=270, validation_fraction=0.2)
    return path


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_kill_and_resume(worker, memory_path, data, packing):
    settings = dict(max_steps=6, seqlen=32, batch_size=6, micro_batch_size=4, save_every=2, packing=packing)
    settings |= dict(scheduled_sampling=0.5, dtype="bfloat16", keep_freed_memory=False, sample_prompts=["up"])
    sizes = dict(vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    job = {"model": sizes | dict(num_key_value_heads=1, max_position_embeddings=64), "data": str(data)}
    assert worker(memory_path / "undisturbed", config=settings, **job)[0] == 0
    expected = outcome(memory_path / "undisturbed")
    assert worker(memory_path / "run", config=settings, kill_in={"step": 4}, **job)[0] == -signal.SIGKILL
    status, _, log = worker(memory_path / "run", config=settings, **job)
    assert status == 0, log
    assert_same_outcome(outcome(memory_path / "run"), expected)
    assert worker(memory_path / "plain", config=settings | dict(scheduled_sampling=0.0), **job)[0] == 0
    assert outcome(memory_path / "plain")["model.safetensors"] != expected["model.safetensors"]


def test_models_that_cannot_be_asked_for_some_logits():
    with pytest.raises(ValueError, match="Trainer: scheduled_sampling must be 0 for a TinyLM, got 0.5"):
        Engine(TinyLM(TinyConfig()), config(0.5))
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2, separator_token_id=3)
    with pytest.raises(ValueError, match="Trainer: scheduled_sampling must be 0 for a EncoderDecoder, got 0.5"):
        Engine(EncoderDecoder(EncoderDecoderConfig(encoder_layers=1, decoder_layers=1, **sizes)), config(0.5))


def test_examples():
    assert doctest.testmod(scheduled_sampling).failed == 0
