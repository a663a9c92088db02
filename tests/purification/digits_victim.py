"""A small classifier of handwritten digits with a blended backdoor."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainguard.data.pixels import PixelRange
from trainguard.data.store import ImageStore

MEAN, STD, TARGET = 0.3, 0.35, 3
RANGE = PixelRange.from_mean_std((MEAN,), (STD,))


@dataclass
class Victim:
    model: nn.Module
    store: ImageStore
    poisoned: np.ndarray
    test: Tensor
    test_labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        return float((predict(model, self.test) == self.test_labels).float().mean())

    def success(self, model: nn.Module) -> float:
        others = self.test_labels != TARGET
        return float((predict(model, triggered(self.test[others])) == TARGET).float().mean())


def triggered(images: Tensor) -> Tensor:
    """Blend with a fixed noise image, one fifth of it; (N, 1, 8, 8) in [0, 1]."""
    noise = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(9)) / 255
    return 0.8 * images + 0.2 * noise


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model((images - MEAN) / STD).argmax(1)


def small_net(width: int = 8) -> nn.Sequential:
    def block(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

    body = [*block(1, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
