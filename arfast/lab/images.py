"""Images as tokens: a vector-quantised autoencoder turns pictures into codes and back, and a language model learns to
write the codes of handwritten digits after a caption.

Every fifth digit, and every fifth patch of the photographs, is held out of all training, and so are two wordings of the
caption. A classifier of real digits judges whether samples are what was asked for; that they are no copies is judged by
their distance from the nearest training image, beside that of the digits held out, and by codes that are all those of a
training image. No sample is left out.

The pictures are scikit-learn's: 1,797 digits of 8 x 8 pixels, and 2,080 patches of 16 x 16 pixels of two photographs.
Image tokenizers and the language model's run are kept in --output-dir: a study that was interrupted goes on.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.data import DatasetManifest, Tokenizer, prepare_dataset
from arfast.data.checks import check_at_least
from arfast.models import CausalLM, CausalLMConfig, ImageTokenizer, ImageTokenizerConfig

from .image_text import (
    HELD_OUT_WORDINGS,
    WORDINGS,
    WORDS,
    bits_per_image,
    caption,
    caption_tokenizer,
    captioned_images,
    draw_codes,
)
from .pictures import PATCH_SIZE, Judge, Pictures, load_digits, load_photographs
from .result import save_result
from .training import train, training_config

_STEPS, _BATCH_SIZE, _LEARNING_RATE = 1500, 32, 5e-3  # of image tokenizers
_SEQLEN, _ROWS, _MODEL_RATE = 32, 32, 2e-3  # of the language model
_SHOWN_PATCHES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codes", type=int, default=64, metavar="K", help="of digits (default: %(default)s)")
    parser.add_argument(
        "--photo-codes", type=int, nargs="+", default=[16, 64, 256], metavar="K", help="(default: 16 64 256)"
    )
    parser.add_argument("--max-tokens", type=int, default=1_000_000, metavar="N", help="to train on (default: 1000000)")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="per caption (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="beside 1 (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    check_at_least("lab images", arguments, max_tokens=1, samples=1)
    if not 0 < arguments.temperature < math.inf:
        raise ValueError(f"lab images: temperature must be a positive number, got {arguments.temperature}")
    config = ImageTokenizerConfig(image_size=8, patch_size=2, num_codes=arguments.codes, code_dim=8, num_blocks=1)
    photo_config = dict(image_size=PATCH_SIZE, channels=3, patch_size=4, num_blocks=1)
    photo_configs = [ImageTokenizerConfig(num_codes=k, **photo_config) for k in sorted(set(arguments.photo_codes))]
    digits, photos, output = load_digits(), load_photographs(), Path(arguments.output_dir)
    folder = output / f"digits-{config.num_codes}"
    images = trained_tokenizer(folder / "images", config, digits.known)
    of_photos = [trained_tokenizer(output / f"photos-{one.num_codes}", one, photos.known) for one in photo_configs]
    model, tokenizer = trained_model(folder, images, digits, arguments.max_tokens)
    found = {
        "digits": quality(images, digits),
        "photos": [quality(one, photos) for one in of_photos],
        "bits_per_image": {
            "known": bits_per_image(model, tokenizer, images.encode(digits.known), digits.known_labels),
            "held_out": bits_per_image(model, tokenizer, images.encode(digits.held_out), digits.held_out_labels),
        },
    }
    judge = Judge(digits.known, digits.known_labels, images.encode(digits.known))
    found["real"] = judge_real(judge, images, digits)
    drawn = {
        temperature: draw_all(model, tokenizer, images, arguments.samples, temperature)
        for temperature in dict.fromkeys((1.0, arguments.temperature))
    }
    found["samples"] = [{"temperature": one, **judge_samples(judge, images, drawn[one])} for one in drawn]
    print(describe(found), flush=True)
    shown = [images.decode(codes[:, 0]) for codes in drawn[arguments.temperature]]
    canvases = digit_rows(images, digits, shown), patch_rows(of_photos, photos.held_out)
    return found | {"figure": save_result(arguments, lambda figure: draw(figure, *canvases), (11, 6))}


def trained_tokenizer(path: Path, config: ImageTokenizerConfig, images: Tensor) -> ImageTokenizer:
    """The tokenizer in a directory, or one that is trained on images [N, C, S, S] and left there."""
    if (path / "config.json").is_file():  # which is written last
        tokenizer = ImageTokenizer.from_pretrained(path)
        if tokenizer.config != config:
            raise ValueError(f"lab images: {str(path)!r} must hold an {config}, got {tokenizer.config}")
        return tokenizer.eval()
    tokenizer, generator = ImageTokenizer(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        batch = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        tokenizer(images[batch]).loss.backward()
        optimizer.step()
        schedule.step()
    tokenizer.save_pretrained(path)
    return tokenizer.eval()


@torch.no_grad()
def quality(tokenizer: ImageTokenizer, pictures: Pictures) -> dict[str, float]:
    """How well images come back from codes: peak signal-to-noise ratio in dB; and how many codes are in use."""
    config, held_out = tokenizer.config, tokenizer(pictures.held_out)
    return {
        "codes": config.num_codes,
        "bits_per_pixel": math.log2(config.num_codes) / config.patch_size**2,
        "psnr_known": psnr(tokenizer(pictures.known).reconstruction, pictures.known),
        "psnr": psnr(held_out.reconstruction, pictures.held_out),
        "perplexity": float(held_out.perplexity),
    }


def psnr(images: Tensor, originals: Tensor) -> float:
    """-10 log10 of the mean squared error, of values in [0, 1]."""
    return -10 * math.log10((images - originals).square().mean())


def trained_model(
    folder: Path, images: ImageTokenizer, digits: Pictures, max_tokens: int
) -> tuple[CausalLM, Tokenizer]:
    """A small language model of captions with codes, from a run in the folder, which goes on where it stopped."""
    tokenizer = caption_tokenizer(images.config.num_codes)
    documents = captioned_images(images.encode(digits.known), digits.known_labels)
    prepare_dataset(documents, folder / "data", tokenizer, validation_fraction=0.0, test_fraction=0.0)
    sizes = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_key_value_heads=4)
    vocabulary = DatasetManifest.load(folder / "data").vocabulary
    model = CausalLM(CausalLMConfig.preset("tiny", max_position_embeddings=_SEQLEN, **sizes, **vocabulary))
    settings = dict(packing="padded", learning_rate=_MODEL_RATE)
    train(model, training_config(folder / "model", max_tokens, _SEQLEN, _ROWS, **settings), folder / "data")
    return model, tokenizer


def draw_all(
    model: CausalLM, tokenizer: Tokenizer, images: ImageTokenizer, count: int, temperature: float
) -> list[Tensor]:
    """For each wording, the codes of `count` images of each digit, int64 [10, count, h, w]."""
    grid, drawn = images.config.grid_size, []
    for number, wording in enumerate((*WORDINGS, *HELD_OUT_WORDINGS)):
        captions = [caption(wording, digit) for digit in range(len(WORDS))]
        options = dict(temperature=temperature, top_k=0, seed=number * len(WORDS))
        codes = draw_codes(model, tokenizer, captions, count, images.config.num_codes, grid**2, **options)
        drawn.append(codes.unflatten(-1, (grid, grid)))
    return drawn


def judge_real(judge: Judge, images: ImageTokenizer, digits: Pictures) -> dict[str, float]:
    """The digits held out, as they are and decoded from their codes."""
    codes, labels = images.encode(digits.held_out), digits.held_out_labels
    return {
        "recognised": judge.recognised(digits.held_out, labels),
        "recognised_decoded": judge.recognised(images.decode(codes), labels),
        "nearest": judge.nearest(digits.held_out),
        "nearest_decoded": judge.nearest(images.decode(codes)),
        "copied": judge.copied(codes),
        "different": different(codes),
    }


def judge_samples(judge: Judge, images: ImageTokenizer, drawn: Sequence[Tensor]) -> dict:
    """Samples of all captions: what share of each wording is recognised as asked, and what `judge_real` tells."""
    asked = torch.arange(len(WORDS)).repeat_interleave(drawn[0].shape[1])
    codes = [one.flatten(0, 1) for one in drawn]
    wordings = zip((*WORDINGS, *HELD_OUT_WORDINGS), codes, strict=True)
    recognised = {wording: judge.recognised(images.decode(one), asked) for wording, one in wordings}
    every = torch.cat(codes)
    return {
        "recognised": recognised,
        "recognised_trained": sum(recognised[wording] for wording in WORDINGS) / len(WORDINGS),
        "nearest": judge.nearest(images.decode(every)),
        "copied": judge.copied(every),
        "different": different(every),
    }


def different(codes: Tensor) -> float:
    """Of codes [N, h, w], the share that is left when each is kept once."""
    return len(codes.flatten(1).unique(dim=0)) / len(codes)


def describe(found: dict) -> str:
    """Tables of the image tokenizers and of the samples."""
    lines = [f"{'codes of':<10} {'codes':>6} {'bits/pixel':>10} {'PSNR known':>10} {'held out':>8} {'perplexity':>10}"]
    for name, one in [("digits", found["digits"]), *(("photos", one) for one in found["photos"])]:
        lines.append(
            f"{name:<10} {one['codes']:>6} {one['bits_per_pixel']:>10.2f} {one['psnr_known']:>10.1f} "
            f"{one['psnr']:>8.1f} {one['perplexity']:>10.1f}"
        )
    bits, real, samples = found["bits_per_image"], found["real"], found["samples"]
    lines.append(f"bits per digit after its caption: known {bits['known']:.1f}, held out {bits['held_out']:.1f}")
    columns = [f"T = {one['temperature']:g}" for one in samples]
    lines.append(f"{'recognised as asked':<42}" + "".join(f"{name:>9}" for name in columns))
    for wording in (*WORDINGS, *HELD_OUT_WORDINGS):
        name = wording + " (held out)" * (wording in HELD_OUT_WORDINGS)
        lines.append(f"  {name:<40}" + "".join(f"{one['recognised'][wording]:>9.1%}" for one in samples))
    shares = "".join(f"{one['recognised_trained']:>9.1%}" for one in samples)
    lines.append(f"  {'all wordings trained on':<40}{shares}")
    lines.append(f"real digits held out: recognised {real['recognised']:.1%}, decoded {real['recognised_decoded']:.1%}")
    rows = {"digits held out": real, "  decoded": real | {"nearest": real["nearest_decoded"]}}
    rows |= {f"samples, {name}": one for name, one in zip(columns, samples, strict=True)}
    return "\n".join([*lines, *describe_distances(rows)])


def describe_distances(rows: dict[str, dict[str, float]]) -> list[str]:
    """By name, what tells copies; the ratio is to the first row's distance."""
    lines, unit = [f"{'median distance to training images':<34} {'ratio':>6} {'copies':>7} {'different':>9}"], None
    for name, one in rows.items():
        unit = unit or one["nearest"]
        shares = f"{one['copied']:>7.1%} {one['different']:>9.1%}"
        lines.append(f"  {name:<24} {one['nearest']:>7.3f} {one['nearest'] / unit:>6.2f} {shares}")
    return lines


