"""Counter-based initialisation: known values, independence of the sharding, distribution."""

import hashlib
import math

import pytest
import torch
from threads import num_threads

from arfast.models import CausalLM, CausalLMConfig
from arfast.models.causal_lm import init_parameter
from arfast.nn import normal_

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def element(seed: int, name: str, index: int) -> float:
    """One element by the definition, in plain Python integers."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    first, second = (splitmix64((key + (2 * (index // 2) + k) * 0x9E3779B97F4A7C15) & MASK) >> 11 for k in (1, 2))
    radius, angle = math.sqrt(-2 * math.log((first + 1) * 2.0**-53)), 2 * math.pi * second * 2.0**-53
    return radius * (math.sin(angle) if index % 2 else math.cos(angle))


def test_generator_is_splitmix64():
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first output for seed 0


def test_definition():
    actual = normal_(torch.empty(2000, dtype=torch.float64), seed=7, name="a.b", std=1.0)
    expected = torch.tensor([element(7, "a.b", i) for i in range(2000)], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_slices_equal_the_whole(ranks, dtype, monkeypatch):
    """Also with other threads and another chunk size."""
    size = 300_007
    with num_threads(3):
        whole = normal_(torch.empty(size, dtype=dtype), seed=1, name="w", std=0.02)
    monkeypatch.setattr("arfast.nn.initialization._CHUNK", 4093)
    share = -(-size // ranks)
    starts = range(0, size, share)
    parts = [torch.empty(min(share, size - start), dtype=dtype) for start in starts]
    for start, part in zip(starts, parts):
        normal_(part, seed=1, name="w", std=0.02, start=start)
    assert torch.equal(torch.cat(parts), whole)


def test_model_parameters_by_slices():
    """Every parameter of a model, cut in three along its flat index."""
    config = CausalLMConfig.preset("tiny-moe", num_hidden_layers=2, vocab_size=101, qkv_bias=True)
    for name, parameter in CausalLM(config, seed=4).named_parameters():
        flat = parameter.detach().view(-1)
        cuts = [0, flat.numel() // 3, flat.numel() // 2 + 1, flat.numel()]
        for start, stop in zip(cuts, cuts[1:]):
            part = torch.full((stop - start,), float("nan"))
            init_parameter(config, name, part, seed=4, start=start)
            assert torch.equal(part, flat[start:stop]), name


def test_far_offsets():
    """Flat indices past 2**32 and 2**40: the counters are 64 bits wide."""
    for start in (2**32 - 3, 2**40 + 1):
        part = normal_(torch.empty(7, dtype=torch.float64), seed=2, name="w", std=1.0, start=start)
        expected = [element(2, "w", start + i) for i in range(7)]
        torch.testing.assert_close(part, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_distribution():
    stats = pytest.importorskip("scipy.stats")
    x = normal_(torch.empty(1_000_000, dtype=torch.float64), seed=0, name="w", std=2.0)
    assert abs(x.mean()) < 4 * 2.0 / 1000
    assert abs(x.std() / 2.0 - 1) < 4 / math.sqrt(2e6)
    assert stats.kstest(x.numpy() / 2.0, "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack((x[::2], x[1::2])))[0, 1]) < 4 / math.sqrt(5e5)
    other = normal_(torch.empty_like(x), seed=0, name="v", std=2.0)
    assert abs(torch.corrcoef(torch.stack((x, other)))[0, 1]) < 4 / 1000


def test_strided_tensor_is_refused():
    with pytest.raises(ValueError, match=r"normal_: tensor must be contiguous, got strides \(1, 4\)"):
        normal_(torch.empty(3, 4).t(), seed=0, name="w", std=1.0)
