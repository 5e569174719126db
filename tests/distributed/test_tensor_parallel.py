"""Weights split over ranks: results, gradients and training curves of one rank; parameters cut, gathered, drawn."""

import contextlib
import copy
import io
import os
import tempfile
import textwrap

import pytest
import torch
import torch.distributed as dist
from parallel_models import (
    DENSE,
    MOE,
    backward,
    config,
    gradients,
    parallel_model,
    raises,
    same_curve,
    same_step,
    text_tokens,
)
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from arfast import CausalLM
from arfast.distributed import (
    ParallelConfig,
    full_state_dict,
    gradient_norm,
    init_mesh,
    load_full_state_dict,
    parallelize,
)
from arfast.train.optimizer import WorkingCopy

TWO = dict(tensor=2)
BIASES = dict(qkv_bias=True, o_bias=True, qk_norm=True)


def _step_cases(cases):
    for parallel, base, changes in cases:
        same_step(parallel, base, **changes)


def test_one_step_on_two_ranks():
    cases = [
        (TWO, DENSE, dict(num_key_value_heads=2)),
        (TWO, DENSE, dict(BIASES, tie_word_embeddings=True)),
        (TWO, DENSE, dict(BIASES, tie_word_embeddings=True, sequence_parallel=True)),
        (TWO, MOE, dict(num_shared_experts=2)),
        (TWO, MOE, dict(num_shared_experts=1, mlp_only_layers=(0,), sequence_parallel=True)),
    ]
    run_ranks(_step_cases, 2, cases)


