r"""One small patch that breaks a model on every image: how a visible trigger is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainguard.models import UnitPixels, device_of
from trainguard.perturbation import frozen
from trainguard.training import autocast

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore

AREA = 0.006  # of an image, for a patch. A trigger does its work in a few pixels, anything else needs more of them
BREAKS = 0.35  # share of predictions changed from which a patch is worth unlearning; benign 0.3 at most at 32 pixels
SEARCHED = 1000  # images that patches and overlays are looked for on, at most
EACH = 12  # images of a class in a batch, where each class has a patch of its own
STEPS = 150  # of a search; they leave nothing to gain on a 50,000 parameter network of 8 pixel digits
PENALTY = 5.0  # weight of the area beyond what is allowed, against a loss of the order of one


class Worn(Protocol):
    """What can be put on images."""

    def on(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] with it."""

    def to(self, device: torch.device | str) -> Worn:
        """The same on a device."""

    def followed(self, network: UnitPixels, x: Tensor, y: Tensor, generator: torch.Generator) -> Worn:
        """What has become of it on a network that is being fine-tuned, seen on one batch."""


@dataclass(frozen=True)
class Patch:
    """Some pixels and the values they are given; or those of G groups of images.

    Attributes:
        mask: (H, W) float32 of 0 and 1; or (G, H, W).
        pattern: (C, H, W) float32 in [0, 1], or (G, C, H, W); what it says outside the mask has no meaning.
    """

    mask: Tensor
    pattern: Tensor

    def of(self, groups: Tensor) -> Patch:
        """For each of B images that of its group, to be put on all of them at once."""
        return Patch(self.mask[groups, None], self.pattern[groups])

    def on(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] with the patch put on."""
        return x * (1 - self.mask) + self.pattern * self.mask

    def to(self, device: torch.device | str) -> Patch:
        """The same patch on a device."""
        return Patch(self.mask.to(device), self.pattern.to(device))

    def followed(self, network: UnitPixels, x: Tensor, y: Tensor, generator: torch.Generator) -> Patch:
        """The same patch: its pixels are chosen once."""
        return self


def universal_patch(
    network: UnitPixels,
    x: Tensor,
    y: Tensor,
    *,
    pixels: int,
    steps: int = STEPS,
    batch_size: int = 64,
    lr: float = 0.2,
    generator: torch.Generator,
    groups: Tensor | None = None,
    besides: int | None = None,
) -> Patch:
    r"""Look for the few pixels which, given the same values on every image, change the most predictions.

    .. math:: \max_{m, p} \; \mathbb{E}_{(x, y)} \log\bigl(1 - f_y(x (1 - m) + p \, m)\bigr) \quad
              \text{s.t. } \|m\|_1 \le \text{pixels}

    An untargeted attack like PBE's (Eq. 4), over one perturbation for all images and in the norm that counts pixels.
    A visible trigger is far from every image in the L-inf ball of Eq. 6, so that single adversarial examples miss
    it; it is the best answer here. Untargeted, because one search then serves all classes, and all-to-all backdoors
    as well.

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1], images that the model gets right.
        y: (n,) their labels.
        pixels: how many may be changed.
        steps: of Adam.
        batch_size: images per step.
        lr: of Adam, on the logits of mask and pattern.
        generator: where the search starts and which images come when, on the CPU.
        groups: (n,) from 0, to look for a patch of its own for each group of images, all at once; None for one patch.
        besides: a class that images are not to be led into.

    Returns:
        The patch, with exactly `pixels` pixels: those whose mask ended highest; or those of all groups.

    Deviation from the paper: not in it. The search for mask and pattern is Neural Cleanse's (Wang et al. 2019),
    there once per class and for the smallest mask; here for a mask of given size and once.
    """
    height, width = x.shape[2:]
    several = () if groups is None else (int(groups.max()) + 1,)
    mask = (torch.randn(*several, height, width, generator=generator) - 2).to(x.device).requires_grad_()
    pattern = torch.randn(*several, *x.shape[1:], generator=generator).to(x.device).requires_grad_()
    optimizer = torch.optim.Adam([mask, pattern], lr=lr, betas=(0.5, 0.9))
    for _ in range(steps):
        index = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator).to(x.device)
        soft = Patch(mask.sigmoid(), pattern.sigmoid())
        worn = soft if groups is None else soft.of(groups[index])
        with autocast(x.device):
            logits = network(worn.on(x[index])).float()
        others = logits.scatter(1, y[index, None], -torch.inf)
        if besides is not None:
            others[:, besides] = -torch.inf
        loss = (logits.logsumexp(dim=1) - others.logsumexp(dim=1)).mean()  # -log(1 - f_y), without underflow
        loss = loss + PENALTY * F.relu(soft.mask.sum((-2, -1)) / pixels - 1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    highest = mask.detach().flatten(-2).topk(min(pixels, height * width)).indices
    chosen = torch.zeros(*several, height * width, device=x.device).scatter_(-1, highest, 1)
    return Patch(chosen.view(mask.shape), pattern.detach().sigmoid())


@torch.no_grad()
def changed_by(network: UnitPixels, patch: Patch, x: Tensor, y: Tensor, besides: int | None = None) -> float:
    """Share of images whose predicted class is no longer their label under a patch, in [0, 1]; arguments as above."""
    wrong = 0
    for images, labels in zip(x.split(512), y.split(512), strict=True):
        with autocast(x.device):
            said = network(patch.on(images)).argmax(1)
        wrong += int(((said != labels) & (said != (labels if besides is None else besides))).sum())
    return wrong / len(x)


def best_patch(
    network: UnitPixels,
    x: Tensor,
    y: Tensor,
    *,
    starts: int = 4,
    generator: torch.Generator,
    besides: int | None = None,
) -> Patch:
    """The patch of the audit's size that changes the most predictions, of several searches.

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        starts: how many searches. From one start, the trigger of one BadNets in three was missed.
        generator: where they start and which images come when, on the CPU.
        besides: a class that images are not to be led into.
    """
    patches = _searched(network, x, y, starts, generator, besides)
    return max(patches, key=lambda patch: changed_by(network, patch, x, y, besides))


def own_patches(
    network: UnitPixels, x: Tensor, y: Tensor, groups: Tensor, *, starts: int = 2, generator: torch.Generator
) -> list[Patch]:
    """A patch of the audit's size for each group of images alone, of several searches all that were found.

    A trigger that works on one class's images is missed where all images have to be changed (TaCT, Tang et al. 2021).

    Args:
        network: in unit pixels, held by `frozen`.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        groups: (n,) from 0, the classes that are tried.
        starts: how many searches.
        generator: where they start and which images come when, on the CPU.
    """
    pixels, size = patch_area(*x.shape[2:]), EACH * (int(groups.max()) + 1)
    return [
        universal_patch(network, x, y, pixels=pixels, steps=STEPS, batch_size=size, generator=generator, groups=groups)
        for _ in range(starts)
    ]


def breaking_patches(
    network: UnitPixels, store: ImageStore, index: NDArray[np.int64], *, starts: int, seed: int
) -> list[Patch]:
    """All patches, on the CPU, that change at least `BREAKS` of the predictions, of several searches.

    Args:
        network: in unit pixels and eval mode.
        store: where the images are.
        index: (n,) the images to look on, see `known_images`.
        starts: how many searches.
        seed: of the choice and of where they start.
    """
    with frozen(network):
        x, y = known_images(network, store, index, seed)
        if not len(x):
            return []
        patches = _searched(network, x, y, starts, torch.Generator().manual_seed(seed))
        return [patch.to("cpu") for patch in patches if changed_by(network, patch, x, y) >= BREAKS]


@torch.no_grad()
def known_images(network: UnitPixels, store: ImageStore, index: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
    """Of a thousand of the indexed images those that the model gets right: (n, C, H, W) in [0, 1], labels (n,)."""
    device = device_of(network)
    index = np.sort(np.random.default_rng(seed).permutation(index)[:SEARCHED])
    x, y = store.batch(index, device), torch.from_numpy(store.labels[index]).to(device)
    with autocast(device):
        right = torch.cat([network(part).argmax(1) for part in x.split(512)]) == y
    return x[right], y[right]


def _searched(
    network: UnitPixels, x: Tensor, y: Tensor, starts: int, generator: torch.Generator, besides: int | None = None
) -> list[Patch]:
    pixels = patch_area(*x.shape[2:])
    return [
        universal_patch(network, x, y, pixels=pixels, steps=STEPS, generator=generator, besides=besides)
        for _ in range(starts)
    ]


def patch_area(height: int, width: int) -> int:
    """How many pixels a patch may have: 0.6% of the image, and no fewer than four."""
    return max(4, int(np.ceil(AREA * height * width)))
