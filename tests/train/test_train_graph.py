"""Training steps as CUDA graphs, recorded on the CPU and real on a GPU, against steps without; and that forward pass,
backward pass and the gradients' norm never wait for a GPU."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from host_waits import HostWait, no_host_waits, pretended_gpu
from recorded_graphs import recorded_graphs
from tiny_models import TINY, TINY_EXPERTS

from arfast.models import CausalLM
from arfast.nn import RotaryEmbedding
from arfast.train import NonFiniteError, TrainConfig
from arfast.train.engine import Engine
from arfast.train.graph import with_empty_documents
from arfast.train.optimizer import gradient_norm

CONFIGS = {"dense": TINY, "experts": TINY_EXPERTS.replace(router_aux_loss_coef=0.5)}


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request):
    """Where graphs are captured: for real on a GPU, else by a recorder, of tensors that say they are on a GPU."""
    if request.param == "cuda":
        yield "cuda"
        return
    streams = {"Stream": mock.MagicMock, "current_stream": mock.MagicMock, "graph_pool_handle": mock.MagicMock}
    streams["stream"] = lambda stream: contextlib.nullcontext()
    with mock.patch.multiple("torch.cuda", **streams), recorded_graphs(), pretended_gpu():
        yield "cpu"


def make(target, name="dense", dtype="bfloat16", **options):
    settings = dict(max_steps=20, batch_size=8, seqlen=16, learning_rate=1e-2, warmup_tokens=0, label_smoothing=0.1)
    model = CausalLM(CONFIGS[name], seed=3, device=target)
    return Engine(model, TrainConfig(**settings | dict(dtype=dtype) | options))


def batch(step, rows, packed=False):
    """`rows` of 16 tokens, which differ in their numbers of targets; packed: in documents, whose number changes."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(61, (rows, 16), generator=generator)
    labels = ids.clone()
    labels[0, : 3 + step] = -100
    cu_seqlens, targets = None, labels[:, 1:]
    if packed:
        ends = torch.randperm(rows * 16 - 1, generator=generator)[: 2 + 3 * step].add(1).sort().values
        cu_seqlens = torch.cat([torch.tensor([0]), ends, torch.tensor([rows * 16])]).int()
        targets = labels.flatten()[[i for i in range(rows * 16) if i not in cu_seqlens.tolist()]]
    return SimpleNamespace(input_ids=ids, labels=labels, cu_seqlens=cu_seqlens, num_tokens=int((targets != -100).sum()))


def weights(engine):
    return torch.cat([parameter.detach().flatten() for parameter in engine.parameters]).double()


def without_graphs(engine):
    """The same arithmetic, call by call."""

    def backward(batches):
        return [
            engine._backward(**{n: None if t is None else t.to(engine.device) for n, t in arguments.items()})
            for arguments in batches
        ]

    engine._graphed_backward = backward
    return engine


def assert_same(graphed, plain, start, target):
    """To the last bit where the products are surely the same ones; a GPU's library may choose others in a graph."""
    if target == "cpu":
        assert torch.equal(weights(graphed), weights(plain))
    else:
        assert (weights(graphed) - weights(plain)).norm() <= 0.05 * (weights(plain) - start).norm()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("sizes", [[8], [3, 3, 2]], ids=["whole", "in parts"])
def test_replays_equal_calls(sizes, packed, name, target):
    graphed, plain = make(target, name, cuda_graph=True), without_graphs(make(target, name))
    start = weights(plain)
    for step in range(4):
        batches = [batch(3 * step + i, rows, packed) for i, rows in enumerate(sizes)]
        actual, expected = graphed.step(batches), plain.step(batches)
        assert (actual.aux_loss is None) == (name == "dense")
        if target == "cpu":
            assert actual == expected
    assert_same(graphed, plain, start, target)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_one_without_graphs(name, target):
    """But for rounding: the sums are divided by the number of targets at another place."""
    dtype = "bfloat16" if target == "cuda" else "float32"
    results = [
        make(target, name, dtype, cuda_graph=on).step([batch(0, 5), batch(1, 3, packed=True)]) for on in (True, False)
    ]
    tolerance = 2e-2 if target == "cuda" else 1e-5
    for field in ("loss", "grad_norm", "aux_loss"):
        actual, expected = (getattr(result, field) for result in results)
        assert actual == (expected if expected is None else pytest.approx(expected, rel=tolerance)), field


