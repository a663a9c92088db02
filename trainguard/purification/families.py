r"""What a trigger may do to images: add pixels, add a wave, or bend them. One small search for each family.

A search is led by the slope of whatever is to be raised along the *moved* images, so that one backward pass serves all
families, and none has to differentiate through what it does to an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 51 / 255  # in L-inf, of pixels and waves; wider than a ball of single images, to reach a blended trigger
CLIMB = 1 / 3  # of the radius, each step
CYCLES = 0.25  # per pixel, at most, of a wave
BEND = 0.05  # of an image's side, how far a pixel may come from
TOGETHER, WAVES, WARPS = 1 / 4, 3 / 16, 1 / 4  # of the images; each of the rest has pixels of its own
KNOTS = 4  # in each direction; what is between is interpolated

_TINY = 1e-12


class Family(Protocol):
    """A search for a few images at a time."""

    def on(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], moved as far as the search has come."""

    def climb(self, x: Tensor, slope: Tensor) -> None:
        """One step further.

        Args:
            x: (B, C, H, W) the images, moved.
            slope: (B, C, H, W) of what is to be raised, at these.
        """


class Pixels:
    """Any change within an L-inf ball, for each image or the same for all.

    Args:
        x: (B, C, H, W) in [0, 1].
        together: one for all images, moved by their mean slope: what all have in common is what a trigger is.
        far: start at a random point of the ball, at zero otherwise.
        generator: of the starting points, on the CPU.
    """

    def __init__(self, x: Tensor, *, together: bool, far: bool, generator: torch.Generator) -> None:
        self.together = together
        start = 2 * torch.rand((1 if together else len(x), *x.shape[1:]), generator=generator) - 1
        self.delta = (RADIUS * start if far else torch.zeros_like(start)).to(x.device)

    def on(self, x: Tensor) -> Tensor:
        """See `Family`."""
        return (x + self.delta).clamp(0, 1)

    def climb(self, x: Tensor, slope: Tensor) -> None:
        """See `Family`."""
        slope = slope.mean(0, keepdim=True) if self.together else slope
        self.delta = (self.delta + CLIMB * RADIUS * slope.sign()).clamp(-RADIUS, RADIUS)


class Wave:
    """One plane wave for each image, the same in all channels: of all frequencies the one that the slopes ask for most.

    Args:
        x: (B, C, H, W) in [0, 1].
        generator: of the first waves, on the CPU.
    """

    def __init__(self, x: Tensor, *, generator: torch.Generator) -> None:
        height, width = x.shape[2:]
        rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.rfftfreq(width)
        self.slow = ((rows[:, None] <= CYCLES) & (columns <= CYCLES)).to(x.device)
        self.slow[0, 0] = False  # not brightness
        self.asked = torch.zeros(len(x), *self.slow.shape, dtype=torch.complex64, device=x.device)
        self.wave = _strongest(self._slow_part(torch.randn(x.shape, generator=generator).to(x.device)), x.shape[2:])

    def on(self, x: Tensor) -> Tensor:
        """See `Family`."""
        return (x + self.wave).clamp(0, 1)

    def climb(self, x: Tensor, slope: Tensor) -> None:
        """See `Family`."""
        self.asked = self.asked + self._slow_part(slope)
        self.wave = _strongest(self.asked, x.shape[2:])

    def _slow_part(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.mean(1)) * self.slow
        return spectrum / (spectrum.abs().amax((1, 2), keepdim=True) + _TINY)


def _strongest(spectrum: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, H, W) the wave that has most of a spectrum (B, H, W // 2 + 1), as high as the radius."""
    flat = spectrum.flatten(1)
    first = F.one_hot(flat.abs().argmax(1), flat.shape[1])
    wave = torch.fft.irfft2((flat * first).view_as(spectrum), s=size)
    return RADIUS * (wave / (wave.abs().amax((1, 2), keepdim=True) + _TINY))[:, None]


class Warp:
    """A smooth displacement of all pixels, for each image.

    Args:
        x: (B, C, H, W) in [0, 1].
        bend: how far a pixel may come from, as a share of the side.
        generator: of the starting points, on the CPU.
    """

    def __init__(self, x: Tensor, *, bend: float = BEND, generator: torch.Generator) -> None:
        self.bend_up_to(bend)
        start = 2 * torch.rand(len(x), KNOTS, KNOTS, 2, generator=generator) - 1
        self.knots = (self.most * start).to(x.device)
        height, width = x.shape[2:]
        self.down, self.along = (_between(side).to(x.device) for side in (height, width))
        self.still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False).to(x.device)

    def bend_up_to(self, bend: float) -> None:
        """How far a pixel may come from, from the next step on."""
        self.most = 2 * bend  # an image is two wide where `grid_sample` counts

    def on(self, x: Tensor) -> Tensor:
        """See `Family`."""
        flow = torch.einsum("hi,bijd,wj->bhwd", self.down, self.knots, self.along)
        return F.grid_sample(x.float(), self.still + flow, padding_mode="reflection", align_corners=False)

    def climb(self, x: Tensor, slope: Tensor) -> None:
        """See `Family`."""
        sides = (3, 2)  # to the right, then down: the order of a displacement
        changes = [torch.gradient(x, dim=d)[0] if x.shape[d] > 1 else torch.zeros_like(x) for d in sides]
        force = torch.stack([(slope * change).sum(1) for change in changes], dim=-1)
        pull = torch.einsum("hi,bhwd,wj->bijd", self.down, force, self.along)
        self.knots = (self.knots + CLIMB * self.most * pull.sign()).clamp(-self.most, self.most)


def _between(side: int) -> Tensor:
    """(side, KNOTS) the weight of each knot at each pixel."""
    return F.interpolate(torch.eye(KNOTS)[None], size=side, mode="linear", align_corners=True)[0].T


def families(x: Tensor, *, far: bool, generator: torch.Generator) -> list[tuple[Family, int]]:
    """All searches for a batch in random order, each with the number of images that it gets, one after the other.

    Args:
        x: (B, C, H, W) in [0, 1], at least one.
        far: where the pixels of the ones that share them start, see `Pixels`.
        generator: of all starting points, on the CPU.
    """
    together, waves, warps = (math.floor(share * len(x)) for share in (TOGETHER, WAVES, WARPS))
    alone, common, waving, bent = x.split([len(x) - together - waves - warps, together, waves, warps])
    found: list[tuple[Family, int]] = [(Pixels(alone, together=False, far=True, generator=generator), len(alone))]
    if together:
        found.append((Pixels(common, together=True, far=far, generator=generator), together))
    if waves:
        found.append((Wave(waving, generator=generator), waves))
    if warps:
        found.append((Warp(bent, generator=generator), warps))
    return found
