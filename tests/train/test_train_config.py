"""TrainConfig refuses bad values by name; the schedule equals its closed form."""

import dataclasses
import json
import math

import numpy
import pytest

from arfast.train.config import TrainConfig
from arfast.train.schedule import learning_rate

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
    ("batch_ramp", "4:8"),
    ("seqlen_ramp", [512]),
    ("packing", "dense"),
    ("schedule", "step"),
    ("decay_tokens", -1),
    ("decay_tokens", 40_960),
    ("optimizer", "sgd"),
    ("momentum", 1.0),
    ("decay_embeddings", None),
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
    ("scheduled_sampling", 1.1),
    ("scheduled_sampling_shape", "cosine"),
    ("scheduled_sampling_tokens", -1),
    ("dtype", "float16"),
    ("router_bias_rate", -1.0),
    ("activation_checkpointing", 1),
    ("compile", "yes"),
    ("on_nonfinite", "ignore"),
    ("on_spike", "skip"),
    ("spike_window", 7),
    ("rewind_steps", 0),
    ("recheck_every", -1),
    ("peak_flops", 0.0),
    ("log", ["wandb"]),
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


RAMPS = [
    ("batch_ramp", [[0, 4], [100, 8]], r"begin a stage at a step: 0 \+ a multiple of 2048 tokens, got 100"),
    (
        "batch_ramp",
        [[0, 2], [4096, 4], [5120, 8]],
        r"begin a stage at a step: 4096 \+ a multiple of 2048 tokens, got 5120",
    ),
    ("seqlen_ramp", [[0, 256], [2048, 512]], r"begin a stage at a step: 0 \+ a multiple of 4096 tokens, got 2048"),
    ("batch_ramp", [[4096, 8]], "begin at 0 tokens, got 4096"),
    ("batch_ramp", [[0, 4]], "end with batch_size=8, got 4"),
    ("seqlen_ramp", [[0, 256]], "end with seqlen=512, got 256"),
    ("batch_ramp", [[0, 4], [4096, 2], [2048, 8]], r"increase in tokens, got \[0, 4096, 2048\]"),
    ("batch_ramp", [[0, 4], [0, 8]], r"increase in tokens, got \[0, 0\]"),
    ("seqlen_ramp", [[0, 100], [4096, 512]], "divide seqlen=512, got 100"),
    ("seqlen_ramp", [[0, 1], [4096, 512]], "divide seqlen=512, got 1"),
    ("batch_ramp", [[0, 4], [20_480, 8]], "begin its last stage before the run ends after 20480 tokens, got 20480"),
    (
        "seqlen_ramp",
        [[0, 256], [81_920, 512]],
        "begin its last stage before the run ends after 40960 tokens, got 81920",
    ),
    ("batch_ramp", [[0]], r"hold \[from_tokens, batch_size\], got \[0\]"),
    ("batch_ramp", [[0, 8, 1]], r"hold \[from_tokens, batch_size\], got \[0, 8, 1\]"),
    ("batch_ramp", [[0, True]], r"hold \[from_tokens, batch_size\], got \[0, True\]"),
    ("batch_ramp", [["0", 8]], r"hold \[from_tokens, batch_size\], got \['0', 8\]"),
    ("batch_ramp", [[0, 0], [4096, 8]], r"hold \[from_tokens, batch_size\], got \[0, 0\]"),
    ("seqlen_ramp", [[0, 512, 0.0]], r"hold .+ or \[from_tokens, seqlen, rope_theta\], got \[0, 512, 0.0\]"),
]


@pytest.mark.parametrize(("name", "ramp", "message"), RAMPS, ids=[f"{n}={r}" for n, r, _ in RAMPS])
def test_wrong_ramps(name, ramp, message):
    with pytest.raises(ValueError, match=f"^TrainConfig: {name} must {message}$"):
        TrainConfig(max_steps=10, **{name: ramp})


def test_values_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match="micro_batch_size must be <= batch_size=2, got 4"):
        TrainConfig(max_steps=10, batch_ramp=[[0, 2], [1024, 8]], micro_batch_size=4)
    with pytest.raises(ValueError, match="compile must be False with cuda_graph, got True"):
        TrainConfig(max_steps=10, compile=True, cuda_graph=True)
    with pytest.raises(ValueError, match="scheduled_sampling must be 0 with cuda_graph, got 0.1"):
        TrainConfig(max_steps=10, scheduled_sampling=0.1, cuda_graph=True)
    with pytest.raises(ValueError, match=r"decay_tokens must be in \[0, 36864\] after the warm-up, got 36865"):
        TrainConfig(max_steps=10, warmup_tokens=4096, decay_tokens=36_865)
    rule = r"rewind_steps must be <= save_every \* \(keep_last - 1\) = 50, as far back as checkpoints are kept, got 100"
    with pytest.raises(ValueError, match=rule):
        TrainConfig(max_steps=10, on_spike="rewind", save_every=50)
    TrainConfig(max_steps=10, on_spike="rewind", save_every=50, keep_last=0)
    TrainConfig(max_steps=10, on_spike="rewind", save_every=50, keep_last=3)


