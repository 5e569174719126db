"""Random calls of an op, right and wrong, and the comparison with its reference; test_fuzz.py has the table of ops."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accuracy import assert_bitwise_equal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from arfast.ops import Routing, moe_route

SIZES = (0, 1, 2, 3, 4, 7, 8, 17, 33, 65)
FLOORS = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004, torch.float64: 1e-9}
FLOATS = list(FLOORS)
OTHERS = [torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8]
LIMITS = settings(
    max_examples=int(os.environ.get("ARFAST_FUZZ_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Tensor:
    """An argument with its shape by the names of its sizes, such as "B*K V".

    The dtype is the call's own, or by `kind` float32, bool, "below V" (int64 in [0, V)), "partition N" (int32, one more
    entry than the shape says, from 0 to N without decreasing), "up to N", "T up to N" and "index N" (int32, in [0, N],
    [T, N] or [0, N)), "grid" (the call's own dtype, multiples of 1/4).
    """

    shape: str
    kind: str = "float"
    optional: bool = False

    def make(self, sizes: dict[str, int], dtype: torch.dtype, scale: float) -> torch.Tensor:
        kind, _, bound = self.kind.rpartition(" ") if " " in self.kind else (self.kind, "", "")
        names = (size.split("*") for size in self.shape.split())
        shape = [math.prod(int(n) if n.isdigit() else sizes[n] for n in product) for product in names]
        if kind == "bool":
            return torch.rand(shape) < 0.3
        if kind == "below":
            return torch.randint(sizes[bound], shape)
        if kind == "index":
            return torch.randint(max(1, sizes[bound]), shape, dtype=torch.int32)
        if kind.endswith("up to"):
            return torch.randint(sizes.get(kind[0], 0), sizes[bound] + 1, shape, dtype=torch.int32)
        if kind == "partition":
            inner = torch.randint(sizes[bound] + 1, (shape[0] - 1,)).sort().values
            return torch.cat([torch.tensor([0]), inner, torch.tensor([sizes[bound]])]).int()
        if kind == "grid":
            return (torch.randint(-16, 17, shape) / 4).to(dtype)
        return (torch.randn(shape) * scale).to(torch.float32 if kind == "float32" else dtype)


@dataclass(frozen=True)
class Option:
    """An argument that is no tensor: values that an op must take, and values that it must refuse."""

    valid: tuple
    invalid: tuple = ()


@dataclass(frozen=True)
class RoutingOf:
    """A Routing of T tokens over E experts, two for each."""

    shape: str = "T E"

    def make(self, sizes: dict[str, int], dtype: torch.dtype, scale: float) -> Routing:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return moe_route(torch.randn(sizes["T"], sizes["E"], dtype=wide), 2)


@dataclass(frozen=True)
class Op:
    """A row of the table.

    Args:
        function, reference: called with `arguments` by name.
        gradients: the arguments whose gradients are compared too.
        sizes: choices for a size, where they are not SIZES.
        compare: compare(outputs, arguments), where the reference's order of candidates hangs on rounding.
        errors: names in the op's errors, where they are not just the row's.
    """

    function: Callable
    reference: Callable
    arguments: dict[str, Tensor | Option | RoutingOf]
    gradients: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    compare: Callable | None = None
    errors: tuple[str, ...] = ()


@st.composite
def calls(draw, op: Op, spoiled: bool):
    """The arguments of a call, one or two of them changed to something else if `spoiled`."""
    letters = sorted(set(re.findall("[A-Z]", " ".join(getattr(a, "shape", "") for a in op.arguments.values()))))
    sizes = {letter: draw(st.sampled_from(op.sizes.get(letter, SIZES))) for letter in letters}
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, scale = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([1.0, 0.1, 3.0]))
    arguments = {}
    for name, argument in op.arguments.items():
        if isinstance(argument, Option):
            arguments[name] = draw(st.sampled_from(argument.valid))
        elif isinstance(argument, Tensor) and argument.optional and draw(st.booleans()):
            arguments[name] = None
        else:
            made = argument.make(sizes, dtype, scale)
            arguments[name] = draw(layouts(made)) if isinstance(made, torch.Tensor) else made
    if spoiled:
        tensors = [name for name, value in arguments.items() if isinstance(value, (torch.Tensor, tuple))]
        options = [name for name, argument in op.arguments.items() if getattr(argument, "invalid", ())]
        for name in draw(st.lists(st.sampled_from(tensors + options), min_size=1, max_size=2, unique=True)):
            arguments[name] = draw(wrong_values(op.arguments[name], arguments[name]))
    return arguments


@st.composite
def layouts(draw, tensor: torch.Tensor):
    """The tensor in other strides: transposed storage, gaps, a misaligned start, one row repeated."""
    kind = draw(st.sampled_from(["dense", "dense", "transposed", "gaps", "offset", "repeated"]))
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "gaps" and tensor.dim() >= 1:
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if kind == "repeated" and tensor.dim() >= 2 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def wrong_values(draw, argument: Tensor | Option | RoutingOf, value):
    """An option that must be refused, or a tensor (of a routing) with one property changed."""
    if isinstance(argument, Option):
        return draw(st.sampled_from(argument.invalid))
    if isinstance(argument, RoutingOf):
        name = draw(st.sampled_from(value._fields))
        return value._replace(**{name: draw(wrong_tensors(getattr(value, name)))})
    return draw(wrong_tensors(value))


@st.composite
def wrong_tensors(draw, tensor: torch.Tensor):
    kind = draw(st.sampled_from(["dtype", "size", "rank", "device", "values"]))
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from([dtype for dtype in FLOATS + OTHERS if dtype != tensor.dtype])))
    if kind == "size" and tensor.dim() > 0:
        shape = list(tensor.shape)
        dim = draw(st.integers(0, tensor.dim() - 1))
        shape[dim] = max(0, shape[dim] + draw(st.sampled_from([-1, 1, 5])))
        return torch.ones(shape, dtype=tensor.dtype)
    if kind == "rank":
        return draw(st.sampled_from([tensor.flatten(), tensor[None], tensor[..., None], tensor.new_ones(())]))
    if kind == "device":
        return tensor.to("meta")
    if kind == "values" and not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel():
        tensor = tensor.clone()
        at = draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[at] = draw(st.sampled_from([-1, -101, 66, 2**31 - 1, -(2**31)]))
    return tensor


def fuzz(check: Callable[[dict], None], op: Op, *, spoiled: bool) -> None:
    """Runs check(arguments) on many calls, the same ones every time."""
    LIMITS(given(calls(op, spoiled))(check))()


def leaves(value) -> list[torch.Tensor]:
    """The tensors in a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (tuple, list)) else []


