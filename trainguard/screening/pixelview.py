r"""The images as they are, before any network: a fixed picture over them is one direction there, however faint it is.

A probe of a few epochs answers to what it has learned. Noise of 8/255 on a fiftieth of the images is learned later, by
the model that screening is to protect; among whitened pixels it lies further from its class than anything natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from trainguard.data.store import ImageStore
from trainguard.screening.separation import Array, Whitening

SIDE = 32  # pixels that larger images are averaged down to
SAMPLES_EACH = 3  # samples that the spread is learned from, for each number that a picture may have
DIRECTIONS = 640  # random ones that the whitened pixels are read along: as many as the probe has features
CHUNK = 2048  # images read at a time


@dataclass(frozen=True, eq=False)
class PixelView:
    """What a class looks like along random directions in whitened pixels.

    Attributes:
        side: in pixels, of the squares that images are averaged down to; smaller ones stay as they are.
        whitening: of the pixels, with the directions in it.
    """

    side: int
    whitening: Whitening

    @classmethod
    def fit(cls, store: ImageStore, index: NDArray[np.int64], seed: int) -> PixelView:
        """Learn the spread that all classes share from the samples `index` (M,)."""
        channels = store.shape[0]
        side = int(np.clip(np.sqrt(len(index) / SAMPLES_EACH / channels), 2, SIDE))
        pixels = _pixels(store, index, side)
        directions = np.random.default_rng(seed).standard_normal((pixels.shape[1], min(DIRECTIONS, pixels.shape[1])))
        return cls(side, Whitening.fit(pixels, store.labels[index], directions / np.sqrt(len(directions))))

    def __call__(self, store: ImageStore, index: NDArray[np.int64]) -> Array:
        """(n, D) places of the samples `index` (n,)."""
        parts = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
        return np.concatenate([self.whitening(_pixels(store, part, self.side)) for part in parts])


def _pixels(store: ImageStore, index: NDArray[np.int64], side: int) -> NDArray[np.float32]:
    parts = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
    size = min(side, store.shape[1]), min(side, store.shape[2])
    small = [F.adaptive_avg_pool2d(store.batch(part), size).flatten(1).numpy() for part in parts]
    return np.concatenate(small)
