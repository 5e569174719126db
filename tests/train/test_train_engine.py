"""One optimizer step: accumulation, decay groups, clipping, NaN, precision; against plain torch."""

import math

import pytest
import torch
from torch import nn
from train_doubles import TinyConfig, TinyData, TinyLM

from arfast.train import NonFiniteError, TrainConfig
from arfast.train.engine import Engine
from arfast.train.optimizer import WorkingCopy, build_optimizer

DTYPES = ["float32", "bfloat16"]


def make(model_config=None, **options):
    settings = {"max_steps": 20, "batch_size": 8, "seqlen": 16, "learning_rate": 1e-2, "warmup_tokens": 0}
    return Engine(TinyLM(model_config or TinyConfig()), TrainConfig(**settings | options))


def cut(data, position, sizes):
    """Micro-batches of these sizes from `position` on."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [data.batch(position + end - size, size) for end, size in zip(ends, sizes)]


def snapshot(engine):
    """Copies of weights, working weights and optimizer state."""
    tensors = dict(engine.model.state_dict())
    tensors |= {f"working.{name}": value for name, value in engine.compute_model.state_dict().items()}
    for name, parameter in engine.model.named_parameters():
        tensors |= {f"{kind}.{name}": value for kind, value in engine.optimizer.state.get(parameter, {}).items()}
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def flat_gradient(engine):
    return torch.cat([parameter.grad.flatten() for parameter in engine.parameters]).double()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=["plain", "smoothing, z-loss"])
def test_steps_are_the_textbook_steps(options):
    """torch's AdamW in float64, on the mean over all targets of the batch, clipped, with the cosine written out."""
    engine, data = make(max_grad_norm=0.05, **options), TinyData()
    reference = TinyLM(TinyConfig()).double()
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in (1, 2, 3):
        batch = data.batch(8 * (step - 1), 8)
        result = engine.step([batch])
        lr = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2)
        optimizer.zero_grad()
        loss = reference(batch.input_ids, batch.labels, **options).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert result.lr == pytest.approx(lr)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert result.grad_norm > 0.05
        assert (result.tokens, result.applied, result.aux_loss) == (128, True, None)
    start = TinyLM(TinyConfig()).double()
    for (name, actual), expected, origin in zip(
        engine.model.named_parameters(), reference.parameters(), start.parameters()
    ):
        moved = (expected - origin).norm()
        assert moved > 0
        assert (actual.double() - expected).norm() < 1e-4 * moved, name


