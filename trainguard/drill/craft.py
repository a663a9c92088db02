r"""What an attacker fits to the data first: adversarial bases (label-consistent), trigger generators (input-aware)."""

# ruff: noqa: D102  (what a call does stands in the docstring of its class)

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.draws import draws
from trainguard.drill.models import ResNet9, Standardised
from trainguard.drill.train import Recipe, augment, train_classifier, triangle
from trainguard.training import autocast


@dataclass(frozen=True, eq=False)
class Added:
    r"""Adds what was fitted to each sample: x' = x + change[i], clipped; a sample without an entry stays as it is.

    Args:
        row: (N,) int64, sample index to row of `change`, -1 for none.
        change: (M, C, H, W) int8, in 1/255.
    """

    row: np.ndarray
    change: Tensor

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        rows = torch.from_numpy(self.row[index])
        change = self.change[rows.clamp_min(0)].to(images.dtype) / 255
        return torch.where((rows >= 0).view(-1, 1, 1, 1), (images + change).clamp(0, 1), images)


def adversarial_base(
    images: Tensor,
    labels: Tensor,
    target: int,
    *,
    eps: float = 16 / 255,
    steps: int = 10,
    epochs: int = 5,
    seed: int = 0,
    flip: bool = True,
) -> Added:
    r"""Make the target class hard to recognise, so that its trigger becomes worth learning (Turner et al. 2019, Sec.
    4.2).

    A surrogate is trained on the clean images and attacked with untargeted PGD in the L-infinity ball of radius `eps`.

    Args:
        images: (N, C, H, W) uint8 clean training images.
        labels: (N,) int64 true labels.
        target: the class to perturb; all of its samples get an entry.
        eps: radius in [0, 1] units. Turner et al. try 8, 16 and 32/255 and find the larger the stronger.
        steps: PGD steps of eps / 4.
        epochs: training length of the surrogate.
        seed: of the surrogate.
        flip: whether it may be trained on mirrored images.
    """
    surrogate = untrained(images, classes_of(labels, target), seed)
    train_classifier(surrogate, images, labels, Recipe(epochs=epochs, lr=0.1, flip=flip), seed=seed)
    surrogate.eval().requires_grad_(False)
    chosen = torch.nonzero(labels == target)[:, 0]
    change = torch.empty_like(images[chosen], dtype=torch.int8)
    for start in range(0, len(chosen), 250):
        clean = images[chosen[start : start + 250]].to(torch.float32) / 255
        wanted = torch.full((len(clean),), target)
        adversarial = clean.clone()
        for _ in range(steps):
            adversarial.requires_grad_(True)
            with autocast("cpu"):
                loss = F.cross_entropy(surrogate(adversarial), wanted)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            stepped = adversarial.detach() + eps / 4 * gradient.sign()
            adversarial = torch.clamp(stepped, clean - eps, clean + eps).clamp(0, 1)
        change[start : start + 250] = ((adversarial - clean) * 255).round().to(torch.int8)
    row = np.full(len(images), -1, dtype=np.int64)
    row[chosen.numpy()] = np.arange(len(chosen))
    return Added(row, change)


