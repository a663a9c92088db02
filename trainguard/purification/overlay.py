r"""One faint picture for all images that leads to one class: how a blended trigger is found, and for which class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainguard.models import UnitPixels
from trainguard.perturbation import Norm, frozen, untargeted
from trainguard.purification.universal import known_images
from trainguard.training import autocast

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore

START, GROWTH, MOST = 0.006, 1.04, 0.6  # of the search's radius, root mean square per value in [0, 1]
REACHED, LAST = 0.9, 4  # share of the images of the last batches from which an overlay has reached its class
NEAR = 0.61  # reach of a target over the median class's: 0.19 to 0.59; of any other class 0.66 and more
TRIED = 10  # classes at most: those that single adversarial examples fall into most
FEWEST = 3  # classes: of two, any overlay that leads out of the one leads to the other
STEPS = 60
BATCH = 64


@dataclass(frozen=True)
class Overlay:
    """What is added to an image.

    Attributes:
        picture: (C, H, W) float32.
        target: the class that it leads to.
        radius: the most that the root mean square of its values may be.
    """

    picture: Tensor
    target: int
    radius: float

    def on(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] under the overlay."""
        return (x + self.picture).clamp(0, 1)

    def to(self, device: torch.device | str) -> Overlay:
        """The same overlay on a device."""
        return replace(self, picture=self.picture.to(device))

    def followed(self, network: UnitPixels, x: Tensor, y: Tensor, generator: torch.Generator) -> Overlay:
        """The overlay one step of its search later, for the network as it is now: what is left of a trigger, it finds.

        Args:
            network: in unit pixels, in any mode, and as before when the call returns.
            x: (B, C, H, W) in [0, 1].
            y: (B,) labels; images of the target say nothing.
            generator: which of the images count, on the CPU.
        """
        others = x[y != self.target]
        if not len(others):
            return self
        with frozen(network):
            picture, _ = _step(network, others, self.picture, self.target, self.radius, generator)
        return replace(self, picture=picture)


def universal_overlay(
    network: UnitPixels, x: Tensor, *, target: int, radius: float, steps: int = STEPS, generator: torch.Generator
) -> Overlay:
    r"""Look for one overlay that makes a class of every image.

    .. math:: \max_{\delta} \; \mathbb{E}_x \log f_t(x + \delta) \quad
              \text{s.t. } \|\delta\|_2 \le \text{radius} \sqrt{C H W}

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1], images of other classes.
        target: the class.
        radius: root mean square of the overlay's values.
        steps: of gradient ascent, each of a quarter of the way out.
        generator: where the search starts and which images come when, on the CPU.

    Deviation from the paper: PBE's adversarial examples (Eq. 4) are one for each image and untargeted; the universal
    perturbation is Moosavi-Dezfooli et al.'s (2017). What all images need is what a trigger is.
    """
    delta = START * torch.randn(x.shape[1:], generator=generator).to(x.device)
    for _ in range(steps):
        delta, _ = _step(network, x, delta, target, radius, generator)
    return Overlay(delta, target, radius)


def reach_of(network: UnitPixels, x: Tensor, *, target: int, generator: torch.Generator) -> float:
    """The radius, about, of the faintest overlay that makes a class of nearly all images; arguments as above.

    The radius grows with every step, and the first one that does is given; `MOST` where none does.
    """
    delta, radius, shares = torch.zeros_like(x[0]), START, [0.0] * LAST
    while radius < MOST:
        delta, share = _step(network, x, delta, target, radius, generator)
        shares = [*shares[1:], share]
        if sum(shares) >= REACHED * LAST:
            return radius
        radius *= GROWTH
    return MOST


def _step(
    network: UnitPixels, x: Tensor, delta: Tensor, target: int, radius: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The overlay after one step on one batch, and the share of that batch that it had moved before."""
    index = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
    delta = delta.detach().requires_grad_()
    with autocast(x.device):
        logits = network((x[index] + delta).clamp(0, 1)).float()
    loss = F.cross_entropy(logits, torch.full((len(index),), target, device=x.device))
    (slope,) = torch.autograd.grad(loss, delta)
    with torch.no_grad():
        most = radius * delta.numel() ** 0.5
        delta = delta - most / 4 * slope / (slope.norm() + 1e-12)
        delta = delta * (most / (delta.norm() + 1e-12)).clamp(max=1)
    return delta.detach(), float((logits.argmax(1) == target).float().mean())


def reaches(
    network: UnitPixels, x: Tensor, y: Tensor, eps: float, norm: Norm, generator: torch.Generator
) -> dict[int, float]:
    """For the likeliest classes the radius of the faintest overlay that leads to them; none where there are but two.

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1], images that the model gets right.
        y: (n,) their labels.
        eps: radius at which single adversarial examples work, see `fitting_radius`.
        norm: theirs.
        generator: as in `universal_overlay`.
    """
    likely = _likely(network, x, y, eps, norm) if len(x) else []
    return {t: reach_of(network, x[y != t], target=t, generator=generator) for t in likely if (y != t).any()}


def usual_of(reached: Mapping[int, float]) -> float:
    """The median class's radius; 1 where none was tried."""
    return float(np.median(list(reached.values()))) if reached else 1.0


def near_of(reached: Mapping[int, float]) -> list[int]:
    """The classes, nearest first, that a far fainter overlay reaches than the median class, as a trigger's target is.

    Measured on 25 models, 6 benign: the target of a patch, a picture, a smooth pattern, and each of two targets lie at
    0.19 to 0.59 of the median radius; any other class, and all of a benign model, at 0.66 or more. What works on one
    source class or differs from image to image (TaCT, WaNet, input-aware), and SIG, is not seen.
    """
    usual = usual_of(reached)
    return sorted((t for t, radius in reached.items() if radius < NEAR * usual), key=lambda t: reached[t])


def leading_overlays(
    network: UnitPixels,
    store: ImageStore,
    index: NDArray[np.int64],
    eps: float,
    norm: Norm,
    *,
    starts: int,
    seed: int,
    faint: bool = False,
) -> dict[int, list[Overlay]]:
    """Overlays, on the CPU, for each class that is far nearer than others: as strong as others need them.

    Args:
        network: in unit pixels and eval mode.
        store: where the images are.
        index: (n,) the images to look on; see `known_images`.
        eps: see `reaches`.
        norm: likewise.
        starts: how many overlays per class.
        seed: of the choice and of where the searches start.
        faint: only as strong as makes the class a near one.
    """
    with frozen(network):
        x, y = known_images(network, store, index, seed)
        generator = torch.Generator().manual_seed(seed)
        reached = reaches(network, x, y, eps, norm, generator)
        radius = usual_of(reached) * (NEAR if faint else 1.0)
        return {
            target: [
                universal_overlay(network, x[y != target], target=target, radius=radius, generator=generator).to("cpu")
                for _ in range(starts)
            ]
            for target in near_of(reached)
        }


def _likely(network: UnitPixels, x: Tensor, y: Tensor, eps: float, norm: Norm) -> list[int]:
    """The classes to try for images (n, C, H, W) with labels (n,)."""
    fallen: list[Tensor] = []
    with autocast(x.device):
        for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            moved = untargeted(network, images, labels, eps=eps, norm=norm)
            with torch.no_grad():
                logits = network(moved)
            answers = logits.argmax(1)
            fallen.append(torch.bincount(answers[answers != labels], minlength=logits.shape[1]))
    often = torch.stack(fallen).sum(0)
    return often.argsort(descending=True, stable=True)[:TRIED].tolist() if len(often) >= FEWEST else []
