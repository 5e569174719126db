"""CausalLM under torch.compile(fullgraph=True): training and decoding are one graph each, and equal eager execution.

On the CPU most run by the back end that only traces; on a GPU, and once on the CPU, by inductor.
"""

import copy

import pytest
import torch
from accuracy import assert_accurate
from tiny_models import TINY, TINY_EXPERTS

from arfast.models import CausalLM, CausalLMConfig
from arfast.nn import StaticKVCache

CONFIGS = {
    "dense": TINY,
    "experts": TINY_EXPERTS.replace(router_z_loss_coef=0.1, router_score="sigmoid"),
    "window": TINY.replace(sliding_window=5, layer_types=("sliding_attention", "full_attention")),
    "qwen": TINY.replace(qk_norm=True, qkv_bias=True),
}
DOCUMENTS = torch.tensor([0, 5, 5, 30, 51], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(params=CONFIGS)
def config(request) -> CausalLMConfig:
    return CONFIGS[request.param]


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def batch(packed: bool, device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (1, 51) if packed else (3, 17), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[0, 7:9] = -100
    return dict(input_ids=ids, labels=labels) | (dict(cu_seqlens=DOCUMENTS.to(device)) if packed else {})


def training_step(forward, model: CausalLM, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and all gradients, flat."""
    model.zero_grad()
    out = forward(**inputs, label_smoothing=0.1, z_loss=1e-2, num_items=40)
    loss = out.loss if out.aux_loss is None else out.loss + out.aux_loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def check_training(config, packed, backend):
    model, inputs = CausalLM(config, seed=3), batch(packed)
    expected = training_step(model, model, inputs)
    actual = training_step(torch.compile(model, fullgraph=True, backend=backend), model, inputs)
    assert num_graphs() == 1
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_training_step(config, packed):
    check_training(config, packed, "aot_eager")


def test_training_step_by_inductor():
    check_training(CONFIGS["experts"], True, "inductor")


def test_another_number_of_targets_needs_no_new_graph():
    """Accumulation divides by a number that is another one in every step."""
    model, inputs = CausalLM(TINY, seed=3), batch(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for num_items in (51, 48, 40, 31):
        torch.testing.assert_close(
            compiled(**inputs, num_items=num_items).loss, model(**inputs, num_items=num_items).loss
        )
    assert num_graphs() <= 2


def test_more_positions_than_the_rotary_tables_hold():
    model, ids = CausalLM(TINY, seed=3), torch.randint(0, 61, (1, 100))
    expected = copy.deepcopy(model)(ids, labels=ids).loss
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss, expected
    )


def check_decoding(model, compiled, device="cpu"):
    """Tokens fed one at a time behind a prompt; gives the pairs of logits."""
    caches = [StaticKVCache(model.config, 3, 32, model.head_weight.dtype, device) for _ in range(2)]
    prompt = batch(False, device)["input_ids"]
    for cache in caches:
        model(prompt, cache=cache)
    for column in prompt.T[:6]:
        yield tuple(m(column[:, None], cache=c).logits for m, c in zip((model, compiled), caches))
    # the host's count of stored tokens is an integer to the compiler: the second value makes it a variable
    assert num_graphs() <= 2


@torch.no_grad()
def test_decode_step(config):
    model = CausalLM(config, seed=3)
    for expected, actual in check_decoding(model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(actual, expected)


def gpu_model(config):
    """In bfloat16 on the GPU, and the same numbers in float64 on the CPU."""
    model = CausalLM(config, seed=3).to(torch.bfloat16)
    return copy.deepcopy(model).cuda(), model.double()


@pytest.mark.parametrize(("name", "packed"), [("dense", False), ("window", True), ("experts", True)])
@pytest.mark.gpu
def test_gpu_training_step(name, packed):
    model, exact = gpu_model(CONFIGS[name])
    inputs = batch(packed, "cuda")
    baseline = training_step(model, model, inputs)
    actual = training_step(torch.compile(model, fullgraph=True), model, inputs)
    assert num_graphs() == 1
    if name == "experts":  # rounding lets a few tokens choose other experts
        assert abs(actual[0] / baseline[0] - 1) < 0.05 and actual[1].isfinite().all()
        return
    for part, a, e, b in zip(("loss", "gradients"), actual, training_step(exact, exact, batch(packed)), baseline):
        assert_accurate(a, e, b, name=part)


@torch.no_grad()
@pytest.mark.gpu
def test_gpu_decode_step():
    model, exact = gpu_model(TINY)
    prompt = batch(False)["input_ids"]
    steps = list(check_decoding(model, torch.compile(model, fullgraph=True), "cuda"))
    whole = exact(torch.cat([prompt, prompt[:, :6]], 1)).logits
    for position, (baseline, actual) in enumerate(steps, start=prompt.shape[1]):
        assert_accurate(actual[:, 0], whole[:, position], baseline[:, 0], name=f"logits at {position}")
