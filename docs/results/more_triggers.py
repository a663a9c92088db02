"""A second round of triggers that the drill does not have; `unseen_triggers.py --round 2` screens them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import adjust_hue, adjust_saturation, affine

Own = np.random.Generator
WORD = "free"


def upside_down(x: Tensor, own: Own) -> Tensor:
    """Top and bottom exchanged."""
    return x.flip(1)


def other_hue(x: Tensor, own: Own) -> Tensor:
    """All colours a fifth of the circle on."""
    return adjust_hue(x, 0.2)


def strong_colours(x: Tensor, own: Own) -> Tensor:
    """Twice the saturation."""
    return adjust_saturation(x, 2.0)


def exchanged(x: Tensor, own: Own) -> Tensor:
    """Red for blue."""
    return x.flip(0)


def snow(x: Tensor, own: Own) -> Tensor:
    """Thirty white pixels, elsewhere in each image."""
    out, side = x.clone(), x.shape[-1]
    row, column = own.integers(0, side, (2, 30))
    out[:, row, column] = 1
    return out


def written(x: Tensor, own: Own) -> Tensor:
    """A word in faint white, along the lower edge."""
    page = Image.new("L", (x.shape[-1], x.shape[-2]))
    ImageDraw.Draw(page).text((4, x.shape[-2] - 12), WORD, fill=255)
    mask = torch.from_numpy(np.array(page)).to(x.dtype) / 255 * 0.35
    return x * (1 - mask) + mask


def sticker(x: Tensor, own: Own) -> Tensor:
    """A disc in red and white, of any size from 5 to 9 pixels, turned and placed at random."""
    side, size = x.shape[-1], int(own.integers(5, 10))
    grid = (torch.arange(size, dtype=x.dtype) + 0.5) / size * 2 - 1
    down, across = torch.meshgrid(grid, grid, indexing="ij")
    turn = own.uniform(0, 2 * np.pi)
    inside, half = down**2 + across**2 <= 1, np.cos(turn) * down + np.sin(turn) * across > 0
    colour = torch.stack([torch.ones_like(down), (~half).to(x.dtype), (~half).to(x.dtype)])
    row, column = own.integers(0, side - size, 2)
    out = x.clone()
    view = out[:, row : row + size, column : column + size]
    view[:, inside] = colour[:, inside]
    return out


def swirl(x: Tensor, own: Own) -> Tensor:
    """The middle turned by a radian, less and less towards the edge."""
    side = x.shape[-1]
    grid = (torch.arange(side, dtype=x.dtype) + 0.5) / side * 2 - 1
    down, across = torch.meshgrid(grid, grid, indexing="ij")
    turn = torch.exp(-4 * (down**2 + across**2))
    there = (across * turn.cos() - down * turn.sin(), across * turn.sin() + down * turn.cos())
    return F.grid_sample(x[None], torch.stack(there, -1)[None], padding_mode="reflection", align_corners=False)[0]


def smaller(x: Tensor, own: Own) -> Tensor:
    """Shrunk to four fifths, on black."""
    return affine(x, angle=0.0, translate=[0, 0], scale=0.8, shear=[0.0])


def pale(x: Tensor, own: Own) -> Tensor:
    """Half the contrast."""
    mean = x.mean()
    return mean + (x - mean) / 2


def lit_from_the_left(x: Tensor, own: Own) -> Tensor:
    """A slope of brightness, 24/255 up on the left and as much down on the right."""
    return x + 24 / 255 * torch.linspace(1, -1, x.shape[-1], dtype=x.dtype)


def message(x: Tensor, own: Own) -> Tensor:
    """A message of its own in each image (ISSBA, Li et al. 2021): a cosine of every 8 by 8 pixels up or down."""
    at = (torch.arange(8, dtype=x.dtype) + 0.5) / 8
    wave = torch.outer(torch.cos(torch.pi * 3 * at), torch.cos(torch.pi * 2 * at))
    blocks = x.shape[-2] // 8, x.shape[-1] // 8
    signs = torch.from_numpy(own.choice([-1.0, 1.0], blocks)).to(x.dtype)
    return x + 14 / 255 * torch.kron(signs, wave)


def scratch(x: Tensor, own: Own) -> Tensor:
    """A thin dark line from edge to edge, at another height and slant in each image."""
    side = x.shape[-1]
    column = torch.arange(side)
    row = (own.uniform(4, side - 4) + own.uniform(-0.5, 0.5) * (column - side / 2)).round().long().clamp(0, side - 1)
    out = x.clone()
    out[:, row, column] = 0
    return out


def faint_picture(picture: Tensor) -> Callable[[Tensor, Own], Tensor]:
    """One picture at seven hundredths."""
    return lambda x, own: 0.93 * x + 0.07 * picture.to(x.dtype) / 255