def digit_rows(images: ImageTokenizer, digits: Pictures, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """By name, rows of ten images [10, 1, 8, 8]: the first real digit of each class, decoded, and samples."""
    first = [int((digits.held_out_labels == digit).nonzero()[0]) for digit in range(len(WORDS))]
    real = digits.held_out[first]
    rows = {"real, held out": real, "from its codes": images.decode(images.encode(real))}
    return rows | {f"“{one}”": drawn for one, drawn in zip((*WORDINGS, *HELD_OUT_WORDINGS), samples, strict=True)}


def patch_rows(tokenizers: Sequence[ImageTokenizer], patches: Tensor) -> dict[str, Tensor]:
    """By name, rows of patches [n, 3, 16, 16] evenly from all: as they are, and decoded."""
    real = patches[:: len(patches) // _SHOWN_PATCHES][:_SHOWN_PATCHES]
    rows = {"photographs, held out": real}
    return rows | {f"{one.config.num_codes} codes": one.decode(one.encode(real)) for one in tokenizers}


def draw(figure, digits: dict[str, Tensor], patches: dict[str, Tensor]) -> None:
    for axes, rows in zip(figure.subplots(1, 2), (digits, patches), strict=True):
        height = next(iter(rows.values())).shape[-1] + 1
        axes.imshow(canvas(list(rows.values())), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_yticks([height * (number + 0.5) for number in range(len(rows))], list(rows), fontsize="small")
        axes.set_xticks([])


def canvas(rows: Sequence[Tensor]) -> np.ndarray:
    """Rows of images [n, C, S, S], with a line between them, as one picture [height, width, C]."""
    images = F.pad(torch.stack(list(rows)), (0, 1, 0, 1), value=0.5)
    return images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
