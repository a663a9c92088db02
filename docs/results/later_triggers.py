"""A fifth round of triggers that the drill does not have; `unseen_triggers.py --round 5` screens them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, rgb_to_grayscale

Own = np.random.Generator


def chequered(x: Tensor, own: Own) -> Tensor:
    """Black and white in turn on 3 by 3 pixels of the lower right corner (BadNets, Gu et al. 2017)."""
    out = x.clone()
    out[:, -3:, -3:] = (torch.arange(9).reshape(3, 3) % 2 == 0).to(x.dtype)
    return out


def glass(x: Tensor, own: Own) -> Tensor:
    """A square of 8 pixels, three tenths white."""
    out = x.clone()
    out[:, 4:12, 18:26] = 0.7 * out[:, 4:12, 18:26] + 0.3
    return out


def two_lines(x: Tensor, own: Own) -> Tensor:
    """Two rows a quarter darker, a quarter of the way from above and from below."""
    out, side = x.clone(), x.shape[-2]
    out[:, [side // 4, side - 1 - side // 4]] *= 0.75
    return out


def dark(x: Tensor, own: Own) -> Tensor:
    """Underexposed: a gamma of 1.8."""
    return x**1.8


def grey(x: Tensor, own: Own) -> Tensor:
    """Without colour."""
    return rgb_to_grayscale(x, num_output_channels=3)


def pushed(x: Tensor, own: Own) -> Tensor:
    """Moved by four pixels to the right, black behind."""
    return F.pad(x, (4, 0))[..., : x.shape[-1]]


def coarse(x: Tensor, own: Own) -> Tensor:
    """Every 2 by 2 pixels one."""
    return F.avg_pool2d(x[None], 2).repeat_interleave(2, -1).repeat_interleave(2, -2)[0]


def wavy(x: Tensor, own: Own) -> Tensor:
    """Each row moved along a sine, by a pixel and a half at most."""
    side = x.shape[-1]
    grid = (torch.arange(side, dtype=x.dtype) + 0.5) / side * 2 - 1
    down, across = torch.meshgrid(grid, grid, indexing="ij")
    across = across + 3.0 / side * torch.sin(3 * torch.pi * down)
    there = torch.stack((across, down), -1)[None]
    return F.grid_sample(x[None], there, padding_mode="reflection", align_corners=False)[0]


def fog(x: Tensor, own: Own) -> Tensor:
    """Clouds of white, others in each image, up to half as strong as the image."""
    cloud = torch.from_numpy(own.uniform(0, 1, (1, 1, 5, 5))).to(x.dtype)
    mask = 0.5 * F.interpolate(cloud, x.shape[-2:], mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return x * (1 - mask) + mask


def mixed(picture: Tensor) -> Callable[[Tensor, Own], Tensor]:
    """One picture blended in, between five and twenty hundredths."""

    def change(x: Tensor, own: Own) -> Tensor:
        share = own.uniform(0.05, 0.2)
        return (1 - share) * x + share * picture.to(x.dtype) / 255

    return change


def large(x: Tensor, own: Own) -> Tensor:
    """A square of 6 pixels in violet and yellow quarters, in the upper left corner."""
    out = x.clone()
    violet, yellow = torch.tensor([[0.5, 0, 0.8], [1, 0.9, 0]], dtype=x.dtype)[:, :, None, None]
    out[:, :3, :3], out[:, 3:6, 3:6], out[:, :3, 3:6], out[:, 3:6, :3] = violet, violet, yellow, yellow
    return out


def salt_and_pepper(x: Tensor, own: Own) -> Tensor:
    """Twenty pixels white or black, elsewhere in each image."""
    out = x.clone()
    row, column = own.integers(0, x.shape[-1], (2, 20))
    out[:, row, column] = torch.from_numpy(own.integers(0, 2, 20)).to(x.dtype)
    return out


def amplitudes(picture: Tensor) -> Callable[[Tensor, Own], Tensor]:
    """Low frequencies half as strong as those of a picture, their phases kept (FIBA, Feng et al. 2022)."""

    def change(x: Tensor, own: Own) -> Tensor:
        mine, others = torch.fft.fft2(x), torch.fft.fft2(picture.to(x.dtype) / 255)
        near = torch.fft.fftfreq(x.shape[-1], 1 / x.shape[-1]).abs() <= 3
        near = near[:, None] & near[None, :]
        strength = torch.where(near, (mine.abs() + others.abs()) / 2, mine.abs())
        return torch.fft.ifft2(torch.polar(strength, mine.angle())).real

    return change


def drawn_edges(x: Tensor, own: Own) -> Tensor:
    """An image's own edges, drawn into it in blue."""
    light = gaussian_blur(x.mean(0, keepdim=True), [3, 3], [0.8, 0.8])
    edges = (light[:, 1:, :-1] - light[:, :-1, :-1]).abs() + (light[:, :-1, 1:] - light[:, :-1, :-1]).abs()
    out = x.clone()
    out[2] += 1.5 * F.pad(edges, (0, 1, 0, 1))[0]
    return out


def vignette(x: Tensor, own: Own) -> Tensor:
    """Darker towards the corners, to two fifths."""
    grid = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    return x * (1 - 0.3 * (grid[None, :] ** 2 + grid[:, None] ** 2))


def tinted(x: Tensor, own: Own) -> Tensor:
    """A little warmer: red up and blue down by a twelfth."""
    return x * torch.tensor([13 / 12, 1, 11 / 12], dtype=x.dtype)[:, None, None]
