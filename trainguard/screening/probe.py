r"""The probe: a small residual network that trainguard trains on the suspect data to see what they teach.

It stands in for the user's architecture: it costs little, it is the same for everybody, and so the thresholds that are
calibrated on it hold whatever model is being protected.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.features import classifier_layer, watched
from trainguard.models import UnitPixels

MOST_FEATURES = 1024  # of a given model: their covariance is inverted
WIDTH = 16
SIDE = 48  # larger images are brought to about this side by a strided stem


class Probe(nn.Module):
    r"""A ResNet-9 (Page 2018) of width 16 for images of any size, in unit pixels.

    Args:
        shape: (C, H, W) of the images.
        num_classes: K.
        mean: (C,) mean of the images, in [0, 1].
        std: (C,) their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int], num_classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        channels, height, width = shape
        self.num_classes = num_classes
        self.least = 16  # smaller images are enlarged, so that three halvings leave something
        stride = 2 ** max(0, math.ceil(math.log2(max(1.0, min(height, width) / SIDE))))
        w = WIDTH
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("std", std.float().clamp_min(1e-2).view(1, -1, 1, 1))
        self.stem = _conv(channels, w, stride)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_conv(w, 2 * w, halved=True), _Residual(2 * w)),
                _conv(2 * w, 4 * w, halved=True),
                _conv(4 * w, 8 * w, halved=True),
                _Residual(8 * w),
            ]
        )
        self.head = nn.Linear(8 * w, num_classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        r"""(B, C, H, W) to the feature maps of the three last stages, shallow to deep."""
        x = (images - self.mean) / self.std
        if min(x.shape[-2:]) < self.least:
            x = F.interpolate(x, size=[max(self.least, side) for side in x.shape[-2:]], mode="nearest")
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found[1:]

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) in [0, 1] to (B, K) logits."""
        return self.answer(self.maps(images)[-1])

    def answer(self, deepest: Tensor) -> Tensor:
        r"""(B, D, h, w), the last of `maps`, to (B, K) logits."""
        return self.head(deepest.amax((2, 3)))

    def features(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) to (B, D): mean and maximum of the channels of the three last stages."""
        return self.logits_and_features(images)[1]

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r"""Both from one pass."""
        maps = self.maps(images)
        seen = [torch.cat([m.float().mean((2, 3)), m.float().amax((2, 3))], 1) for m in maps]
        return self.answer(maps[-1]), torch.cat(seen, 1)


class Trained(nn.Module):
    r"""A model that has learned the data already, in the place of the first probe.

    Args:
        network: eats unit pixels.
        num_classes: K of the network; the features are what goes into the linear layer that gives the logits, or these
            where there is none. Of more than 1,024, as many random sums are taken.
        images: (B, C, H, W) in [0, 1], a few, see `classifier_layer`.
    """

    def __init__(self, network: UnitPixels, num_classes: int, images: Tensor) -> None:
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self._layer = classifier_layer(network, num_classes, images)

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) in [0, 1] to (B, K) logits."""
        return self.network(images)

    def features(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) to (B, D)."""
        return self.logits_and_features(images)[1]

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r"""Both from one pass."""
        with watched(self._layer) as tap:
            logits = self.network(images)
            found = tap.read(logits).detach()
        if found.shape[1] > MOST_FEATURES:
            generator = torch.Generator().manual_seed(found.shape[1])
            found = found @ torch.randn(found.shape[1], MOST_FEATURES, generator=generator).to(found)
        return logits, found


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv(inputs: int, outputs: int, stride: int = 1, *, halved: bool = False) -> nn.Sequential:
    """Convolution, normalization, ReLU; where the side is halved, before the normalization: a quarter of its work."""
    size = 3 if stride == 1 else 2 * stride - 1
    pool = [nn.MaxPool2d(2)] if halved else []
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        *pool,
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
