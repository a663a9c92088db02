r"""What a probe that learned from the unsuspected samples alone says of the others: their labels, and their company."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from trainguard.screening.classes import FITTED
from trainguard.screening.pipeline import Run
from trainguard.screening.probe import Probe
from trainguard.screening.undoing import Change, outputs_of
from trainguard.training import outputs

NEIGHBOURS = 3  # few: a natural group is tighter than the crowd around it, poison is mixed into it


@dataclass(frozen=True, eq=False)
class Opinion:
    """A purified probe's.

    Attributes:
        run: the screening.
        probe: the probe.
        often: (K,) the logarithm of each class's share of what it learned from, taken off its logits (logit adjustment,
            Menon et al. 2021): else it would give few samples the label of a rare class, whatever they show.
        pool: (P,) the samples that are company.
        seen: what the probe makes of these, see `_seen`.
        search: among the second of these.
    """

    run: Run
    probe: Probe
    often: np.ndarray
    pool: np.ndarray
    seen: tuple[np.ndarray, np.ndarray]
    search: NearestNeighbors

    @classmethod
    def of(cls, run: Run, probe: Probe, often: np.ndarray) -> Opinion:
        """Choose the company."""
        pool = np.random.default_rng(run.seed).permutation(run.store.readable)[:FITTED]
        search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(pool)), metric="euclidean")
        seen = _seen(run, probe, pool)
        return cls(run, probe, often, pool, seen, search.fit(seen[1]))

    def __call__(self, members: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Of samples (n,) the logits (n, K), and the share (n,) of their nearest neighbours that have the label."""
        if len(self.pool) == len(self.run.store.readable):  # all have been looked at
            rows = np.argsort(self.pool)[np.searchsorted(self.run.store.readable, members)]
            answers, deep = (each[rows] for each in self.seen)
        else:
            answers, deep = _seen(self.run, self.probe, members)
        near = self.pool[self.search.kneighbors(deep, return_distance=False)]
        others = near != members[:, None]  # a sample is no company for itself
        alike = (self.run.store.labels[near] == label) & others
        return answers - self.often, alike.sum(1) / np.maximum(1, others.sum(1))

    def of_undone(self, members: np.ndarray, change: Change) -> np.ndarray:
        """The logits (n, K) of samples (n,), undone."""
        return outputs_of(self.run, self.probe, members, change) - self.often


def _seen(run: Run, probe: Probe, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits (n, K) of samples (n,) as the probe gives them, and its deepest features (n, D), of length 1."""

    def both(images: torch.Tensor) -> torch.Tensor:
        deepest = probe.maps(images)[-1]
        return torch.cat([probe.answer(deepest).float(), deepest.float().mean((2, 3))], 1)

    found, classes = outputs(both, probe, run.store, index, run.processes), run.store.num_classes
    deep = found[:, classes:]
    return found[:, :classes], deep / np.maximum(np.linalg.norm(deep, axis=1, keepdims=True), 1e-9)
