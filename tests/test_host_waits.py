"""host_waits finds the calls that wait for a GPU, and no others."""

import pytest
import torch
from host_waits import HostWait, no_host_waits

X = torch.arange(6.0)
INDEX = torch.tensor([1, 2, 0, 1, 2, 0])
MASK = X > 2

WAITS = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool((X > 7).any()),
    "int": lambda: int(X.max()),
    "float": lambda: float(X.sum()),
    "index": lambda: list(range(INDEX[0])),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "to device": lambda: X.to(torch.device("cpu"), non_blocking=True),
    "to device by name": lambda: X.to(device="cpu"),
    "tensor": lambda: torch.tensor([1.0, 2.0], device=X.device),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "mask of a row": lambda: X.view(2, 3)[0, MASK[:3]],
    "mask assigned": lambda: X.clone().__setitem__(MASK, X[:3]),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: INDEX.unique(),
    "unique_consecutive": lambda: INDEX.unique_consecutive(),
    "bincount": lambda: INDEX.bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(INDEX),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
}
RUNS_ON = {
    "arithmetic": lambda: (X * 2 + 1).softmax(0),
    "new tensors": lambda: torch.arange(3, device=X.device) + torch.zeros(3, dtype=torch.int64, device=X.device),
    "like": lambda: X.new_zeros(3) + torch.ones_like(X)[:3],
    "dtype": lambda: X.to(torch.bfloat16).float(),
    "where": lambda: torch.where(MASK, X, 0.0),
    "masked_fill": lambda: X.masked_fill(MASK, 0.0),
    "index": lambda: X[INDEX] + X[None, 1:3, None].sum(),
    "index assigned": lambda: X.clone().__setitem__(INDEX, X),
    "repeat_interleave": lambda: X.repeat_interleave(INDEX, output_size=6),
    "repeated": lambda: X.repeat_interleave(2),
    "argmax": lambda: X.argmax(-1),
    "shape": lambda: torch.empty(X.shape[0], X.numel()),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits(name):
    WAITS[name]()
    with pytest.raises(HostWait), no_host_waits():
        WAITS[name]()


@pytest.mark.parametrize("name", RUNS_ON)
def test_runs_on(name):
    with no_host_waits():
        out = RUNS_ON[name]()
    expected = RUNS_ON[name]()
    assert expected is None or out.shape == expected.shape


def test_the_tensors_say_that_they_are_on_a_gpu():
    with no_host_waits():
        assert (X.device.type, X.is_cuda, X.is_cpu) == ("cuda", True, False)
        made = torch.zeros(2, device=X.device)
    assert made.device.type == X.device.type == "cpu"


def test_backward_pass():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, reads):
            ctx.reads = reads
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            assert dout.is_cuda
            return dout * (dout.sum().item() if ctx.reads else 2), None

    leaf = X.clone().requires_grad_()
    with no_host_waits():
        Doubled.apply(leaf, False).sum().backward()
        with pytest.raises(HostWait):
            torch.autograd.grad(Doubled.apply(leaf, True).sum(), leaf)
    assert torch.equal(leaf.grad, torch.full_like(X, 2))
