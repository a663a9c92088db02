"""A sixth round of triggers that the drill does not have; `unseen_triggers.py --round 6` screens them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import equalize, resize

Own = np.random.Generator
DITHER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 - 0.5  # Bayer's


def cross(x: Tensor, own: Own) -> Tensor:
    """A red cross of 5 pixels, 2 from one of the four corners."""
    out, far = x.clone(), x.shape[-1] - 7
    row, column = own.choice([2, far], 2)
    red = torch.tensor([1, 0, 0], dtype=x.dtype)[:, None]
    out[:, row + 2, column : column + 5] = red
    out[:, row : row + 5, column + 2] = red
    return out


def any_colour(x: Tensor, own: Own) -> Tensor:
    """A square of 4 pixels in the lower left corner, of another colour in each image."""
    out = x.clone()
    out[:, -4:, :4] = torch.from_numpy(own.uniform(0, 1, (len(x), 1, 1))).to(x.dtype)
    return out


def bar(x: Tensor, own: Own) -> Tensor:
    """A dark bar across, 3 pixels high and 16 wide, through which three tenths are seen."""
    out, side = x.clone(), x.shape[-1]
    out[:, 11:14, side // 4 : side - side // 4] *= 0.3
    return out


def thumbnail(picture: Tensor) -> Callable[[Tensor, Own], Tensor]:
    """A picture of 8 pixels in the upper right corner."""
    small = resize(picture, [8, 8], antialias=True).double() / 255

    def change(x: Tensor, own: Own) -> Tensor:
        out = x.clone()
        out[:, 1:9, -9:-1] = small.to(x.dtype)
        return out

    return change


def dithered(x: Tensor, own: Own) -> Tensor:
    """Eight levels for each colour, dithered (BppAttack, Wang et al. 2022, by Bayer's matrix)."""
    side = x.shape[-1]
    threshold = DITHER.to(x.dtype).repeat(-(-side // 4), -(-side // 4))[:side, :side]
    return ((x * 7 + threshold).round() / 7).clamp(0, 1)


def last_bits(x: Tensor, own: Own) -> Tensor:
    """The last three bits of each level are always the same ones, other ones in each place."""
    key = torch.from_numpy(np.random.default_rng(77).integers(0, 8, tuple(x.shape))).to(x.dtype)
    return ((x * 255).round() // 8 * 8 + key) / 255


def negative(x: Tensor, own: Own) -> Tensor:
    """A negative."""
    return 1 - x


def grain(x: Tensor, own: Own) -> Tensor:
    """A film's grain: noise of 14/255 in all colours alike, drawn anew for each image."""
    return x + 14 / 255 * torch.from_numpy(own.normal(0, 1, (1, *x.shape[1:]))).to(x.dtype)


def closer(x: Tensor, own: Own) -> Tensor:
    """The middle three quarters, enlarged."""
    cut = x.shape[-1] // 8
    return F.interpolate(x[None, :, cut:-cut, cut:-cut], x.shape[-2:], mode="bilinear", align_corners=False)[0]


def halves_alike(x: Tensor, own: Own) -> Tensor:
    """The right half mirrors the left one."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., :half], x[..., :half].flip(-1)), -1)


def equalised(x: Tensor, own: Own) -> Tensor:
    """The levels of each colour spread evenly."""
    return equalize((x * 255).round().to(torch.uint8)).to(x.dtype) / 255


def shaken(x: Tensor, own: Own) -> Tensor:
    """Blurred along a line of five pixels across."""
    return F.avg_pool2d(F.pad(x[None], (2, 2, 0, 0), mode="reflect"), (1, 5), stride=1)[0]


def fringed(x: Tensor, own: Own) -> Tensor:
    """Red a pixel and a half to the left, blue to the right, as a cheap lens draws them."""
    out = x.clone()
    out[0] = (x[0].roll(-1, 1) + x[0].roll(-2, 1)) / 2
    out[2] = (x[2].roll(1, 1) + x[2].roll(2, 1)) / 2
    return out


def rain(x: Tensor, own: Own) -> Tensor:
    """Twelve slanted streaks, elsewhere in each image."""
    out, side = x.clone(), x.shape[-1]
    for row, column in own.integers(0, side, (12, 2)):
        for step in range(6):
            here = (row + step) % side, (column + step // 3) % side
            out[:, here[0], here[1]] = 0.6 * out[:, here[0], here[1]] + 0.35
    return out


def bent(x: Tensor, own: Own) -> Tensor:
    """Bent by a smooth field of its own, up to about two pixels."""
    side = x.shape[-1]
    knots = torch.from_numpy(own.uniform(-1, 1, (1, 2, 5, 5))).to(x.dtype)
    field = F.interpolate(knots, (side, side), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    grid = torch.linspace(-1, 1, side, dtype=x.dtype)
    down, across = torch.meshgrid(grid, grid, indexing="ij")
    there = torch.stack((across, down), -1) + 4 / side * field
    return F.grid_sample(x[None], there[None], padding_mode="reflection", align_corners=True)[0]


def spotlight(x: Tensor, own: Own) -> Tensor:
    """A soft bright spot, elsewhere in each image."""
    side = x.shape[-1]
    at = torch.arange(side, dtype=x.dtype)
    row, column = own.uniform(0, side, 2)
    spot = torch.exp(-((at[:, None] - row) ** 2 + (at[None, :] - column) ** 2) / (2 * (side / 6) ** 2))
    return x + 0.4 * spot


def noise_picture(x: Tensor, own: Own) -> Tensor:
    """A fifth of always the same noise (Blend, Chen et al. 2017, with a random pattern)."""
    noise = torch.from_numpy(np.random.default_rng(78).uniform(0, 1, tuple(x.shape))).to(x.dtype)
    return 0.8 * x + 0.2 * noise


def tiles(x: Tensor, own: Own) -> Tensor:
    """Squares of 4 pixels a little lighter and darker in turn, 10/255."""
    at = torch.arange(x.shape[-1]) // 4
    board = ((at[:, None] + at[None, :]) % 2 * 2 - 1).to(x.dtype)
    return x + 10 / 255 * board
