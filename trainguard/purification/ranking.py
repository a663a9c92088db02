r"""PBE step 3: find clean images by how little purification changed what the model says of them."""

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def logit_similarity(infected: Tensor, purified: Tensor) -> Tensor:
    r"""Cosine similarity of the logits before and after purification (PBE Eq. 9, Sec. 3.5.2).

    .. math:: S_{\theta',\theta^t}(x) = \frac{\langle a(x;\theta'),
    a(x;\theta^t)\rangle}{|a(x;\theta')|\,|a(x;\theta^t)|}

    Args:
        infected: (B, K) logits of the model as it came.
        purified: (B, K) logits of the purified model on the same images.

    Returns:
        (B,) float32 in [-1, 1]; high for images that look clean.

    Deviation from the paper: none.
    """
    return F.cosine_similarity(infected.float(), purified.float(), dim=1)


def cleanest(similarity: NDArray[np.floating], share: float, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    r"""The images with the highest similarity, class by class: :math:`D_{ext}^{t+1}`.

    Of each class the top `share`, but nothing from the far end of the whole ranking, beyond the top (1 + share) / 2:
    there lies the poison of the target class, of which it may be the greater part.

    Args:
        similarity: (N,) from `logit_similarity`; NaN counts as lowest.
        share: of each class, in (0, 1].
        labels: (N,) classes.

    Returns:
        (n,) int64, ascending; n is about share N, and at least one. Ties go to the earlier image, so that every process
        picks the same.

    Deviation from the paper: it takes the top of the whole ranking (Sec. 3.5.2). The classes that purification moves
    little then crowd out the others: on digits that alone cost 3 to 5 points of accuracy.
    """
    order = np.argsort(-np.nan_to_num(similarity, nan=-np.inf), kind="stable")
    near = order[: max(1, round((1 + share) / 2 * len(order)))]
    chosen = [near[labels[near] == k][: max(1, round(share * np.sum(labels == k)))] for k in np.unique(labels)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Share of two sets of indices that is common to both: intersection over union, in [0, 1]."""
    common = len(np.intersect1d(first, second))
    return common / max(1, len(first) + len(second) - common)


def precision_recall(similarity: NDArray[np.floating], clean: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Precision and recall of the ranking as a detector of clean images (PBE Fig. 6).

    Args:
        similarity: (N,) from `logit_similarity`.
        clean: (N,) the truth.

    Returns:
        precision (N,) and recall (N,) after the first 1, 2, ..., N images of the ranking.
    """
    found = np.cumsum(clean[np.argsort(-similarity, kind="stable")])
    return found / np.arange(1, len(found) + 1), found / max(1, int(clean.sum()))
