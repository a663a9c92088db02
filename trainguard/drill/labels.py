r"""Which label a poisoned sample gets: functions of the (N,) true labels."""

# ruff: noqa: D102  (what a call does stands in the docstring of its class)

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class LabelRule(Protocol):
    r"""(N,) int64 true labels to (N,) int64 given labels."""

    def __call__(self, labels: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class to:
    r"""Every sample gets label `target` (all-to-one)."""

    target: int

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        return np.full_like(labels, self.target)


@dataclass(frozen=True)
class shift:
    r"""Label y becomes (y + step) mod `num_classes` (all-to-all); None: one more than the largest label given.

    Raises:
        ValueError: a label beyond `num_classes`, when called.
    """

    step: int
    num_classes: int | None = None

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        present = int(labels.max(initial=0)) + 1
        if self.num_classes and present > self.num_classes:
            raise ValueError(f"expected labels below num_classes={self.num_classes}, got {present - 1}: give {present}")
        return (labels + self.step) % (self.num_classes or present)


@dataclass(frozen=True)
class Keep:
    r"""The label stays: clean-label payloads and cover samples."""

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        return labels.copy()


keep = Keep()