def test_stages():
    """What the ramps say, point by point."""
    batch_ramp, seqlen_ramp = [[0, 2], [8192, 4], [32_768, 8]], [[0, 128], [4096, 256, 20_000], [40_960, 1024]]
    config = TrainConfig(max_tokens=100_000, seqlen=1024, batch_ramp=batch_ramp, seqlen_ramp=seqlen_ramp)
    tokens, step = 0, 0
    while tokens < 100_000:
        stage = config.stages.at(tokens)
        assert stage.batch_size == [size for start, size in batch_ramp if start <= tokens][-1]
        assert stage.seqlen == [entry[1] for entry in seqlen_ramp if entry[0] <= tokens][-1]
        assert stage.rope_theta == (None if tokens < 4096 else 20_000.0)
        assert stage.pieces * stage.seqlen == 1024
        assert (config.stages.tokens_after(step), stage.tokens_per_step) == (tokens, stage.batch_size * 1024)
        tokens, step = tokens + stage.tokens_per_step, step + 1
    assert (config.num_steps, config.total_tokens) == (step, tokens)
    for steps in range(12, step + 1):
        shorter = TrainConfig(max_steps=steps, seqlen=1024, batch_ramp=batch_ramp, seqlen_ramp=seqlen_ramp)
        assert shorter.total_tokens == config.stages.tokens_after(steps)


def test_llama_recipe():
    """Figures of arXiv:2407.21783, table 3 and section 3.4, to a step."""
    for name, peak in (("llama3-8b", 3e-4), ("llama3-70b", 1.5e-4), ("llama3-405b", 8e-5)):
        config = TrainConfig.recipe(name)
        stages = list(config.stages)
        assert config.learning_rate == peak
        assert [stage.tokens_per_step >> 20 for stage in stages] == [4, 8, 16, 16, 16, 16, 16]
        assert [stage.seqlen for stage in stages] == [4096, 8192, 8192, 16_384, 32_768, 65_536, 131_072]
        assert [stage.from_tokens for stage in stages[1:3]] == pytest.approx([252e6, 2.87e12], rel=2e-3)
        assert config.total_tokens == pytest.approx(15.6e12, rel=1e-4)
        assert config.total_tokens - stages[3].from_tokens == pytest.approx(800e9, rel=1e-4)
        assert config.stages.tokens_after(8000) == config.num_warmup_tokens
        assert config.num_decay_tokens == pytest.approx(40e6, rel=0.3)
    assert learning_rate(
        config.total_tokens - config.num_decay_tokens,
        peak=8e-5,
        floor=8e-5 * config.final_lr_ratio,
        warmup_tokens=config.num_warmup_tokens,
        total_tokens=config.total_tokens,
        decay_tokens=config.num_decay_tokens,
    ) == pytest.approx(8e-7)


def test_recipes():
    for name in TrainConfig.recipes():
        config = TrainConfig.recipe(name, output_dir="somewhere")
        assert config.output_dir == "somewhere"
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="TrainConfig: recipe must be one of llama3-8b, .*, got 'gpt5'"):
        TrainConfig.recipe("gpt5")


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
        rate = learning_rate(tokens, peak=peak, floor=floor, warmup_tokens=warmup, total_tokens=total)
        assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("decay", [0, 1, 300])
def test_shapes(shape, decay):
    """Against the same curves by interpolation between their corners, and half a cosine."""
    peak, floor, warmup, total = 3e-3, 2e-4, 100, 1000
    options = dict(peak=peak, floor=floor, warmup_tokens=warmup, total_tokens=total, decay_tokens=decay)
    end = {"cosine": floor, "linear": floor, "constant": peak}[shape]
    corners = [(0, 0.0), (warmup, peak), (total - decay, end)] + ([(total, 0.0)] if decay else [])
    for tokens in range(1, 1200):
        expected = numpy.interp(tokens, *zip(*corners))
        if shape == "cosine" and warmup < tokens < total - decay:
            share = (tokens - warmup) / (total - decay - warmup)
            expected = peak - (peak - floor) * math.sin(math.pi * share / 2) ** 2
        assert learning_rate(tokens, shape, **options) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_constant_rate_decays_over_the_last_fifth():
    config = TrainConfig(max_steps=100, batch_size=10, seqlen=100, schedule="constant")
    assert config.num_decay_tokens == 20_000
    assert TrainConfig(max_steps=100, schedule="constant", decay_tokens=0).num_decay_tokens == 0
    assert TrainConfig(max_steps=100).num_decay_tokens == 0


def test_schedule_meets_its_ends():
    schedule = {"peak": 1.0, "floor": 0.1, "warmup_tokens": 100, "total_tokens": 1000}
    assert learning_rate(100, **schedule) == 1.0
    assert learning_rate(1000, **schedule) == 0.1
    assert learning_rate(550, **schedule) == pytest.approx(0.55)