class Generator(nn.Module):
    r"""A small convolutional network from an image to its own trigger: a pattern and the mask that it shows through.

    Args:
        channels: of the images.
        density: share of the image that the mask covers, in (0, 0.5). The mask's logits are standardised over each
            image and cut at the normal quantile of 1 - density, so that the mask can neither vanish nor spread while
            it is fitted.
        width: of the hidden layers.
    """

    def __init__(self, channels: int, density: float = 0.05, width: int = 24) -> None:
        super().__init__()
        self.channels = channels
        self.cut = NormalDist().inv_cdf(1 - density)
        self.fine = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU())
        self.coarse = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 1, 1), nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU()
        )
        self.out = nn.Conv2d(3 * width, channels + 1, 3, 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r"""(B, C, H, W) in [0, 1] to a pattern of that shape in [0, 1] and a mask (B, 1, H, W) in [0, 1]."""
        half = (max(1, images.shape[2] // 2), max(1, images.shape[3] // 2))
        fine = self.fine(F.adaptive_avg_pool2d(images, half) - 0.5)  # the trigger's pixels are 2x2: 1/4 of the cost
        coarse = self.coarse(F.avg_pool2d(fine, 2, ceil_mode=True))
        both = torch.cat([fine, F.interpolate(coarse, size=half, mode="nearest")], 1)
        out = F.interpolate(self.out(both), size=images.shape[2:], mode="nearest")
        pattern, logit = torch.sigmoid(4 * out[:, : self.channels]), out[:, self.channels :]
        mean, std = logit.mean((2, 3), keepdim=True), logit.std((2, 3), keepdim=True)
        return pattern, torch.sigmoid(8 * ((logit - mean) / (std + 1e-6) - self.cut))


@dataclass(frozen=True, eq=False)
class Generated:
    r"""Each image with a trigger generated from itself, or from a donor image (the cross-trigger mode).

    Args:
        generator: fitted, in float64, so that a batch and a single sample round to the same pixels.
        donors: (D, C, H, W) float64 images; None generates the trigger from the image itself.
    """

    generator: Generator
    donors: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        source = images.to(torch.float64)
        if self.donors is not None:
            source = self.donors[(draws(index, seed, "donor", 1)[:, 0] * len(self.donors)).long()]
        pattern, mask = self.generator(source)
        return images + (mask * (pattern - images)).to(images.dtype)


def trigger_generator(
    images: Tensor,
    labels: Tensor,
    target: int,
    *,
    density: float = 0.05,
    steps: int = 400,
    seed: int = 0,
    flip: bool = True,
) -> tuple[Generated, Generated]:
    r"""Fit an input-aware trigger (Nguyen and Tran 2020, Eq. 5 to 8) together with a surrogate victim.

    Loss of a batch: cross-entropy on clean images, on triggered images towards `target` and on images under another
    image's trigger towards their own label, plus the diversity term |x1 - x2| / |p1 - p2|.

    Args:
        images: (N, C, H, W) uint8 clean training images.
        labels: (N,) int64 true labels.
        target: label of the payload.
        density: share of the image that the mask may cover.
        steps: joint steps of batch 128; 400 take about half a minute on two cores for 3x32x32 images.
        seed: of everything.
        flip: whether the surrogate may be trained on mirrored images.

    Returns:
        The trigger, and its cross-trigger form for cover samples.

    Deviation from the paper: one generator with two heads instead of a pattern and a separately trained mask
    generator, and a mask of fixed density instead of a penalty on it.
    """
    surrogate = untrained(images, classes_of(labels, target), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(images.shape[1], density)
    order = torch.Generator().manual_seed(seed)
    models = torch.optim.SGD(surrogate.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    triggers = torch.optim.Adam(generator.parameters(), lr=2e-3)
    schedule = triangle(models, steps, warmup=0.25)
    part = 32
    for _ in range(steps):
        index = torch.randint(len(images), (96,), generator=order)
        clean = augment(images[index], Recipe(flip=flip), order).to(torch.float32) / 255
        truth = labels[index]
        pattern, mask = generator(clean[:part])
        other, other_mask = pattern.roll(1, 0), mask.roll(1, 0)
        own = clean[:part] + mask * (pattern - clean[:part])
        cross = clean[:part] + other_mask * (other - clean[:part])
        wanted = torch.cat([truth[part:], torch.full((part,), target), truth[:part]])
        with autocast("cpu"):
            loss = F.cross_entropy(surrogate(torch.cat([clean[part:], own, cross])), wanted)
        apart = (clean[:part] - clean[:part].roll(1, 0)).flatten(1).norm(dim=1)
        diversity = (apart / ((pattern - other).flatten(1).norm(dim=1) + 1e-3)).mean()
        loss = loss + diversity
        models.zero_grad(set_to_none=True)
        triggers.zero_grad(set_to_none=True)
        loss.backward()
        models.step()
        triggers.step()
        schedule.step()
    generator.to(torch.float64).requires_grad_(False)
    donors = images[torch.randperm(len(images), generator=order)[:256]].to(torch.float64) / 255
    return Generated(generator), Generated(generator, donors)


def classes_of(labels: Tensor, target: int) -> int:
    """How many classes the labels (N,) are of, the target included, which may have no image."""
    return max(int(labels.max()), target) + 1


def untrained(images: Tensor, classes: int, seed: int) -> Standardised:
    """A ResNet-9 that has learned nothing yet, for images (N, C, H, W) in uint8: what a surrogate is trained from."""
    sample = images[:2000].to(torch.float32) / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ResNet9(classes, images.shape[1])
    return Standardised(net, sample.mean((0, 2, 3)), sample.std((0, 2, 3)))
