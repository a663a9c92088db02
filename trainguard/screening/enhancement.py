r"""AdvrBD Algorithm 2 and Eq. 4: unlearn D_c, relearn D_p; what is left is the backdoor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CAP = 4.0  # of the unlearned cross-entropy: beyond it ascent only breaks the network (measured, docs/experiments.md)


def enhancement_loss(trusted: Tensor, labels: Tensor) -> Callable[[Tensor, object], Tensor]:
    r"""Eq. 4 as a loss for `training.run_epoch`.

    .. math:: \min_\theta \; \frac{1}{|D_p|}\sum_{D_p} L(f_\theta(x), y) - \frac{1}{|D_c|}\sum_{D_c} L(f_\theta(x), y)

    Args:
        trusted: (N,) bool, True for D_c.
        labels: (N,) int64.

    Returns:
        From logits (B, K) and indices (B,) to the loss.

    Deviation from the paper: the ascent on D_c stops at a cross-entropy of 4 per sample. Without a bound it wiped out
    the main task and Blend's backdoor together.
    """

    total, few = int((labels >= 0).sum()), int(trusted.sum())  # what cannot be read has no label
    ascent, descent = total / max(1, few), total / max(1, total - few)

    def loss(logits: Tensor, index: object) -> Tensor:
        rows = torch.as_tensor(index)
        chosen = trusted[rows].to(logits.device)
        each = F.cross_entropy(logits, labels[rows].to(logits.device), reduction="none")
        learn = each[~chosen].sum() * descent
        unlearn = each[chosen].clamp(max=CAP).sum() * ascent
        return (learn - unlearn) / len(each)

    return loss
