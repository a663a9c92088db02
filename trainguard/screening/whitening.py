r"""The spread that all classes share, learned from samples of all of them and taken out of features or pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

Array = NDArray[np.float64]
Floats = NDArray[Any]  # of either precision

DEAD = 1e-3  # of the median spread of a feature, up to which it says nothing
FARTHEST = 10.0  # standard deviations: one sample that a feature answers to like no other must not rule a class
AT_ONCE = 256  # samples whose squares are summed up in double precision
SHRINKAGE = 0.1  # of the pooled covariance towards a sphere
LEAST_LEVEL = 1e-6  # of that covariance, so that images without any difference can be whitened


@dataclass(frozen=True)
class Whitening:
    """Features with the spread that all classes share taken out.

    Attributes:
        mean: (D,) of the features.
        scale: (D,) their standard deviation; infinite where a feature hardly ever moves.
        matrix: (D, D'), which makes the pooled within-class covariance a unit matrix.
    """

    mean: Array
    scale: Array
    matrix: Array

    @classmethod
    def fit(cls, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Whitening:
        """Learn from (M, D) features and their (M,) labels."""
        mean, scale, root = pooled(features.astype(np.float64), labels)
        return cls(mean, scale, np.linalg.inv(root).T)

    def __call__(self, features: NDArray[np.float32]) -> Array:
        """(M, D) features, whitened."""
        return standardised(features, self.mean, self.scale) @ self.matrix


def pooled(features: Floats, labels: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """The spread that all classes share, of (M, D) features with (M,) labels, in the precision that they have.

    Returns:
        Their mean (D,), their standard deviation (D,), infinite where a feature hardly ever moves, and the Cholesky
        factor (D, D) of the covariance within classes of what these two make of them.
    """
    mean = features.mean(0, dtype=np.float64)
    parts = np.array_split(features, -(-len(features) // AT_ONCE))
    spread = np.sqrt(sum(((part - mean) ** 2).sum(0) for part in parts) / len(features))
    scale = np.where(spread > DEAD * np.median(spread), spread + 1e-6, np.inf)
    mean, scale = mean.astype(features.dtype), scale.astype(features.dtype)
    x = standardised(features, mean, scale)
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(0)
    covariance = x.T @ x / len(x)
    size = len(covariance)
    level = max(np.trace(covariance) / size, LEAST_LEVEL)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(size, dtype=x.dtype) * level
    return mean, scale, cholesky(covariance, lower=True)


def standardised(features: Floats, mean: Floats, scale: Floats) -> Floats:
    """(M, D) features less their mean, in standard deviations, none farther out than `FARTHEST`."""
    x = features - mean
    x /= scale
    return np.clip(x, -FARTHEST, FARTHEST, out=x)
