"""Real pictures that come with scikit-learn, and what tells whether made ones are like them and are not copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HELD_OUT = 5
PATCH_SIZE = 16


@dataclass(frozen=True)
class Pictures:
    """Images float32 [N, C, S, S] in [0, 1] to learn from, and those held out: every fifth; with labels int64 [N]."""

    known: Tensor
    held_out: Tensor
    known_labels: Tensor | None = None
    held_out_labels: Tensor | None = None

    @classmethod
    def split(cls, images: Tensor, labels: Tensor | None = None) -> "Pictures":
        held_out = torch.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
        parts = images[~held_out], images[held_out]
        return cls(*parts) if labels is None else cls(*parts, labels[~held_out], labels[held_out])


def _scikit_learn() -> Any:
    try:
        import PIL  # noqa: F401 (reads the photographs)
        import sklearn.datasets
        import sklearn.svm
    except ImportError as error:
        raise ImportError("lab images needs scikit-learn and pillow: pip install 'arfast[lab]'") from error
    return sklearn


def load_digits() -> Pictures:
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels, no two alike."""
    digits = _scikit_learn().datasets.load_digits()
    images = torch.from_numpy(digits.images / digits.images.max()).float()
    return Pictures.split(images[:, None], torch.from_numpy(digits.target))


def load_photographs() -> Pictures:
    """2,080 patches of 16 x 16 coloured pixels: all whole ones of two photographs."""
    photographs = _scikit_learn().datasets.load_sample_images().images
    images = torch.stack([torch.from_numpy(photograph.copy()) for photograph in photographs])
    patches = images.unfold(1, PATCH_SIZE, PATCH_SIZE).unfold(2, PATCH_SIZE, PATCH_SIZE)
    return Pictures.split(patches.flatten(0, 2).float() / 255)


class Judge:
    """Compares pictures and codes with labelled training images.

    Args:
        images: float32 [N, C, S, S]; a support-vector classifier learns them.
        labels: int64 [N].
        codes: int64 [N, h, w], of the same images.
    """

    def __init__(self, images: Tensor, labels: Tensor, codes: Tensor):
        self._images = images.flatten(1)
        self._codes = set(_rows(codes))
        self._classifier = _scikit_learn().svm.SVC().fit(self._images.numpy(), labels.numpy())

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Share of images [M, C, S, S] that the classifier takes for their labels [M]."""
        found = torch.from_numpy(self._classifier.predict(images.flatten(1).numpy()))
        return float((found == labels).float().mean())

    def nearest(self, images: Tensor) -> float:
        """Median over images [M, C, S, S] of the Euclidean distance from the nearest training image."""
        exact = "donot_use_mm_for_euclid_dist"  # the other way is off by 1e-3 where the distance is 0
        return float(torch.cdist(images.flatten(1), self._images, compute_mode=exact).amin(1).median())

    def copied(self, codes: Tensor) -> float:
        """Share of codes [M, h, w] that are, all of them, those of a training image."""
        rows = _rows(codes)
        return sum(row in self._codes for row in rows) / len(rows)


def _rows(codes: Tensor) -> Sequence[tuple[int, ...]]:
    return [tuple(row) for row in codes.flatten(1).tolist()]
