"""TrainConfig refuses bad values by name; the schedule equals its closed form."""

import dataclasses
import json
import math

import pytest

from arfast.train.config import TrainConfig
from arfast.train.schedule import warmup_cosine

WRONG = [
    ("output_dir", ""),
    ("output_dir", 3),
    ("resume", 1),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_steps", 0),
    ("max_steps", True),
    ("seqlen", 1),
    ("seqlen", "512"),
    ("batch_size", 0),
    ("batch_size", True),
    ("micro_batch_size", 0),
    ("micro_batch_size", 9),
    ("packing", "dense"),
    ("learning_rate", 0.0),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("learning_rate", "1e-3"),
    ("warmup_tokens", -1),
    ("warmup_tokens", 10**9),
    ("final_lr_ratio", 1.1),
    ("weight_decay", -0.1),
    ("beta1", 1.0),
    ("beta2", -0.1),
    ("epsilon", 0.0),
    ("max_grad_norm", 0.0),
    ("label_smoothing", 1.0),
    ("z_loss", -1e-4),
    ("dtype", "float16"),
    ("on_nonfinite", "ignore"),
    ("cuda_graph", 1),
    ("keep_freed_memory", None),
    ("save_every", -1),
    ("eval_every", -1),
    ("sample_every", 2.5),
    ("log_every", 0),
    ("keep_last", -1),
    ("async_save", 1),
    ("watchdog_seconds", 0.0),
    ("eval_batch_size", 0),
    ("eval_tokens", 0),
    ("sample_prompts", "def"),
    ("sample_prompts", (1,)),
    ("sample_tokens", 0),
    ("sample_temperature", -1.0),
    ("progress", "yes"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={v!r}" for n, v in WRONG])
def test_wrong_value_names_the_field(name, value):
    with pytest.raises(ValueError, match=rf"^TrainConfig: {name} must be .+, got .+$"):
        TrainConfig(**{"max_steps": 10, name: value})


def test_every_field_has_a_refused_value():
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {name for name, _ in WRONG}


def test_few_fields():
    assert len(dataclasses.fields(TrainConfig)) < 60


def test_a_length_is_required():
    with pytest.raises(ValueError, match="max_tokens must be given"):
        TrainConfig()


def test_unknown_field():
    with pytest.raises(ValueError, match="field must be one of .*, got 'lr'"):
        TrainConfig.from_dict({"max_steps": 1, "lr": 1.0})


def test_json_round_trip(tmp_path):
    config = TrainConfig(max_tokens=10_000, output_dir=tmp_path, sample_prompts=["a", "b"], max_grad_norm=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_tokens": 1}, 1),
        ({"max_tokens": 4096}, 1),
        ({"max_tokens": 4097}, 2),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_tokens": 8192}, 2),
        ({"max_steps": 1, "max_tokens": 8192}, 1),
    ],
)
def test_length_of_the_run(limits, steps):
    config = TrainConfig(batch_size=8, seqlen=512, **limits)
    assert (config.num_steps, config.total_tokens) == (steps, steps * 4096)


def test_default_warmup_is_a_share_of_the_run():
    assert TrainConfig(max_steps=100, batch_size=10, seqlen=100).num_warmup_tokens == 2000
    assert TrainConfig(max_steps=100, warmup_tokens=0).num_warmup_tokens == 0


@pytest.mark.parametrize("warmup", [0, 1, 300, 1000])
def test_schedule_is_its_closed_form(warmup):
    peak, floor, total = 3e-3, 2e-4, 1000
    for tokens in range(1, 1300):
        if tokens < warmup:
            expected = peak * tokens / warmup
        elif tokens < total:
            # cos(x) = 1 - 2 sin(x / 2) ** 2, so that the expectation is not the same expression.
            expected = peak - (peak - floor) * math.sin(math.pi * (tokens - warmup) / (total - warmup) / 2) ** 2
        else:
            expected = floor
        rate = warmup_cosine(tokens, peak=peak, floor=floor, warmup_tokens=warmup, total_tokens=total)
        assert rate == pytest.approx(expected, rel=1e-12)


def test_schedule_meets_its_ends():
    schedule = {"peak": 1.0, "floor": 0.1, "warmup_tokens": 100, "total_tokens": 1000}
    assert warmup_cosine(100, **schedule) == 1.0
    assert warmup_cosine(1000, **schedule) == 0.1
    assert warmup_cosine(550, **schedule) == pytest.approx(0.55)
