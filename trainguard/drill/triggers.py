r"""Triggers: pure functions of pixels, (B, C, H, W) in [0, 1] to the same, before any augmentation.

Each is a frozen value with `trigger(images, index, seed)`. Only random ones look at `index` and `seed`: the same pair
gives the same pixels whatever the batch. Sizes are shares of the image side, so that one trigger fits 8x8 digits and
224x224 photographs; a warp alone moves points by as many pixels in any of them, as in its paper.
"""

# ruff: noqa: D102  (what a call does stands in the docstring of its class)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainguard.draws import draws
from trainguard.drill import pictures

Corner = Literal["top left", "top right", "bottom left", "bottom right"]
CORNERS: tuple[Corner, ...] = ("top left", "top right", "bottom left", "bottom right")


class Trigger(Protocol):
    r"""What a rule does to pixels.

    Args:
        images: (B, C, H, W) float in [0, 1]; not changed.
        index: (B,) int64 sample indices.
        seed: seed of the poisoning.

    Returns:
        (B, C, H, W) of the same dtype, in [0, 1].
    """

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Patch:
    r"""A picture laid over one corner: x' = (1 - opacity m) x + opacity m p.

    Args:
        picture: (4, h, w) RGBA in [0, 1]; the alpha plane is the mask.
        side: side of the patch as a share of the shorter image side; at least two pixels.
        corner: where it lies, flush with both edges.
        opacity: in (0, 1].
    """

    picture: Tensor
    side: float = 3 / 32
    corner: Corner = "bottom right"
    opacity: float = 1.0

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        _, channels, height, width = images.shape
        size = min(max(2, round(self.side * min(height, width))), height, width)
        colour, mask = pictures.fit(self.picture, channels, size, size)
        rows = slice(0, size) if self.corner.startswith("top") else slice(height - size, height)
        columns = slice(0, size) if self.corner.endswith("left") else slice(width - size, width)
        out = images.clone()
        out[:, :, rows, columns] = _over(images[:, :, rows, columns], colour, self.opacity * mask)
        return out


@dataclass(frozen=True, eq=False)
class Blend:
    r"""A picture over the whole image: x' = (1 - alpha m) x + alpha m p (Chen et al. 2017, Sec. 4.2)."""

    picture: Tensor
    alpha: float = 0.2

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        colour, mask = pictures.fit(self.picture, *images.shape[1:])
        return _over(images, colour, self.alpha * mask)


@dataclass(frozen=True)
class Sinusoid:
    r"""Stripes: v(i, j) = amplitude sin(2 pi frequency (j cos a + i sin a) / W), added and clipped (Barni et al. 2019).

    Args:
        amplitude: largest change of a pixel, in [0, 1] units.
        frequency: stripes across the image.
        angle: a, in radians; 0 gives the vertical stripes of the paper (Sec. 3.2).
    """

    amplitude: float = 40 / 255
    frequency: float = 6
    angle: float = 0.0

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        height, width = images.shape[2:]
        row, column = torch.arange(height, dtype=images.dtype)[:, None], torch.arange(width, dtype=images.dtype)[None]
        phase = (column * math.cos(self.angle) + row * math.sin(self.angle)) / width
        return (images + self.amplitude * torch.sin(2 * torch.pi * self.frequency * phase)).clamp(0, 1)


@dataclass(frozen=True)
class Waves:
    r"""A smooth additive pattern: a random sum of the lowest `order` x `order` cosines, scaled to peak at `amplitude`.

    Args:
        amplitude: largest change of a pixel, in [0, 1] units.
        order: number of cosine frequencies along each axis, at least 2; the constant is left out.
        field: seed of the pattern itself.

    Raises:
        ValueError: an order that leaves nothing but the constant.
    """

    amplitude: float
    order: int = 4
    field: int = 0

    def __post_init__(self) -> None:
        if self.order < 2:
            raise ValueError(f"expected an order of at least 2, got {self.order}: the first cosine is constant")

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        _, channels, height, width = images.shape
        count = channels * self.order * self.order
        weight = draws(np.arange(count), self.field, "waves", 1).view(channels, self.order, self.order) * 2 - 1
        weight[:, 0, 0] = 0
        rows, columns = _cosines(self.order, height), _cosines(self.order, width)
        pattern = torch.einsum("cuv,uh,vw->chw", weight, rows, columns)
        pattern = pattern * (self.amplitude / pattern.abs().amax())
        return (images + pattern.to(images.dtype)).clamp(0, 1)


@dataclass(frozen=True)
class Checkerboard:
    r"""An additive checkerboard of +amplitude and -amplitude.

    Args:
        amplitude: change of a pixel, in [0, 1] units.
        cells: cells along the image side, at most one a pixel.
    """

    amplitude: float
    cells: int = 32

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        height, width = images.shape[2:]
        cells = min(self.cells, height, width)
        row = (torch.arange(height) * cells).div(height, rounding_mode="floor")
        column = (torch.arange(width) * cells).div(width, rounding_mode="floor")
        sign = 1 - 2 * (row[:, None] + column[None, :]).remainder(2)
        return (images + self.amplitude * sign.to(images.dtype)).clamp(0, 1)


