r"""Which samples a rule takes: rates are shares of the whole set, and what cannot be had raises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Select:
    r"""A random choice among the samples of some classes.

    Args:
        rate: share of the whole data set, in (0, 1]; None takes every sample that qualifies.
        of: classes that qualify; None for all.
        without: classes that do not.
        part: (k, n): the k-th of n even parts of that share, from 0, which add up to it.
    """

    rate: float | None
    of: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)

    def __call__(self, labels: np.ndarray, free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        r"""Sorted indices of the chosen samples.

        Args:
            labels: (N,) int64 true labels.
            free: (N,) bool, False where another rule has the sample already.
            rng: source of the choice.

        Raises:
            ValueError: fewer samples qualify than the rate asks for.
        """
        candidates = np.flatnonzero(free & self.qualifies(labels))
        if self.rate is None:
            return candidates
        if not 0 < self.rate <= 1:
            raise ValueError(f"expected a rate above 0 and up to 1, got {self.rate:g}")
        (k, parts), whole = self.part, self.rate * len(labels)
        count = round(whole * (k + 1) / parts) - round(whole * k / parts)
        if not self.qualifies(labels).any():
            raise ValueError(f"rate={self.rate:g} needs {count} images {self.who()}, and the data set has none")
        if count > len(candidates):
            taken, most = "", f" to at most {_down(parts * len(candidates) / len(labels))}"
            if not free.all():  # with a lower rate these would take fewer as well
                taken, most = " left over by the other rules", ""
            raise ValueError(
                f"rate={self.rate:g} needs {count} images {self.who()}, the data set has {len(candidates)}{taken}: "
                f"lower the rate{most}"
            )
        if count == 0:
            of = f" in {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"rate={self.rate:g} of {len(labels)} images{of} is none at all: raise the rate or add images"
            )
        return np.sort(rng.choice(candidates, count, replace=False))

    def qualifies(self, labels: np.ndarray) -> np.ndarray:
        r"""(N,) bool: samples of the right classes."""
        inside = np.ones(len(labels), bool) if self.of is None else np.isin(labels, self.of)
        return inside & ~np.isin(labels, self.without)

    def who(self) -> str:
        r"""The qualifying classes in words."""
        parts = [] if self.of is None else ["of class " + ", ".join(map(str, self.of))]
        if self.without:
            parts.append("outside class " + ", ".join(map(str, self.without)))
        return " and ".join(parts) or "of any class"


def _down(rate: float) -> str:
    """A rate in three decimals of a percent that is not more than it."""
    return f"{math.floor(rate * 1e5) / 1e5:g}"


def fraction(rate: float, *, without: tuple[int, ...] = (), part: tuple[int, int] = (0, 1)) -> Select:
    r"""A share of the whole set, or a `part` of it, from any class but `without`."""
    return Select(rate, without=without, part=part)


def of_class(label: int, rate: float | None = None) -> Select:
    r"""Samples of one class: a share of the whole set's size, or all of them."""
    return Select(rate, of=(label,))


def everything(*, without: tuple[int, ...] = ()) -> Select:
    r"""Every sample, but those of the classes `without`."""
    return Select(None, without=without)
