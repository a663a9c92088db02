r"""AdvrBD Algorithm 1: which samples may be trusted (D_c), and which may hold the poison (D_p)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def least_consistent(
    divergence: NDArray[np.float32], rate: float, labels: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    r"""Algorithm 1, lines 8 to 12: the share of samples whose predictions move most.

    .. math:: D_c = \{x_i : S(x_i) \text{ among the largest } p|D|\}, \qquad D_p = D \setminus D_c

    Args:
        divergence: (N,) of Eq. 3; NaN for samples that belong to neither part.
        rate: p, the share that goes to D_c, in [0, 1].
        labels: (N,) given labels: take the share from each label equally. Nobody knows the target class, but poison
            sits in few labels, and a class's own hardness then plays no part. None takes it from all at once, as the
            paper does.

    Returns:
        The indices of D_c, ascending.

    Raises:
        ValueError: `rate` is outside [0, 1].

    Deviation from the paper: none without `labels`.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected a partition rate in [0, 1], got {rate}")
    usable = np.flatnonzero(np.isfinite(divergence))
    groups = [usable] if labels is None else [usable[labels[usable] == k] for k in np.unique(labels[usable])]
    chosen = [group[np.argsort(-divergence[group], kind="stable")][: round(rate * len(group))] for group in groups]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