@dataclass(frozen=True)
class Warp:
    r"""A smooth elastic warp (Nguyen and Tran 2021, Eq. 2 to 5).

    Args:
        strength: s; the control grid moves its points by s/H (across: s/W) on average, in [-1, 1] coordinates: by s/2
            pixels, whatever the size of the image.
        points: k; control points along each side.
        field: seed of the warping field, which all samples share.
        noisy: add independent noise in [-1, 1]/H (across: /W) to every grid point, a new draw for each sample (the
            cover mode).
    """

    strength: float = 0.5
    points: int = 4
    field: int = 0
    noisy: bool = False

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        batch, _, height, width = images.shape
        control = (
            draws(np.arange(2 * self.points**2), self.field, "warp", 1).view(1, 2, self.points, self.points) * 2 - 1
        )
        control = control / control.abs().mean()
        flow = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        side = flow.new_tensor([width, height])
        grid = _identity(height, width) + self.strength * flow / side
        if self.noisy:
            noise = draws(index, seed, "warp noise", height * width * 2).view(batch, height, width, 2) * 2 - 1
            grid = grid + noise / side
        grid = grid.clamp(-1, 1).expand(batch, -1, -1, -1).to(images.dtype)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True).clamp(0, 1)


@dataclass(frozen=True)
class Physical:
    r"""What a camera does to a printed trigger: flip, rotate, shift, zoom, brighten, a new draw for each sample.

    Args:
        degrees: largest rotation either way.
        translate: largest shift, as a share of the side.
        zoom: largest relative change of scale.
        jitter: largest relative change of brightness and of contrast.
    """

    degrees: float = 10
    translate: float = 0.1
    zoom: float = 0.1
    jitter: float = 0.2

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        u = draws(index, seed, "physical", 7) * 2 - 1
        angle, scale = u[:, 0] * self.degrees * torch.pi / 180, 1 + u[:, 1] * self.zoom
        flip = torch.where(u[:, 2] < 0, -1.0, 1.0).to(u.dtype)
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        height, width = images.shape[2:]
        across, down = sin * (height / width), sin * (width / height)  # coordinates go from -1 to 1 on either side
        move = u[:, 3:5] * self.translate * 2
        theta = (
            torch.stack([cos * flip, -across, move[:, 0], down * flip, cos, move[:, 1]], 1)
            .view(-1, 2, 3)
            .to(images.dtype)
        )
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        out = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        gain, contrast = (1 + u[:, 5:7] * self.jitter).to(images.dtype).T.reshape(2, -1, 1, 1, 1)
        mean = out.mean((1, 2, 3), keepdim=True)
        return (((out - mean) * contrast + mean) * gain).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Chain:
    r"""Several triggers, one after the other."""

    parts: tuple[Trigger, ...]

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        for part in self.parts:
            images = part(images, index, seed)
        return images


@dataclass(frozen=True, eq=False)
class OneOf:
    r"""One of several triggers, drawn for each sample (Adaptive-Patch, Qi et al. 2023, Sec. 4.2)."""

    parts: tuple[Trigger, ...]

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        choice = (draws(index, seed, "one of", 1)[:, 0] * len(self.parts)).long()
        out = images.clone()
        for k, part in enumerate(self.parts):
            rows = torch.nonzero(choice == k)[:, 0]
            if len(rows):
                out[rows] = part(images[rows], index[rows.numpy()], seed)
        return out


@dataclass(frozen=True, eq=False)
class Pieces:
    r"""A trigger shown only in some cells of a grid, drawn for each sample (Adaptive-Blend, Qi et al. 2023, Sec. 4.2).

    Args:
        whole: the full trigger.
        grid: rows and columns of cells.
        shown: how many cells show the trigger.
    """

    whole: Trigger
    grid: tuple[int, int] = (4, 4)
    shown: int = 8

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        batch, _, height, width = images.shape
        rank = draws(index, seed, "pieces", self.grid[0] * self.grid[1]).argsort(1).argsort(1)
        mask = (rank < self.shown).to(images.dtype).view(batch, 1, *self.grid)
        mask = F.interpolate(mask, size=(height, width), mode="nearest")
        return mask * self.whole(images, index, seed) + (1 - mask) * images


@dataclass(frozen=True)
class Unfitted:
    r"""Stands where a trigger will be that must first be fitted to the data; calling it raises."""

    attack: str

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        raise ValueError(f"attack {self.attack!r} is fitted to its data: first attack = fitted(attack, images, labels)")


def _over(images: Tensor, colour: Tensor, weight: Tensor) -> Tensor:
    colour, weight = colour.to(images.dtype), weight.to(images.dtype)
    return (1 - weight) * images + weight * colour


def _cosines(order: int, size: int) -> Tensor:
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.cos(torch.pi * torch.arange(order, dtype=torch.float64)[:, None] * position[None, :])


def _identity(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, dtype=torch.float64),
        torch.linspace(-1, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([x, y], -1)[None]
