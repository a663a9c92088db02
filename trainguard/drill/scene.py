r"""A poisoned data set in memory, and how victims are trained on it: what all cells of one attack and seed share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainguard.drill.images import Images
from trainguard.drill.models import Standardised, build
from trainguard.drill.poison import Attack, fitted, poison_arrays
from trainguard.drill.train import Recipe, train_classifier
from trainguard.errors import StateError
from trainguard.files import write_for_torch
from trainguard.rng import isolated_rng

Tick = Callable[[int], None]  # called with the number of images trained on, after each epoch


@dataclass(frozen=True)
class Victim:
    r"""How every model of a drill is trained.

    Args:
        model: name for `models.build`.
        recipe: optimiser, schedule and augmentation.
        device: where.
        budget: see `trainguard.Guard`.
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

    def train(
        self,
        model: nn.Module,
        keep: np.ndarray,
        labels: Tensor,
        tick: Tick,
        *,
        late: Path | None = None,
        begun: Mapping[str, Any] | None = None,
    ) -> float:
        r"""Train `model` in place by the victim's recipe.

        Args:
            model: on the victim's device.
            keep: positions of the images to train on.
            labels: (N,) of all images.
            tick: see `Tick`.
            late: a file to keep the training in as it is before its last epochs, see `Recipe.late` and `begun_in`.
            begun: such a training, to go on from with these images.

        Returns:
            The seconds it took; of one that goes on, without those before.
        """
        start = time.perf_counter()
        rows = torch.from_numpy(keep)

        def kept(training: dict[str, Any]) -> None:
            assert late is not None
            write_for_torch(late, {**training, "seconds": time.perf_counter() - start})

        train_classifier(
            model,
            self.images[rows],
            labels[rows],
            self.victim.recipe,
            seed=self.seed,
            device=self.victim.device,
            on_epoch=lambda *_: tick(len(keep)),
            on_late=None if late is None else kept,
            begun=begun,
        )
        return time.perf_counter() - start


def begun_in(late: Path) -> dict[str, Any]:
    r"""The training that `Scene.train` kept in a file: `epochs`, `weights`, `optimizer` and `seconds`.

    Raises:
        StateError: there is none.
    """
    if not late.is_file():
        raise StateError(
            f"{late} is missing: relabelling goes on from there, and versions before this one did not keep it; remove "
            f"the folder {late.parent}, so that its training is done again"
        )
    return torch.load(late, map_location="cpu", weights_only=True)


class UnitImages(Dataset):
    r"""uint8 images and labels as the (float image in [0, 1], label) pairs that a training script would have."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i].to(torch.float32) / 255, int(self.labels[i])
