r"""The images as they are, before any network: a fixed picture over them is one direction there, however faint it is.

A probe of a few epochs answers to what it has learned. Noise of 8/255 on a fiftieth of the images is learned later, by
the model that screening is to protect; among whitened pixels it lies further from its class than anything natural.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainguard.screening.separation import Whitening

SIDE = 32  # pixels that larger images are averaged down to
SAMPLES_EACH = 3  # samples that the spread is learned from, for each number that a picture may have
DIRECTIONS = 640  # random ones that the whitened pixels are read along: as many as the probe has features


def whitening_of(pixels: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> Whitening:
    """The spread that all classes share, along random directions, of (M, P) pixels with (M,) labels; see `flat`."""
    size = pixels.shape[1]
    directions = np.random.default_rng(seed).standard_normal((size, min(DIRECTIONS, size)))
    return Whitening.fit(pixels, labels, directions / np.sqrt(len(directions)))


def side_for(shape: tuple[int, int, int], samples: int) -> int:
    """The side in pixels that images of a shape (C, H, W) are averaged down to, if so many samples tell the spread."""
    return int(np.clip(np.sqrt(samples / SAMPLES_EACH / shape[0]), 2, SIDE))


def flat(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) as numbers (B, P), averaged down to at most `side` pixels each way."""
    return F.adaptive_avg_pool2d(images, (min(side, images.shape[2]), min(side, images.shape[3]))).flatten(1)
