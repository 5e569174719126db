"""Images as tokens: an autoencoder that replaces each vector of a grid by the nearest of K, and so an image by codes.

van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning" (2017, arXiv 1711.00937): equations 1
to 3, and the codebook by exponential moving averages of appendix A.1. Codes that too few vectors use start again at
vectors of the batch, as in Dhariwal et al., "Jukebox" (2020, arXiv 2005.00341), section 3.1.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arfast.nn import normal_

from .checks import ConfigChecks

_INTEGERS = {
    "image_size": (1, 4096),
    "channels": (1, 64),
    "patch_size": (1, 256),
    "num_codes": (2, 2**16),
    "code_dim": (1, 4096),
    "hidden_size": (1, 4096),
    "num_blocks": (0, 64),
}
_NUMBERS = {
    "commitment": ("[", 0.0, torch.finfo(torch.float32).max, "]"),
    "decay": ("[", 0.0, 1.0, ")"),
    "revive_below": ("[", 0.0, 1.0, "]"),
}


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig(ConfigChecks):
    """Sizes of an ImageTokenizer.

    Args:
        image_size: height and width of the images, S pixels.
        channels: C of the images: 1 of grey ones, 3 of coloured ones.
        patch_size: height and width of the pixels that have one code, p, a divisor of image_size.
        num_codes: K.
        code_dim: D of the codes' vectors.
        hidden_size: channels of the convolutions.
        num_blocks: residual blocks of the encoder, and of the decoder.
        commitment: beta, the weight of the loss that keeps the encoder's vectors near their codes.
        decay: gamma of the moving averages, in [0, 1).
        revive_below: a code starts again when on average fewer vectors of a batch use it; in [0, 1], 0: never.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    image_size: int
    channels: int = 1
    patch_size: int = 2
    num_codes: int = 64
    code_dim: int = 16
    hidden_size: int = 64
    num_blocks: int = 2
    commitment: float = 0.25
    decay: float = 0.99
    revive_below: float = 1.0

    def __post_init__(self) -> None:
        self._check_integers(_INTEGERS)
        self._require(self.image_size % self.patch_size == 0, "patch_size", f"divide image_size={self.image_size}")
        self._check_numbers(_NUMBERS)

    @property
    def grid_size(self) -> int:
        """Height and width of an image's codes, S / p."""
        return self.image_size // self.patch_size


