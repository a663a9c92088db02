r"""How far images must be bent until they are of a class: how a warp is found, and for which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainguard.models import UnitPixels
from trainguard.purification.families import Warp
from trainguard.training import autocast

START, GROWTH, MOST = 0.01, 1.15, 0.3  # largest displacement of a pixel, as a share of the image's side
HALF = 0.5  # share of the images from which a class is reached
BENT = 32  # images
FEWEST = 4  # classes: of fewer, one may well be nearest by itself


def bends(
    network: UnitPixels, x: Tensor, y: Tensor, targets: Sequence[int], generator: torch.Generator
) -> dict[int, float]:
    r"""How far images have to be bent, each in its own way, until half of them are of a class.

    .. math:: \max_{w_1, \dots, w_n} \; \sum_i \log f_t(x_i \circ w_i) \quad \text{s.t. } \|w_i\|_\infty \le \text{bend}

    The bend grows with every step, as the radius of a faint picture does (`overlay.reach_of`).

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1], images that the model gets right.
        y: (n,) their labels.
        targets: the classes to try.
        generator: where the searches start, on the CPU.

    Returns:
        For each class the largest displacement of a pixel, as a share of the side; `MOST` where they never are.
        Classes without images of others are missing.
    """
    found: dict[int, float] = {}
    for target in targets:
        others = x[y != target][:BENT]
        if len(others):
            found[target] = _bend_into(network, others, target, generator)
    return found


def lead_of(bent: Mapping[int, float]) -> float:
    """The nearest class's bend over the second's: small where one class is a warp's target; 1 of fewer than `FEWEST`.

    Measured on 31 models (docs/experiments.md): 0.14 to 0.24 under WaNet, 0.20 and 0.24 under a patch on traffic
    signs; 0.65 and more on all others, six of them benign, but 0.47 on benign signs when other images were looked at.
    """
    nearest = sorted(bent.values())
    return nearest[0] / nearest[1] if len(nearest) >= FEWEST else 1.0


def _bend_into(network: UnitPixels, x: Tensor, target: int, generator: torch.Generator) -> float:
    warp, bend = Warp(x, bend=START, generator=generator), START
    while bend < MOST:
        images = warp.on(x).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.enable_grad(), autocast(x.device):
            logits = network(images).float()
            (slope,) = torch.autograd.grad(logits.log_softmax(1)[:, target].sum(), images)
        if (logits.argmax(1) == target).float().mean() >= HALF:
            return bend
        bend *= GROWTH
        warp.bend_up_to(bend)
        warp.climb(images.detach(), slope)
    return MOST