def run(op: Op, function: Callable, arguments: dict, *, wide: bool = False) -> list[torch.Tensor]:
    """Outputs and gradients of `function` on leaf copies of the arguments (same strides), in float64 if `wide`."""

    def leaf(name, value):
        if isinstance(value, Routing):
            return Routing(*(leaf("", tensor) for tensor in value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return (value.double() if wide else value.detach()).requires_grad_(name in op.gradients)

    arguments = {name: leaf(name, value) for name, value in arguments.items()}
    outputs = leaves(function(**arguments))
    given = [arguments[name] for name in op.gradients if arguments[name] is not None and arguments[name].requires_grad]
    roots = [out for out in outputs if out.requires_grad]
    if not roots or not given:
        return [out.detach() for out in outputs]
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, generator=generator).to(out) for out in roots]
    gradients = torch.autograd.grad(roots, given, douts, allow_unused=True, materialize_grads=True)
    return [out.detach() for out in outputs] + list(gradients)


def assert_same(op: Op, outputs: list[torch.Tensor], arguments: dict) -> None:
    """Equal to the reference: integers exactly, floats within a bound that no wrong index stays under.

    It is wider than that of the op's own test, because sizes this small make the reference exact by luck, and because
    numbers of order one may cancel.
    """
    arguments = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if op.compare:
        op.compare(outputs, arguments)
        return
    dtypes = [t.dtype for t in leaves(list(arguments.values())) if t.is_floating_point()]
    floor = max(FLOORS[dtype] for dtype in dtypes)
    exact, baseline = run(op, op.reference, arguments, wide=True), run(op, op.reference, arguments)
    for out, e, b in zip(outputs, exact, baseline, strict=True):
        if not out.is_floating_point():
            assert_bitwise_equal(out, b.to(out.dtype))
            continue
        errors = (b.double() - e.double()).abs().nan_to_num(0, posinf=0)
        bound = 2 * errors.amax() if errors.numel() else 0
        largest = e[e.isfinite()].abs().amax() if e.isfinite().any() else 0
        torch.testing.assert_close(
            out.double(), e.double(), rtol=0, atol=float(bound + floor * max(1, largest)), equal_nan=True
        )