def test_few_graphs_serve_all_numbers_of_documents(target):
    engine = make(target, cuda_graph=True)
    for step in (1, 2, 3, 4, 1, 2):  # 6, 9, 12, 15 documents
        engine.step([batch(step, 8, packed=True)])
    assert len(engine._graphed_backward._graphs) == 2


def test_gradients_are_zero_first_and_stay_in_place(target):
    engine, once = (
        make(target, cuda_graph=True, learning_rate=1e-30),
        make(target, cuda_graph=True, learning_rate=1e-30),
    )
    engine.step([batch(0, 8)])
    places = [parameter.grad.data_ptr() for parameter in engine.parameters]
    engine.optimizer.zero_grad(set_to_none=True)
    engine.step([batch(1, 8)])
    once.step([batch(1, 8)])
    assert [parameter.grad.data_ptr() for parameter in engine.parameters] == places
    for a, b in zip(engine.parameters, once.parameters):
        assert torch.equal(a.grad, b.grad)


def test_a_step_that_is_not_finite_changes_nothing(target):
    engine = make(target, cuda_graph=True)
    engine.step([batch(0, 8)])
    before, good = weights(engine), engine.compute_model.model.norm.weight.detach().clone()
    engine.compute_model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        engine.step([batch(1, 8)])
    assert torch.equal(weights(engine), before)
    engine.compute_model.model.norm.weight.data.copy_(good)
    assert engine.step([batch(1, 8)]).applied


def test_unused_parameters_stay_without_gradient(target):
    engine = make(target)
    engine.model.unused = torch.nn.Parameter(torch.ones(3, 3, device=target))
    engine = Engine(engine.model, make(target, cuda_graph=True).config)
    for step in range(2):
        engine.step([batch(step, 8)])
    assert engine.model.unused.grad is None and (engine.model.unused == 1).all()


def test_tables_that_grow_do_not_pull_the_memory_away(target):
    """Sampling beyond the tabulated positions gives the model other tables; the graph still reads its own."""
    graphed, plain = make(target, cuda_graph=True), without_graphs(make(target))
    start = weights(plain)
    for step in range(3):
        graphed.step([batch(step, 8)])
        plain.step([batch(step, 8)])
        for module in graphed.compute_model.modules():
            if isinstance(module, RotaryEmbedding):
                module._build(128 << step, module.cos.device)
                torch.full((4096, 4), float("nan"), device=target)
    assert_same(graphed, plain, start, target)


def test_graphs_of_another_rotary_base_are_not_replayed(target):
    """The shapes are the same, the tables are not."""
    dtype = "bfloat16" if target == "cuda" else "float32"
    ramp = {"seqlen_ramp": [[0, 8], [128, 16, 7.0]]}
    graphed, plain, constant = (
        make(target, "dense", dtype, cuda_graph=on, **options)
        for on, options in ((True, ramp), (False, ramp), (True, {}))
    )
    for _ in range(3):
        results = [engine.step([batch(1, 8, packed=True)]).loss for engine in (graphed, plain, constant)]
    tolerance = 2e-2 if target == "cuda" else 1e-4
    assert results[0] == pytest.approx(results[1], rel=tolerance)
    assert results[2] != pytest.approx(results[1], rel=tolerance)


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="Trainer: cuda_graph must be False for a model on cpu, got True"):
        make("cpu", cuda_graph=True)


@pytest.mark.parametrize("documents", range(1, 10))
def test_with_empty_documents(documents):
    padded = with_empty_documents(torch.arange(documents + 1, dtype=torch.int32) * 5)
    count = {1: 1, 2: 2, 3: 4, 4: 4}.get(documents, 8 if documents <= 8 else 16)
    assert padded.tolist() == [5 * i for i in range(documents + 1)] + [5 * documents] * (count - documents)
    assert padded.dtype == torch.int32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_for_the_gpu(name, packed, dtype):
    engine, given = make("cpu", name, dtype), batch(1, 8, packed)
    inputs = dict(input_ids=given.input_ids, labels=given.labels, cu_seqlens=given.cu_seqlens)
    numbers = dict(num_items=torch.tensor(90.0), share=torch.tensor(1.0))
    with no_host_waits():
        losses = engine._backward(**inputs, **numbers)
        norm = gradient_norm(engine.parameters)
        with pytest.raises(HostWait):
            norm.item()
    assert all(loss.isfinite().all() for loss in (*losses, norm))
