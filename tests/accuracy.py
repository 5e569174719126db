"""How far from exact an op may be: at most twice as far as the same formula in plain torch, plus two units in the last
place.

The bound comes from the dtype and the data, so no test carries a tolerance of its own (FlashAttention's rule, for
maximum and root mean square alike).
"""

import torch


def ulp(dtype: torch.dtype, scale: float) -> float:
    """The distance between neighbouring numbers of `dtype` at magnitude `scale`."""
    return torch.finfo(dtype).eps * scale


def assert_accurate(
    actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, *, name: str = "tensor", ulps: float = 2.0
) -> None:
    """Compare with the exact value, relative to the error of a baseline.

    Args:
        actual: the op's result.
        exact: the reference evaluated in float64.
        baseline: the same reference evaluated in the op's dtype.
        name: what the message calls the tensor.
        ulps: units in the last place, at the tensor's largest magnitude, granted on top.

    Raises:
        AssertionError: with the worst coordinate, both values and both errors.
    """
    assert actual.shape == exact.shape == baseline.shape, (
        f"{name}: shapes {actual.shape}, {exact.shape}, {baseline.shape}"
    )
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, baseline {baseline.dtype}"
    if actual.numel() == 0:
        return
    a, e, b = (t.detach().to(actual.device).double() for t in (actual, exact, baseline))
    for kind, mask in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        different = (mask(a) != mask(e)).nonzero()
        assert len(different) == 0, (
            f"{name}: {kind} differs at {different[0].tolist()}: {a[tuple(different[0])]}, "
            f"exact {e[tuple(different[0])]}"
        )
    finite = torch.isfinite(e)
    if not finite.any():
        return
    error = torch.where(finite, (a - e).abs(), 0.0)
    allowed_by_baseline = torch.where(finite & torch.isfinite(b), (b - e).abs(), 0.0)
    floor = ulps * ulp(actual.dtype, e[finite].abs().max().item()) + torch.finfo(actual.dtype).tiny
    for kind, measure in (("maximum", torch.max), ("rms", lambda t: t.square().mean().sqrt())):
        got, base = measure(error).item(), measure(allowed_by_baseline).item()
        if got > 2 * base + floor:
            index = tuple(torch.unravel_index(error.argmax(), error.shape))
            where = [int(i) for i in index]
            raise AssertionError(
                f"{name}: {kind} error {got:.3e} exceeds 2 * {base:.3e} (baseline) + {floor:.3e}; "
                f"worst at {where}: {a[index].item()!r}, exact {e[index].item()!r}, baseline {b[index].item()!r}"
            )


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, *, name: str = "tensor") -> None:
    """Equal to the last bit; NaN equals NaN. The message names the first differing coordinate."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if not bool(same.all()):
        where = (~same).nonzero()[0]
        raise AssertionError(
            f"{name}: differs at {where.tolist()}: {actual[tuple(where)]}, expected {expected[tuple(where)]}"
        )
