r"""The images as they are, before any network: a fixed picture over them is one direction there, however faint it is.

A probe of a few epochs answers to what it has learned. Noise of 8/255 on a fiftieth of the images is learned later, by
the model that screening is to protect; among whitened pixels it lies further from its class than anything natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from trainguard.screening.separation import DIRECTIONS
from trainguard.screening.whitening import pooled, standardised

SIDE = 32  # pixels that larger images are averaged down to
SAMPLES_EACH = 3  # samples that the spread is learned from, for each number that a picture may have
POWERS = 4  # power iterations of the singular value decomposition
Pixels = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PixelView:
    """Pixels with the spread that all classes share taken out, one class at a time.

    All of them count: along fewer directions, random ones, most of what tells a faint picture is lost.

    Attributes:
        mean: (P,) of the pixels.
        scale: (P,) their standard deviation.
        root: (P, P) Cholesky factor of their covariance within classes.
    """

    mean: Pixels
    scale: Pixels
    root: Pixels

    @classmethod
    def fit(cls, pixels: Pixels, labels: NDArray[np.int64]) -> PixelView:
        """Learn from (M, P) pixels and their (M,) labels; see `flat`."""
        return cls(*pooled(pixels, labels))

    def widest(self, pixels: Pixels, seed: int) -> Pixels:
        """(P, k) the directions along which the (n, P) whitened pixels of one class vary most."""
        white = solve_triangular(self.root, standardised(pixels, self.mean, self.scale).T, lower=True).T
        count = min(DIRECTIONS, max(2, len(pixels) // 5), *white.shape)
        _, _, lines = randomized_svd(white - white.mean(0), count, n_iter=POWERS, random_state=seed)
        return solve_triangular(self.root, lines.T, lower=True, trans="T")

    def __call__(self, pixels: Pixels, lines: Pixels) -> NDArray[np.float64]:
        """(n, k) where (n, P) pixels lie along (P, k) directions."""
        return (standardised(pixels, self.mean, self.scale) @ lines).astype(np.float64)


def side_for(shape: tuple[int, int, int], samples: int) -> int:
    """The side in pixels that images of a shape (C, H, W) are averaged down to, if so many samples tell the spread."""
    return int(np.clip(np.sqrt(samples / SAMPLES_EACH / shape[0]), 2, SIDE))


def flat(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) as numbers (B, P), averaged down to at most `side` pixels each way."""
    return F.adaptive_avg_pool2d(images, (min(side, images.shape[2]), min(side, images.shape[3]))).flatten(1)
