r"""AdvrBD Algorithm 1: which samples may be trusted (D_c), and which may hold the poison (D_p)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def least_consistent(divergence: NDArray[np.float32], rate: float) -> NDArray[np.int64]:
    r"""Algorithm 1, lines 8 to 12: the share of samples whose predictions move most.

    .. math:: D_c = \{x_i : S(x_i) \text{ among the largest } p|D|\}, \qquad D_p = D \setminus D_c

    Args:
        divergence: (N,) of Eq. 3; NaN for samples that belong to neither part.
        rate: p, the share that goes to D_c, in [0, 1].

    Returns:
        The indices of D_c, ascending.

    Raises:
        ValueError: `rate` is outside [0, 1].

    Deviation from the paper: none.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected a partition rate in [0, 1], got {rate}")
    usable = np.flatnonzero(np.isfinite(divergence))
    order = np.argsort(-divergence[usable], kind="stable")
    return np.sort(usable[order][: round(rate * len(usable))])