@dataclass(slots=True)
class ImageTokenizerOutput:
    """What ImageTokenizer returns.

    loss: scalar, mean squared error of the pixels + commitment * mean squared distance of the vectors from their codes.
    reconstruction: [B, C, S, S], in [0, 1].
    codes: int64 [B, S / p, S / p].
    perplexity: scalar, exp of the entropy of the batch's codes: how many are in use, if all were so alike.
    """

    loss: Tensor
    reconstruction: Tensor
    codes: Tensor
    perplexity: Tensor


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), section 4.1 of the paper."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImageTokenizer(nn.Module):
    """A vector-quantised autoencoder of images: pixels -> codes -> pixels.

    Each p x p patch becomes a vector, by convolutions that see its neighbours too; the vector is replaced by the
    nearest of the codebook; convolutions and a product give the pixels back. The gradient of the pixels' error passes
    the replacement as if it were not there (straight through). In training mode a forward pass moves the codebook: it
    is no parameter, and has no gradient.

    Args:
        config: sizes and options.
        seed: parameters and codebook are a pure function of (seed, name, element index).
        device: None: torch's default; "meta": shapes only.

    Example:
        >>> tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=8, num_codes=32))
        >>> images = torch.rand(5, 1, 8, 8)
        >>> tokenizer(images).loss.backward()
        >>> codes = tokenizer.encode(images)
        >>> codes.shape, tokenizer.decode(codes).shape
        (torch.Size([5, 4, 4]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(self, config: ImageTokenizerConfig, *, seed: int = 0, device: torch.device | str | None = None):
        super().__init__()
        if not isinstance(config, ImageTokenizerConfig):
            raise TypeError(f"ImageTokenizer: config must be an ImageTokenizerConfig, got {type(config).__name__}")
        self.config = config
        pixels, hidden, codes = config.channels * config.patch_size**2, config.hidden_size, config.num_codes
        with torch.device("meta"):
            self.encoder = nn.Sequential(
                nn.PixelUnshuffle(config.patch_size),
                nn.Conv2d(pixels, hidden, 1),
                *(ResidualBlock(hidden) for _ in range(config.num_blocks)),
                nn.Conv2d(hidden, config.code_dim, 1),
            )
            self.decoder = nn.Sequential(
                nn.Conv2d(config.code_dim, hidden, 1),
                *(ResidualBlock(hidden) for _ in range(config.num_blocks)),
                nn.Conv2d(hidden, pixels, 1),
                nn.PixelShuffle(config.patch_size),
            )
            # e, N and m of appendix A.1
            self.register_buffer("codebook", torch.empty(codes, config.code_dim))
            self.register_buffer("average_counts", torch.empty(codes))
            self.register_buffer("average_sums", torch.empty(codes, config.code_dim))
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_parameters(seed)

    @torch.no_grad()
    def init_parameters(self, seed: int = 0) -> None:
        """Weights as He et al. 2015 (arXiv 1502.01852, equation 10), biases 0, codes normal, each as if used once.

        Residual blocks begin as the identity: the codes follow the encoder's vectors, which should not start far out.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 or name.endswith("conv2.weight"):
                parameter.zero_()
            else:
                normal_(parameter, seed, name, math.sqrt(2 / parameter[0].numel()))
        normal_(self.codebook, seed, "codebook", 1.0)
        self.average_counts.fill_(1.0)
        self.average_sums.copy_(self.codebook)

    def forward(self, images: Tensor) -> ImageTokenizerOutput:
        """Loss and reconstruction of images; in training mode the codebook follows them.

        Args:
            images: float [B, C, S, S] of the model's dtype, in [0, 1].

        Raises:
            ValueError: `ImageTokenizer: images must <rule>, got <actual>`.
        """
        self._check_images(images)
        z = self._vectors(images)
        codes = self._nearest(z.detach())
        quantized = F.embedding(codes, self.codebook)
        pixels = self._pixels(z + (quantized - z).detach())
        loss = F.mse_loss(pixels, images) + self.config.commitment * F.mse_loss(z, quantized)
        counts = torch.bincount(codes.flatten(), minlength=self.config.num_codes)
        if self.training:
            self._update_codebook(z.detach().flatten(0, 2), codes.flatten())
        return ImageTokenizerOutput(loss, pixels.detach().clamp(0, 1), codes, _perplexity(counts))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, C, S, S] in [0, 1] -> codes int64 [B, S / p, S / p]; errors as of `forward`."""
        self._check_images(images)
        return self._nearest(self._vectors(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, S / p, S / p] in [0, K) -> images [B, C, S, S] in [0, 1].

        Raises:
            ValueError: `ImageTokenizer: codes must <rule>, got <actual>`.
        """
        size, num_codes = self.config.grid_size, self.config.num_codes
        if not isinstance(codes, Tensor) or codes.dtype != torch.int64 or codes.shape[1:] != (size, size):
            raise ValueError(f"ImageTokenizer: codes must be int64 [B, {size}, {size}], got {_describe(codes)}")
        if not ((codes >= 0) & (codes < num_codes)).all():
            actual = f"{codes.min()} to {codes.max()}"
            raise ValueError(f"ImageTokenizer: codes must be in [0, num_codes={num_codes}), got {actual}")
        return self._pixels(F.embedding(codes, self.codebook)).clamp(0, 1)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and safetensors: see `arfast.image_hub.save_image_tokenizer`."""
        from arfast.image_hub import save_image_tokenizer

        save_image_tokenizer(self, path)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, device: torch.device | str | None = None) -> "ImageTokenizer":
        """Read such a directory: see `arfast.image_hub.load_image_tokenizer`."""
        from arfast.image_hub import load_image_tokenizer

        return load_image_tokenizer(path, device)

    def _vectors(self, images: Tensor) -> Tensor:
        """z [B, S / p, S / p, D], of pixels in [-1, 1]: what is not centred learns slowly."""
        return self.encoder(2 * images - 1).movedim(1, -1)

    def _pixels(self, quantized: Tensor) -> Tensor:
        """[B, S / p, S / p, D] -> [B, C, S, S], nearly in [0, 1]."""
        return (self.decoder(quantized.movedim(-1, 1)) + 1) / 2

    def _nearest(self, z: Tensor) -> Tensor:
        """The code nearest to each vector [..., D], int64 [...]; of several the lowest."""
        half_squares = self.codebook.square().sum(1) / 2
        return (half_squares - z @ self.codebook.T).argmin(-1)

    @torch.no_grad()
    def _update_codebook(self, z: Tensor, codes: Tensor) -> None:
        """Equations 6 to 8 for the vectors z [N, D] of a batch and their codes [N]; then the dead codes."""
        assigned = F.one_hot(codes, self.config.num_codes).to(z.dtype)
        self.average_counts.lerp_(assigned.sum(0), 1 - self.config.decay)
        self.average_sums.lerp_(assigned.T @ z, 1 - self.config.decay)
        dead = self.average_counts < self.config.revive_below
        # The batch is random already: the same places of it each time need no state of a generator.
        places = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
        places = places[torch.arange(self.config.num_codes) % len(z)].to(z.device)
        self.average_counts.masked_fill_(dead, 1.0)
        self.average_sums.copy_(torch.where(dead[:, None], z[places], self.average_sums))
        self.codebook.copy_(self.average_sums / self.average_counts[:, None])

    def _check_images(self, images: Tensor) -> None:
        config, dtype = self.config, self.codebook.dtype
        shape = (config.channels, config.image_size, config.image_size)
        if not isinstance(images, Tensor) or images.dtype != dtype or images.shape[1:] != shape or len(images) == 0:
            rule = f"be {dtype} [B, {', '.join(map(str, shape))}]"
            raise ValueError(f"ImageTokenizer: images must {rule}, got {_describe(images)}")
        if not ((images >= 0) & (images <= 1)).all():
            actual = f"{images.min():.6g} to {images.max():.6g}"
            raise ValueError(f"ImageTokenizer: images must be in [0, 1], got {actual}")


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of codes that occur so often, [K]."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