def _check_results():
    """Losses per token, logits of some positions: all results of the whole model, on every rank."""
    for sequence_parallel in (False, True):
        whole, split = parallel_model(TWO, DENSE, sequence_parallel=sequence_parallel, tie_word_embeddings=True)
        ids = text_tokens(4, 16)
        documents = torch.tensor([0, 3, 4, 21, 64], dtype=torch.int32)
        for options in (
            dict(labels=ids, reduction="none", label_smoothing=0.1, z_loss=0.01, cu_seqlens=documents),
            dict(labels=ids, num_items=torch.tensor(7.0)),
            dict(labels=ids, reduction="sum", position_ids=torch.arange(16).expand(4, 16) * 3),
            dict(logits_to_keep=torch.tensor([0, 9, 63, 20])),
            dict(cu_seqlens=documents),
        ):
            values = []
            for model in (whole, split):
                out = model(ids, **options)
                value = out.loss if out.logits is None else out.logits
                model.zero_grad()
                value.sin().sum().backward()
                values.append(value.detach())
            torch.testing.assert_close(values[1], values[0], rtol=1e-11, atol=1e-12)
            for name, gradient in gradients(whole).items():
                torch.testing.assert_close(gradients(split)[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def _check_parameters():
    """Initialised in parts as if cut from the whole; put together, loaded, written; refused when they do not fit."""
    for parallel, base in ((TWO, DENSE), (dict(data=2, expert=2), MOE), (TWO, MOE)):
        mesh = init_mesh(ParallelConfig(**parallel), "cpu")
        settings = config(base, qkv_bias=True)
        whole = CausalLM(settings, seed=3)
        cut = parallelize(CausalLM(settings, seed=3), mesh)
        drawn = parallelize(CausalLM(settings, device="meta"), mesh).to_empty(device="cpu")
        drawn.init_parameters(3)
        assert len(cut.splits) >= 4
        for (name, a), (_, b) in zip(cut.named_parameters(), drawn.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        full = full_state_dict(drawn)
        assert full.keys() == whole.state_dict().keys()
        assert all(torch.equal(full[name], value) for name, value in whole.state_dict().items())
        load_full_state_dict(drawn, CausalLM(settings, seed=4).state_dict())
        loaded = full_state_dict(drawn)
        assert all(torch.equal(loaded[name], v) for name, v in CausalLM(settings, seed=4).state_dict().items())
        wrong = dict(full, extra=torch.zeros(1))
        raises(
            ValueError,
            "state must hold the model's parameters, got a difference in extra",
            load_full_state_dict,
            drawn,
            wrong,
        )
        wrong = dict(full) | {"model.norm.weight": torch.zeros(3)}
        raises(
            ValueError, r"must hold shape \[32\], got \[3\] for model.norm.weight", load_full_state_dict, drawn, wrong
        )
        assert torch.equal(full_state_dict(drawn)["model.norm.weight"], loaded["model.norm.weight"])
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    cut.save_pretrained(os.path.join(folder[0], "model"))
    written = CausalLM.from_pretrained(os.path.join(folder[0], "model")).state_dict()
    assert all(torch.equal(written[name], value) for name, value in whole.state_dict().items())
    in_a_file = os.path.join(folder[0], "model", "config.json", "model")
    raises(OSError, "Not a directory" if dist.get_rank() == 0 else "first rank must be", cut.save_pretrained, in_a_file)


def _check_copies_and_norms():
    """A low-precision working copy trains beside its masters, and the norm is that of all gradients."""
    whole, split = parallel_model(TWO, MOE, torch.float32, sequence_parallel=True)
    for model in (whole, split):
        backward(model, text_tokens(4, 16))
    expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    torch.testing.assert_close(gradient_norm(split), expected)
    copies = [WorkingCopy(model, torch.bfloat16).module for model in (whole, split)]
    assert copies[1].groups is split.groups
    losses = [copy(text_tokens(4, 16), labels=text_tokens(4, 16)).loss for copy in copies]
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(text_tokens(4, 16), labels=text_tokens(4, 16)).loss for model in (whole, split)]
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    first, second = (backward(copy.deepcopy(split), text_tokens(4, 16)) for _ in range(2))
    assert first == second, "not the same bits in two runs"


def _check_refusals():
    raises(
        ValueError, r"init_mesh: world size must be .* 3 \* 1 \* 1 = 3, got 2", init_mesh, ParallelConfig(data=3), "cpu"
    )
    mesh = init_mesh(ParallelConfig(**TWO), "cpu")
    model = CausalLM(config(DENSE, num_key_value_heads=1))
    before = model.state_dict()
    raises(ValueError, "tensor must divide num_key_value_heads=1, got 2", parallelize, model, mesh)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model = parallelize(CausalLM(config(DENSE)), mesh, sequence_parallel=True)
    raises(ValueError, "must not be split or wrapped yet, got a ParallelCausalLM", parallelize, model, mesh)
    raises(ValueError, "must hold a multiple of context \\* tensor tokens .* got 15", model, text_tokens(1, 15))
    raises(ValueError, "cache must be None", model, text_tokens(1, 16), cache=1)
    raises(
        ValueError, r"num_items must be .* scalar, got shape \(2,\)", model, text_tokens(1, 16), num_items=torch.ones(2)
    )
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    raises(
        ValueError,
        "mesh must have dimensions of .*, got \\('pipeline',\\)",
        parallelize,
        CausalLM(config(DENSE)),
        other,
    )
    raises(TypeError, "model must be a CausalLM, got Linear", parallelize, torch.nn.Linear(2, 2), mesh)
    # a mesh of one dimension is as good as ours
    one_dimension = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    assert parallelize(CausalLM(config(DENSE)), one_dimension).model.layers[0].self_attn.num_heads == 2


def _two_rank_checks():
    _check_refusals()
    _check_parameters()
    _check_copies_and_norms()
    _check_results()


def test_a_model_on_two_ranks():
    run_ranks(_two_rank_checks, 2, timeout=120)


def _curve(cases):
    for parallel, base, options in cases:
        same_curve(parallel, base, **options)


def test_fifty_steps_on_two_ranks():
    run_ranks(_curve, 2, [(TWO, DENSE, dict(num_key_value_heads=2, tie_word_embeddings=True))])


COMPOSITIONS = [
    (dict(context=2, tensor=2), DENSE, dict(num_key_value_heads=2, sequence_parallel=True)),
    (dict(data=2, tensor=2, expert=2), MOE, {}),
]


def test_one_step_of_compositions():
    cases = [
        (
            parallel,
            base,
            dict(changes, cu_seqlens=torch.tensor([0, 5, 30, 32], dtype=torch.int32))
            if "context" in parallel
            else changes,
        )
        for parallel, base, changes in COMPOSITIONS
    ]
    cases[0] = (*cases[0][:2], dict(cases[0][2], ids=text_tokens(2, 16)))
    cases.append((dict(context=2, tensor=2, expert=2), MOE, dict(num_shared_experts=1, sequence_parallel=True)))
    run_ranks(_step_cases, 4, cases)


def test_fifty_steps_of_a_composition():
    run_ranks(_curve, 4, COMPOSITIONS[:1])


@pytest.mark.slow
def test_fifty_steps_of_experts_on_two_ranks():
    run_ranks(_curve, 2, [(TWO, MOE, {}), (TWO, MOE, dict(sequence_parallel=True))], timeout=200)


@pytest.mark.slow
def test_fifty_steps_on_four_ranks():
    cases = COMPOSITIONS[1:] + [(dict(tensor=4), base, dict(sequence_parallel=base is MOE)) for base in (DENSE, MOE)]
    run_ranks(_curve, 4, cases, timeout=300)


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        (dict(tensor=0), {}, "tensor must be a positive integer, got 0"),
        (dict(data=1.5), {}, "data must be a positive integer, got 1.5"),
        (dict(context=True), {}, "context must be a positive integer, got True"),
        (dict(tensor=3), {}, "tensor must divide num_attention_heads=4, got 3"),
        (dict(tensor=4), dict(num_key_value_heads=2), "tensor must divide num_key_value_heads=2, got 4"),
        (dict(tensor=2), dict(vocab_size=255), "tensor must divide vocab_size=255, got 2"),
        (dict(tensor=2), dict(intermediate_size=49), "tensor must divide intermediate_size=49, got 2"),
    ],
)
def test_errors(sizes, changes, message):
    with pytest.raises(ValueError, match=f"ParallelConfig: {message}"):
        ParallelConfig(**sizes).check_model(config(DENSE, **changes))


def _run_example():
    """The example of parallelize's docstring, as torchrun would run it."""
    lines = parallelize.__doc__.split("Example:\n")[1].rstrip()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(textwrap.dedent(lines), {"__name__": "__main__"})
    return printed.getvalue()


def test_the_example_of_the_docstring():
    first, *others = run_ranks(_run_example, 4, init=False, timeout=120)
    losses = [float(line.split()[1]) for line in first.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0] and others == [""] * 3


def _compiled(parallel, base):
    """One graph without breaks, collectives included, whose loss and gradients are those of the model as it is."""
    _, split = parallel_model(parallel, base, torch.float32)
    ids = text_tokens(2, 32)
    results = []
    for model in (split, torch.compile(split, backend="aot_eager", fullgraph=True)):
        split.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in split.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel, base",
    [(TWO, DENSE), (dict(context=2), DENSE), (dict(data=2, expert=2), MOE)],
    ids=["tensor", "context", "expert"],
)
def test_a_split_model_compiles(parallel, base):
    run_ranks(_compiled, 2, parallel, base, timeout=200)
