r"""Which of a class's two parts is unlike the images of all other classes, by its fine detail?

A trigger is in none of their images, whatever these show, so they lie with the clean part. A probe's features do not
say as much: samples of other classes may carry the trigger under their true labels (WaNet's noise mode, Adaptive-
Blend), and such a probe has learned to tell these from the poison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainguard.screening.pipeline import Run
from trainguard.screening.pixelview import Look, PixelView
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.separation import leaning
from trainguard.training import outputs

AROUND = 2000  # samples of all classes that a part is compared with, and samples of its own class at most
LEAST_OTHERS = 50  # samples of other classes, without which nothing is said of where they lie

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The fine detail of some samples of all classes.

    Attributes:
        look: what gives it.
        view: that takes the spread out that all classes share.
        detail: (M, P) of these samples, whitened.
        labels: (M,) theirs.
    """

    look: Look
    view: PixelView
    detail: Floats
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, look: Look, view: PixelView, numbers: Floats, labels: NDArray[np.int64]) -> Surroundings:
        """From what the look gives of samples in random order (N, P), and their labels (N,)."""
        return cls(look, view, view.whitened(numbers[:AROUND]), labels[:AROUND])

    def of_class(self, run: Run, probe: Probe | Trained, members: NDArray[np.int64], label: int) -> Bearings:
        """Look at the samples (n,) of one class; the probe says on which device.

        By this process alone: ranks of unlike processors may differ in whether a class asks for it.
        """
        chosen = np.sort(np.random.default_rng(run.seed).permutation(len(members))[:AROUND])
        own = self.view.whitened(outputs(self.look, probe, run.store, members[chosen]))
        return Bearings(chosen, own, self.detail[self.labels != label], run.seed)


@dataclass(frozen=True, eq=False)
class Bearings:
    """The fine detail of one class and of others.

    Attributes:
        chosen: (m,) which samples of the class.
        own: (m, P) theirs, whitened.
        others: (M, P) of other classes' samples.
        seed: of the folds, see `separation.leaning`.
    """

    chosen: NDArray[np.int64]
    own: Floats
    others: Floats
    seed: int

    def __call__(self, part: NDArray[np.bool_]) -> tuple[float, float]:
        """How well fine detail tells a part (n,) of the class, and the share of other classes' samples on its side.

        Returns:
            The share of the samples that lie on the side of their part's mean, averaged over the two parts: 0.5 for
            nothing, 1 for all of them; and of the other classes' samples the share that lie on the side of this part.
        """
        part = part[self.chosen]
        if not part.any() or part.all() or len(self.others) < LEAST_OTHERS:
            return 0.5, 0.5
        places = leaning(self.own, part, self.seed)
        told = float((places[part] > 0).mean() + (places[~part] <= 0).mean()) / 2
        above, below = self.own[part].mean(0), self.own[~part].mean(0)
        return told, float((self.others @ (above - below) > (above + below) @ (above - below) / 2).mean())
