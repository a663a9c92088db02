r"""A poisoned data set in memory, and how victims are trained on it: what all cells of one attack and seed share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainguard.drill.images import Images
from trainguard.drill.models import Standardised, build
from trainguard.drill.poison import Attack, fitted, poison_arrays
from trainguard.drill.train import Recipe, train_classifier
from trainguard.rng import isolated_rng

Tick = Callable[[int], None]  # called with the number of images trained on, after each epoch


@dataclass(frozen=True)
class Victim:
    r"""How every model of a drill is trained.

    Args:
        model: name for `models.build`.
        recipe: optimiser, schedule and augmentation.
        device: where.
        budget: share of the training's cost that screening may spend.
    """

    model: str
    recipe: Recipe
    device: torch.device
    budget: float = 0.5


@dataclass(frozen=True, eq=False)
class Scene:
    r"""A poisoned copy of the data.

    Attributes:
        data: the clean data.
        attack: the fitted attack.
        images: (N, C, H, W) uint8 training images after poisoning.
        labels: (N,) int64 training labels after poisoning.
        role: (N,) int8, see `poison.Role`.
        victim: how models are trained.
        seed: of poison, initial weights, order and augmentation.
    """

    data: Images
    attack: Attack
    images: Tensor
    labels: Tensor
    role: np.ndarray
    victim: Victim
    seed: int

    @classmethod
    def make(cls, data: Images, attack: Attack, victim: Victim, seed: int) -> Scene:
        r"""Fit the attack where it needs that, and poison a copy of the training set."""
        ready = fitted(attack, data.train, data.train_labels, seed)
        images, labels, role = poison_arrays(data.train, data.train_labels, ready, seed)
        return cls(data, ready, images, labels, role.numpy(), victim, seed)

    def fresh_model(self) -> nn.Module:
        r"""The same initial weights for every cell, on the victim's device."""
        sample = self.images[:2000].to(torch.float32) / 255
        with isolated_rng(self.seed):
            net = build(self.victim.model, self.data.num_classes, self.images.shape[1], min(self.images.shape[2:]))
        return Standardised(net, sample.mean((0, 2, 3)), sample.std((0, 2, 3))).to(self.victim.device)

    def train(self, model: nn.Module, keep: np.ndarray, labels: Tensor, recipe: Recipe, tick: Tick) -> float:
        r"""Train `model` in place on the samples `keep` under `labels` (N,); returns the seconds it took."""
        start = time.perf_counter()
        rows = torch.from_numpy(keep)
        train_classifier(
            model,
            self.images[rows],
            labels[rows],
            recipe,
            seed=self.seed,
            device=self.victim.device,
            on_epoch=lambda *_: tick(len(keep)),
        )
        return time.perf_counter() - start


class UnitImages(Dataset):
    r"""uint8 images and labels as the (float image in [0, 1], label) pairs that a training script would have."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i].to(torch.float32) / 255, int(self.labels[i])
