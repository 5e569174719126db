"""ImageTokenizer: codebook, gradients and codes against float64 by hand, its files, its errors."""

import dataclasses
import doctest
import json
import math

import pytest
import torch
import torch.nn.functional as F

from arfast.models import ImageTokenizer, ImageTokenizerConfig, image_tokenizer

CONFIG = ImageTokenizerConfig(
    image_size=6, channels=2, patch_size=2, num_codes=7, code_dim=3, hidden_size=8, num_blocks=1, decay=0.9
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def make(**changes):
    """A tokenizer in float64 whose residual blocks do something, and whose codes are where its vectors are."""
    model = ImageTokenizer(dataclasses.replace(CONFIG, **changes)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.codebook.copy_(vectors(model, images(seed=9))[: 5 * 7 : 5])
        model.average_sums.copy_(model.codebook)
    return model


def images(count=5, seed=1):
    return torch.rand(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors(model, x):
    """The encoder's vectors in the order of the codes, [B * 9, D]."""
    return model.encoder(2 * x - 1).permute(0, 2, 3, 1).reshape(-1, 3)


def test_examples():
    found = doctest.testmod(image_tokenizer)
    assert found.attempted > 0 and found.failed == 0


def test_codes_are_the_nearest():
    model, x = make(), images(40)
    distances = [[math.dist(z, code) for code in model.codebook.tolist()] for z in vectors(model, x).tolist()]
    codes = model.encode(x)
    assert codes.shape == (40, 3, 3) and codes.dtype == torch.int64 and len(codes.unique()) > 2
    assert codes.flatten().tolist() == [row.index(min(row)) for row in distances]
    # one place of the grid for each patch, in the order of reading: another patch changes the codes around it alone
    alone = make(num_blocks=0)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] = 1 - changed[:, :, 2:4, 4:6]
    places = (alone.encode(changed) != alone.encode(x)).any(0)
    assert places.nonzero().tolist() == [[1, 2]]


def test_codebook_follows_as_in_appendix_a1():
    model, x = make(revive_below=0.0), images()
    z, codes = vectors(model, x).tolist(), model.encode(x).flatten().tolist()
    counts, sums = model.average_counts.tolist(), model.average_sums.tolist()
    model(x)
    for k in range(7):
        mine = [vector for vector, code in zip(z, codes, strict=True) if code == k]
        count = 0.9 * counts[k] + 0.1 * len(mine)
        total = [0.9 * old + 0.1 * math.fsum(v[i] for v in mine) for i, old in enumerate(sums[k])]
        assert model.average_counts[k].item() == pytest.approx(count, rel=1e-12)
        assert model.average_sums[k].tolist() == pytest.approx(total, rel=1e-12, abs=1e-14)
        assert model.codebook[k].tolist() == pytest.approx([value / count for value in total], rel=1e-12, abs=1e-14)


def test_codebook_rests_in_evaluation():
    model, x = make().eval(), images()
    before = model.codebook.clone()
    model(x)
    model.train().encode(x)
    assert torch.equal(model.codebook, before)


def test_dead_codes_start_again_in_the_batch():
    model, x = make(revive_below=0.95), images(30)
    model.codebook[2:] = 1e3 + torch.arange(5.0)[:, None].double()
    z, used = vectors(model, x), model.encode(x).unique().tolist()
    assert set(used) <= {0, 1}
    model(x)
    for code in range(2, 7):  # unused: its average fell from 1 to 0.9
        assert (z == model.codebook[code]).all(1).any()
        assert model.average_counts[code] == 1 and torch.equal(model.average_sums[code], model.codebook[code])
    assert len(model.codebook[2:].unique(dim=0)) == 5
    assert model.average_counts[used].min() > 1
    assert len(model.encode(x).unique()) > 4
    model = make(revive_below=0.85)
    model.codebook[2:] = 1e3
    model(x)
    assert (model.average_counts[2:] == 0.9).all()  # not yet


def test_gradient_goes_straight_through():
    """dL/dz: of the pixels' error the decoder's gradient at the code's vector, of the commitment 2 beta (z - e) / n."""
    model, x = make(commitment=0.5).eval(), images()
    z = model.encoder(2 * x - 1).detach()
    codes = model.encode(x)
    quantized = model.codebook[codes].movedim(-1, 1).clone().requires_grad_()
    F.mse_loss((model.decoder(quantized) + 1) / 2, x).backward()
    expected = quantized.grad + 0.5 * 2 * (z - quantized.detach()) / z.numel()
    decoder = [parameter.grad.clone() for parameter in model.decoder.parameters()]
    model.zero_grad()
    seen = []
    hook = model.encoder.register_forward_hook(lambda module, inputs, out: out.register_hook(seen.append) and None)
    model(x).loss.backward()
    hook.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close([p.grad for p in model.decoder.parameters()], decoder, rtol=1e-12, atol=1e-15)
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.encoder.parameters())
    assert not model.codebook.requires_grad


def test_output():
    model, x = make(commitment=0.5).eval(), images()
    out = model(x)
    codes, z = model.encode(x), vectors(model, x)
    pixels = (model.decoder(model.codebook[codes].movedim(-1, 1)) + 1) / 2
    away = (z - model.codebook[codes.flatten()]).square().mean()
    assert out.loss.item() == pytest.approx(((pixels - x) ** 2).mean().item() + 0.5 * away.item(), rel=1e-12)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.reconstruction, model.decode(codes), rtol=1e-12, atol=1e-12)
    assert out.reconstruction.min() >= 0 and out.reconstruction.max() <= 1 and not out.reconstruction.requires_grad
    shares = [count / codes.numel() for count in codes.flatten().bincount().tolist() if count]
    assert out.perplexity.item() == pytest.approx(math.exp(-math.fsum(p * math.log(p) for p in shares)), rel=1e-6)


