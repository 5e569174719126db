"""Tiny models on real text, the whole one and its parts on several ranks, for the tests of parallelism."""

import inspect
import textwrap

import torch
import torch.distributed as dist

from arfast import CausalLM, CausalLMConfig
from arfast.distributed import ParallelConfig, init_mesh, parallelize, reduce_gradients

VOCAB = 256
DENSE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    rope_theta=10_000.0,
)
MOE = dict(
    DENSE, moe_intermediate_size=24, num_experts=8, router_aux_loss_coef=0.02, router_z_loss_coef=0.01, qk_norm=True
)


def config(base, **changes):
    return CausalLMConfig(**{**base, **changes})


def text_tokens(batch_size, seqlen, step=0):
    """Bytes of a module of the standard library as token ids, int64 [batch_size, seqlen], other ones in every step."""
    text = inspect.getsource(textwrap).encode()
    start = step * batch_size * seqlen % (len(text) - batch_size * seqlen)
    return torch.tensor(list(text[start : start + batch_size * seqlen])).view(batch_size, seqlen)


def parallel_model(parallel, base, dtype=torch.float64, sequence_parallel=False, **changes):
    """(whole model, parallelized model of the same seed)."""
    whole, split = (CausalLM(config(base, **changes), seed=3, dtype=dtype) for _ in range(2))
    for model in (whole, split):
        _fill_vectors(model)
    mesh = init_mesh(ParallelConfig(**parallel), "cpu")
    return whole, parallelize(split, mesh, sequence_parallel=sequence_parallel)


@torch.no_grad()
def _fill_vectors(model):
    """Biases start at 0 and norms at 1, which would hide one that is applied twice, or in the wrong place."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def own_rows(model, ids):
    """This data rank's rows of a global batch [B, T]."""
    return ids.chunk(model.groups.data.size)[model.groups.data.rank]


def backward(model, ids, cu_seqlens=None, **options):
    """Loss (with the auxiliary losses) of a global batch on every rank, its gradients summed; float."""
    labels, num_items, share = ids.clone(), None, 1.0
    labels[:, 5:7] = -100
    if hasattr(model, "groups"):
        data = model.groups.data
        num_items = float(model_targets(labels, cu_seqlens))
        ids, labels = own_rows(model, ids), own_rows(model, labels)
        share = model_targets(labels, cu_seqlens) / num_items
    out = model(ids, labels, cu_seqlens, num_items=num_items, **options)
    if out.tokens_per_expert is not None:
        assert out.tokens_per_expert.sum(1).tolist() == [ids.numel() * model.config.num_experts_per_tok] * len(
            out.tokens_per_expert
        )
    loss = out.loss + (0 if out.aux_loss is None else out.aux_loss * share)
    loss.backward()
    if hasattr(model, "groups"):
        reduce_gradients(model)
        return data.sum_(loss.detach().clone()).item()
    return loss.item()


def model_targets(labels, cu_seqlens=None):
    from arfast.models.causal_lm import shift_labels

    return int((shift_labels(labels, cu_seqlens) != -100).sum())


def gradients(model):
    """The whole gradient of every parameter, by name."""
    if not hasattr(model, "splits"):
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        for split in reversed(model.splits.get(name, ())):
            gradient = split.gather(gradient)
        whole[name] = gradient
    return whole


def assert_same_gradients(whole, split, tolerance=1e-9):
    """Everything that the two models' gradients hold, relative to each parameter's largest."""
    expected, got = gradients(whole), gradients(split)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        error = (got[name] - gradient).abs().max().item()
        assert error <= tolerance * scale + 1e-300, f"{name}: gradient off by {error:.2e} of {scale:.2e}"


def same_step(parallel, base, ids=None, cu_seqlens=None, sequence_parallel=False, options=(), **changes):
    """One loss and all gradients of a parallelized model are those of the whole one, in float64."""
    whole, split = parallel_model(parallel, base, sequence_parallel=sequence_parallel, **changes)
    ids = text_tokens(4, 16) if ids is None else ids
    options = dict(options) or dict(label_smoothing=0.1, z_loss=1e-3)
    expected, got = (backward(model, ids, cu_seqlens, **options) for model in (whole, split))
    assert abs(got - expected) <= 1e-12 * abs(expected), (parallel, got, expected)
    assert_same_gradients(whole, split)
    return whole, split


def curve(model, num_steps=50, cu_seqlens=None):
    """Losses of the first steps of AdamW on batches of [4, 32] bytes of text, float32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        losses.append(backward(model, text_tokens(4, 32, step), cu_seqlens))
        optimizer.step()
    return losses


def same_curve(parallel, base, cu_seqlens=None, sequence_parallel=False, **changes):
    """The losses of a parallelized run are the same on all ranks, and within 1e-5 those of a run on one rank."""
    whole, split = parallel_model(parallel, base, torch.float32, sequence_parallel, **changes)
    got = curve(split, cu_seqlens=cu_seqlens)
    dist.broadcast_object_list(everywhere := [got])
    assert got == everywhere[0], "the ranks have different losses"
    if dist.get_rank() > 0:
        return
    expected = curve(whole, cu_seqlens=cu_seqlens)
    assert expected[-1] < 0.9 * expected[0], "the model must learn, or the test shows little"
    worst = max(abs(a - b) / a for a, b in zip(expected, got, strict=True))
    assert worst <= 1e-5, f"{parallel}: losses differ by {worst:.2e}"


def raises(kind, pattern, function, *args, **kwargs):
    """The message of an error that every rank must raise."""
    import re

    try:
        function(*args, **kwargs)
    except kind as error:
        assert re.search(pattern, str(error)), f"{error} does not match {pattern}"
        return
    raise AssertionError(f"no {kind.__name__} for {pattern} on rank {dist.get_rank()}")