def test_counters():
    engine, data = make(), TinyData()
    for step in (1, 2):
        engine.step(cut(data, engine.state.position // 16, [3, 5]))
        assert (engine.state.step, engine.state.tokens, engine.state.position) == (step, 128 * step, 128 * step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulation_does_not_depend_on_the_cut(dtype):
    """1 x 8 = 8 x 1 = 3 + 5, although rows differ in their numbers of targets."""
    losses, gradients = [], []
    for sizes in ([8], [1] * 8, [3, 5]):
        engine = make(dtype=dtype, max_grad_norm=None)
        losses.append(engine.step(cut(TinyData(), 0, sizes)).loss)
        gradients.append(flat_gradient(engine))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    assert losses == pytest.approx([losses[0]] * 3, rel=tolerance)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= tolerance * gradients[0].norm()


def test_a_mean_of_means_would_be_noticed():
    """The data of the test above tells it from the mean over all targets."""
    model, batches = TinyLM(TinyConfig()), cut(TinyData(), 0, [1] * 8)
    total = sum(model(b.input_ids, b.labels, reduction="sum").loss for b in batches)
    of_means = sum(model(b.input_ids, b.labels).loss for b in batches) / 8
    assert abs(total / sum(b.num_tokens for b in batches) / of_means - 1) > 1e-4


def test_auxiliary_loss_weighs_by_targets():
    engine, data = make(TinyConfig(aux_coefficient=0.5), max_grad_norm=None), TinyData()
    model, batches = TinyLM(TinyConfig(aux_coefficient=0.5)), cut(data, 0, [2, 6])
    num_targets = sum(b.num_tokens for b in batches)
    outputs = [model(b.input_ids, b.labels, num_items=num_targets) for b in batches]
    aux_loss = sum(o.aux_loss * b.num_tokens / num_targets for o, b in zip(outputs, batches))
    (sum(o.loss for o in outputs) + aux_loss).backward()
    result = engine.step(batches)
    assert result.aux_loss == pytest.approx(aux_loss.item(), rel=1e-6)
    assert result.loss == pytest.approx(sum(o.loss.item() for o in outputs), rel=1e-6)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    assert (flat_gradient(engine) - expected).norm() <= 1e-5 * expected.norm()


def test_batch_without_targets_changes_no_number_to_nan():
    engine, data = make(), TinyData()
    batch = data.batch(0, 2)
    batch.labels.fill_(-100)
    batch.num_tokens = 0
    assert engine.step([batch]).loss == 0.0


def test_no_batch():
    with pytest.raises(ValueError, match="Trainer: batches must hold at least one micro-batch, got none"):
        make().step([])


def test_decay_on_matrices_only():
    model = TinyLM(TinyConfig())
    model.experts = nn.Parameter(torch.zeros(3, 4, 5))
    model.scale = nn.Parameter(torch.zeros(()))
    model.norm.bias.requires_grad_(False)
    optimizer = build_optimizer(model, TrainConfig(max_steps=1, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert found == {
        "embed.weight": 0.3,
        "mix.weight": 0.3,
        "experts": 0.3,
        "mix.bias": 0.0,
        "norm.weight": 0.0,
        "scale": 0.0,
        "norm.bias": None,
    }


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_clipping(limit):
    engine = make(max_grad_norm=limit)
    norm = engine.step([TinyData().batch(0, 8)]).grad_norm
    expected = norm if limit is None else min(norm, limit)
    assert flat_gradient(engine).norm().item() == pytest.approx(expected, rel=1e-4)


def test_gradients_do_not_leak_into_the_next_step():
    data = TinyData()
    twice, once = make(learning_rate=1e-30), make(learning_rate=1e-30)
    twice.step([data.batch(0, 8)])
    twice.step([data.batch(8, 8)])
    once.step([data.batch(8, 8)])
    assert torch.equal(flat_gradient(twice), flat_gradient(once))


def poison_loss(engine):
    engine.compute_model.poison = lambda input_ids: True


def poison_one_gradient(engine, value=math.nan):
    """The loss stays finite."""
    bias = engine.compute_model.mix.bias
    bias.register_hook(lambda grad: torch.cat([grad[:-1], torch.full_like(grad[-1:], value)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (poison_loss, "loss must be finite, got nan"),
        (poison_one_gradient, "gradient norm must be finite, got nan"),
        (lambda engine: poison_one_gradient(engine, math.inf), "gradient norm must be finite, got inf"),
    ],
    ids=["loss", "nan gradient", "inf gradient"],
)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
def test_nonfinite_step_changes_no_bit(dtype, poison, what, first):
    engine, data = make(dtype=dtype), TinyData()
    if not first:
        engine.step([data.batch(0, 8)])
    before, state = snapshot(engine), vars(engine.state).copy()
    poison(engine)
    position = engine.state.position // 16
    message = rf"^Trainer: {what} at step {state['step'] + 1}, samples {position} to {position + 7}; .+not applied$"
    with pytest.raises(NonFiniteError, match=message):
        engine.step(cut(data, position, [4, 4]))
    assert_same_bits(snapshot(engine), before)
    assert vars(engine.state) == state
    assert all(parameter.grad is None for parameter in engine.parameters)


def test_nan_in_one_micro_batch_is_enough():
    engine, data = make(), TinyData()
    bad = data.batch(3, 1).input_ids
    engine.model.poison = lambda input_ids: torch.equal(input_ids, bad)
    with pytest.raises(NonFiniteError):
        engine.step(cut(data, 0, [1] * 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_step_then_goes_on(dtype):
    """A run that skips a batch ends where a run ends that never had it, but for the learning rate's place."""
    engine, data = make(dtype=dtype, on_nonfinite="skip", final_lr_ratio=1.0), TinyData()
    other = make(dtype=dtype, final_lr_ratio=1.0)
    engine.step([data.batch(0, 8)])
    other.step([data.batch(0, 8)])
    engine.compute_model.poison = lambda input_ids: True
    before = snapshot(engine)
    result = engine.step([data.batch(8, 8)])
    assert not result.applied
    assert math.isnan(result.loss)
    assert_same_bits(snapshot(engine), before)
    state = engine.state
    assert (state.step, state.tokens, state.position, state.consecutive_skips) == (2, 256, 256, 1)
    engine.compute_model.poison = None
    engine.step([data.batch(16, 8)])
    other.step([data.batch(16, 8)])
    assert engine.state.consecutive_skips == 0
    assert_same_bits(snapshot(engine), snapshot(other))


def test_three_skips_in_a_row_stop():
    engine, data = make(on_nonfinite="skip"), TinyData()
    poison_loss(engine)
    for _ in range(2):
        engine.step([data.batch(0, 8)])
    with pytest.raises(NonFiniteError, match=r"loss must be finite in one of 3 steps in a row, got nan at step 3"):
        engine.step([data.batch(0, 8)])


def test_working_copy_rounds_the_masters():
    engine = make(dtype="bfloat16")
    engine.step([TinyData().batch(0, 8)])
    working = dict(engine.compute_model.named_parameters())
    for name, master in engine.model.named_parameters():
        assert master.dtype == torch.float32
        assert torch.equal(working[name], master.to(torch.bfloat16))
        assert working[name].grad is None


def test_working_copy_sums_gradients_in_float32():
    """256 + 1 + 1 + ... in bfloat16 would stay 256."""
    master = nn.Linear(1, 1, bias=False)
    copy = WorkingCopy(master, torch.bfloat16)
    for value in [256.0] + [1.0] * 100:
        (copy.module.weight.sum() * value).backward()
    assert master.weight.grad.item() == 356.0


def test_working_copy_keeps_buffers_and_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(2, 2, bias=False)
            self.register_buffer("frequencies", torch.ones(2))

    tied = Tied()
    copy = WorkingCopy(tied, torch.bfloat16)
    assert copy.module.a.weight is copy.module.b.weight
    assert copy.module.a.weight is not tied.a.weight
    assert copy.module.frequencies.dtype == torch.float32


def test_unused_parameter_is_left_alone():
    """In either precision: no gradient is no gradient, and not zero."""
    for dtype in DTYPES:
        engine = make(dtype=dtype)
        unused = nn.Parameter(torch.ones(3, 3))
        model = TinyLM(TinyConfig())
        model.unused = unused
        engine = Engine(model, engine.config)
        for position in (0, 8):
            engine.step([TinyData().batch(position, 8)])
        assert torch.equal(unused, torch.ones(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_learns(dtype):
    engine, data = make(dtype=dtype, max_steps=60, learning_rate=3e-2), TinyData(num_samples=16)
    losses = [engine.step([data.batch(engine.state.position // 16, 8)]).loss for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]
