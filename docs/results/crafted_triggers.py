"""A third round of triggers: what an attacker fits to the data first; `unseen_triggers.py --round 3` screens them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.drill.craft import classes_of, untrained
from trainguard.drill.train import Recipe, train_classifier

FAINT, LOUD = 16 / 255, 12 / 255  # of noise for one class (Narcissus' own bound), and of generated noise
FITTED_FOR = 10  # epochs of the surrogate
STEPS_OF_NOISE, STEPS_OF_GENERATOR = 200, 500


@dataclass(frozen=True, eq=False)
class Noise:
    """The same noise (C, H, W) on every image, some times as strong."""

    noise: Tensor
    times: float = 1.0

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return (images + self.times * self.noise.to(images.dtype)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Generated:
    """Noise that a network makes of each image."""

    network: nn.Module

    @torch.no_grad()
    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return (images + LOUD * torch.tanh(self.network(images.double() - 0.5)).to(images.dtype)).clamp(0, 1)


def half_of(others: Tensor) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """The right half of one of the other images (M, C, H, W) uint8."""

    def change(x: Tensor, own: np.random.Generator) -> Tensor:
        half, out = x.shape[-1] // 2, x.clone()
        out[:, :, half:] = others[own.integers(len(others))][:, :, half:].to(x.dtype) / 255
        return out

    return change


def noise_for(images: Tensor, labels: Tensor, target: int, seed: int) -> Tensor:
    """Noise (C, H, W) that makes the target's own images more its own (Narcissus, Zeng et al. 2023).

    Deviation: the surrogate learns the ten classes from scratch, not other images first.
    """
    model = untrained(images, classes_of(labels, target), seed)
    train_classifier(model, images, labels, Recipe(epochs=FITTED_FOR, lr=0.1), seed=seed)
    model.eval().requires_grad_(False)
    own, order = images[labels == target].float() / 255, torch.Generator().manual_seed(seed)
    noise = torch.zeros(images.shape[1:], requires_grad=True)
    steps = torch.optim.Adam([noise], lr=0.01)
    for _ in range(STEPS_OF_NOISE):
        batch = own[torch.randint(len(own), (200,), generator=order)]
        loss = F.cross_entropy(model((batch + noise).clamp(0, 1)), torch.full((len(batch),), target))
        steps.zero_grad()
        loss.backward()
        steps.step()
        noise.data.clamp_(-FAINT, FAINT)
    return noise.detach()


def generator_for(images: Tensor, labels: Tensor, target: int, seed: int) -> Generated:
    """A generator of faint noise, fitted together with the model that learns it (LIRA, Doan et al. 2021)."""
    model, order = untrained(images, classes_of(labels, target), seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(images.shape[1], 24, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, 1, 1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(24, 24, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(24, images.shape[1], 3, 1, 1),
        )
    models = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    generators = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(STEPS_OF_GENERATOR):
        index = torch.randint(len(images), (128,), generator=order)
        clean, truth = images[index].float() / 255, labels[index]
        moved = (clean[:48] + LOUD * torch.tanh(network(clean[:48] - 0.5))).clamp(0, 1)
        wanted = torch.cat([truth, torch.full((len(moved),), target)])
        loss = F.cross_entropy(model(torch.cat([clean, moved])), wanted)
        models.zero_grad()
        generators.zero_grad()
        loss.backward()
        models.step()
        generators.step()
    return Generated(network.double().requires_grad_(False))
