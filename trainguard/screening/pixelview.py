r"""The images as they are, before any network: a fixed picture over them is one direction there, however faint it is.

A probe of a few epochs answers to what it has learned. Noise of 8/255 on a fiftieth of the images is learned later, by
the model that screening is to protect; among whitened pixels it lies further from its class than anything natural.
What bends, blurs, compresses or recolours an image leaves no picture, and changes how much fine detail there is where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.linalg import solve_triangular
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from trainguard.screening.separation import DIRECTIONS
from trainguard.screening.whitening import pooled, standardised
from trainguard.training import full_precision

SIDE = 32  # pixels that larger images are averaged down to
SAMPLES_EACH = 3  # samples that the spread is learned from, for each number that a look may give
POWERS = 4  # power iterations of the singular value decomposition
CELLS = 8  # each way, in which detail is summed up
DETAIL = 4  # pixels each way of the cosines that measure it
PLACES = 64  # each way, about, at which it is measured in large images
PORTION = 64  # images that are measured at once
FAINT = 1e-5  # energy below which there is none: some times that of rounding to eight bits
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (-0.5, -0.5, 1.0))  # brightness, red - green, blue - yellow
Numbers = NDArray[np.float32]
Look = Callable[[Tensor], Tensor]  # from images (B, C, H, W) to numbers (B, P)


@dataclass(frozen=True, eq=False)
class PixelView:
    """What a look gives of images, with the spread that all classes share taken out, one class at a time.

    All of its numbers count: along fewer directions, random ones, most of what tells a faint picture is lost.

    Attributes:
        mean: (P,) of these numbers.
        scale: (P,) their standard deviation.
        root: (P, P) Cholesky factor of their covariance within classes.
    """

    mean: Numbers
    scale: Numbers
    root: Numbers

    @classmethod
    def fit(cls, numbers: Numbers, labels: NDArray[np.int64]) -> PixelView:
        """Learn from (M, P) numbers and their (M,) labels; see `looks_for`."""
        return cls(*pooled(numbers, labels))

    def widest(self, numbers: Numbers, seed: int) -> Numbers:
        """(P, k) the directions along which the (n, P) whitened numbers of one class vary most."""
        white = self.whitened(numbers)
        count = min(DIRECTIONS, max(2, len(numbers) // 5), *white.shape)
        _, _, lines = randomized_svd(white - white.mean(0), count, n_iter=POWERS, random_state=seed)
        return solve_triangular(self.root, lines.T, lower=True, trans="T")

    def whitened(self, numbers: Numbers) -> Numbers:
        """(n, P) numbers, whitened."""
        return solve_triangular(self.root, standardised(numbers, self.mean, self.scale).T, lower=True).T

    def __call__(self, numbers: Numbers, lines: Numbers) -> NDArray[np.float64]:
        """(n, k) where (n, P) numbers lie along (P, k) directions."""
        return (standardised(numbers, self.mean, self.scale) @ lines).astype(np.float64)


def looks_for(shape: tuple[int, int, int], samples: int) -> list[Look]:
    """What is read of images of a shape (C, H, W), if so many samples tell its spread: pixels, and fine detail."""
    pixels = partial(flat, side=side_for(shape, samples))
    told = int(np.sqrt(samples / SAMPLES_EACH / (DETAIL**2 - 1) / shape[0]))
    cells = min(CELLS, told, min(shape[1:]) - DETAIL + 1)
    return [pixels, partial(texture, cells=cells)] if cells > 0 else [pixels]


def side_for(shape: tuple[int, int, int], samples: int) -> int:
    """The side in pixels that images of a shape (C, H, W) are averaged down to, if so many samples tell the spread."""
    return int(np.clip(np.sqrt(samples / SAMPLES_EACH / shape[0]), 2, SIDE))


def flat(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) as numbers (B, P), averaged down to at most `side` pixels each way."""
    return F.adaptive_avg_pool2d(images, (min(side, images.shape[2]), min(side, images.shape[3]))).flatten(1)


def texture(images: Tensor, cells: int) -> Tensor:
    """Logarithmic energies (B, P) of the detail in images (B, C, H, W).

    For each opponent colour (each channel, where they are not three), each cosine of the discrete cosine transform of
    `DETAIL` pixels but the constant, and each of `cells` x `cells` cells.
    """
    with full_precision(images.device):  # of half a precision nothing fine would be left
        return torch.cat([_texture(part.float().contiguous(), cells) for part in images.split(PORTION)])


def _texture(images: Tensor, cells: int) -> Tensor:
    if images.shape[1] == 3:
        images = torch.einsum("oc,bchw->bohw", images.new_tensor(OPPONENT), images)
    stride = max(1, min(images.shape[2:]) // PLACES)
    detail = F.conv2d(images.flatten(0, 1)[:, None], images.new_tensor(_WAVES)[:, None], stride=stride)
    energy = F.adaptive_avg_pool2d(detail.square(), cells).reshape(len(images), -1)
    return (energy + FAINT).log()


_COSINES = dct(np.eye(DETAIL), norm="ortho", axis=0)
_WAVES = np.einsum("ih,jw->ijhw", _COSINES, _COSINES).reshape(-1, DETAIL, DETAIL)[1:]