def test_learns_patches_that_are_few():
    """Images made of 4 patches, 4 codes: every pixel comes back, and so does every code of a decoded image."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(4, 2, 2, 2, generator=generator)
    kinds = torch.randint(4, (64, 3, 3), generator=generator)
    x = patches[kinds].permute(0, 3, 1, 4, 2, 5).reshape(64, 2, 6, 6)
    model = ImageTokenizer(dataclasses.replace(CONFIG, num_codes=4, num_blocks=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    codes = model.eval().encode(x)
    assert (model.decode(codes) - x).abs().max() < 0.1
    assert torch.equal(model.encode(model.decode(codes)), codes)
    assert len(set(zip(kinds.flatten().tolist(), codes.flatten().tolist(), strict=True))) == 4
    assert model(x).perplexity > 3.9


def test_a_function_of_the_seed():
    first, same, other = (ImageTokenizer(CONFIG, seed=seed) for seed in (5, 5, 6))
    for model in (first, same):
        model(images(30).float())
    assert all(map(torch.equal, first.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(first.encoder[1].weight, other.encoder[1].weight)
    assert not torch.equal(first.codebook, other.codebook)


def test_saved_and_read_back(tmp_path):
    model, x = ImageTokenizer(CONFIG), images().float()
    model(x)
    model.save_pretrained(tmp_path / "saved")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.config == CONFIG
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    torch.testing.assert_close(loaded(x).loss, model(x).loss, rtol=0, atol=0)
    assert torch.equal(loaded.codebook, model.codebook)  # the averages were kept too


def change(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda path: change(path, num_codes=8),
            "stored tensors must be those of an ImageTokenizer, got missing, .*code",
        ),
        (lambda path: change(path, patch_size=4), "patch_size must divide image_size=6, got 4"),
        (lambda path: change(path, decay=None), "must have the fields of .*, got missing or unknown: decay"),
        (lambda path: change(path, more=1), "must have the fields of .*, got missing or unknown: more"),
        (lambda path: change(path, model_type="llama"), "model_type must be 'arfast_image_tokenizer', got 'llama'"),
        (lambda path: (path / "config.json").write_text("{"), "config.json must be valid JSON"),
        (lambda path: (path / "model.safetensors").write_bytes(b"12345678"), "must be a complete safetensors file"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    ImageTokenizer(CONFIG).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.from_pretrained(tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be an existing directory, got"):
        ImageTokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a directory, got the file"):
        ImageTokenizer(CONFIG).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("image_size", 0, r"be an integer in \[1, 4096\]"),
        ("num_codes", 1, r"be an integer in \[2, 65536\]"),
        ("num_blocks", True, r"be an integer in \[0, 64\]"),
        ("patch_size", 4, "divide image_size=6"),
        ("commitment", math.inf, r"be a number in \[0.0, 3.4028234663852886e\+38\]"),
        ("commitment", 10**400, r"be a number in \[0.0, 3.4028234663852886e\+38\]"),
        ("decay", 1.0, r"be a number in \[0.0, 1.0\)"),
        ("revive_below", math.nan, r"be a number in \[0.0, 1.0\]"),
    ],
)
def test_bad_configurations(field, value, rule):
    with pytest.raises(ValueError, match=f"ImageTokenizerConfig: {field} must {rule}, got {value!r:.100}"):
        dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(TypeError, match="config must be an ImageTokenizerConfig, got dict"):
        ImageTokenizer({})


@pytest.mark.parametrize("call", ["encode", "forward"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[..., :5], r"be torch.float64 \[B, 2, 6, 6\], got torch.float64 \[5, 2, 6, 5\]"),
        (lambda x: x[:, :1], r"be torch.float64 \[B, 2, 6, 6\], got torch.float64 \[5, 1, 6, 6\]"),
        (lambda x: x[0], r"be torch.float64 \[B, 2, 6, 6\], got torch.float64 \[2, 6, 6\]"),
        (lambda x: x[:0], r"be torch.float64 \[B, 2, 6, 6\], got torch.float64 \[0, 2, 6, 6\]"),
        (lambda x: (255 * x).to(torch.uint8), r"be torch.float64 \[B, 2, 6, 6\], got torch.uint8 \[5, 2, 6, 6\]"),
        (lambda x: x.numpy(), r"be torch.float64 \[B, 2, 6, 6\], got ndarray"),
        (lambda x: x.clamp(0.1, 0.9) * 20, r"be in \[0, 1\], got 2 to 18"),
        (lambda x: x.clamp(0.1, 0.9) - 0.5, r"be in \[0, 1\], got -0.4 to 0.4"),
        (lambda x: torch.full_like(x, math.nan), r"be in \[0, 1\], got nan to nan"),
    ],
)
def test_bad_images(call, change, message):
    with pytest.raises(ValueError, match=f"ImageTokenizer: images must {message}"):
        getattr(make(), call)(change(images()))


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(1, 3, 2, dtype=torch.int64), r"be int64 \[B, 3, 3\], got torch.int64 \[1, 3, 2\]"),
        (torch.zeros(1, 3, 3), r"be int64 \[B, 3, 3\], got torch.float32 \[1, 3, 3\]"),
        ([[0]], r"be int64 \[B, 3, 3\], got list"),
        (torch.full((1, 3, 3), 7), r"be in \[0, num_codes=7\), got 7 to 7"),
        (torch.full((1, 3, 3), -1), r"be in \[0, num_codes=7\), got -1 to -1"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=f"ImageTokenizer: codes must {message}"):
        make().decode(codes)
