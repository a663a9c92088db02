r"""Trigger pictures, drawn by formula: (4, S, S) float64 RGBA in [0, 1], the last plane the explicit mask.

The published attacks use logos and cartoon characters that may not be redistributed; these are look-alikes of our own,
with the same size, colours and amount of detail. A picture of one's own comes in through `from_file`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_SIZE = 128


def white() -> Tensor:
    r"""A white square, fully opaque (BadNets, TaCT)."""
    return torch.ones(4, 8, 8, dtype=torch.float64)


def checks() -> Tensor:
    r"""A 3x3 black and white checkerboard, fully opaque (label-consistent attack, Turner et al. 2019, Fig. 2)."""
    cells = (torch.arange(3)[:, None] + torch.arange(3)[None, :]).remainder(2).to(torch.float64)
    board = (1 - cells).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return torch.cat([board.expand(3, -1, -1), torch.ones(1, 24, 24, dtype=torch.float64)])


def fox() -> Tensor:
    r"""An orange fox curled round a blue globe on a transparent ground, in the manner of a browser logo."""
    y, x = _plane()
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    canvas = torch.zeros(4, _SIZE, _SIZE, dtype=torch.float64)
    globe = (radius < 0.62).to(torch.float64)
    _paint(canvas, globe, (0.10, 0.25 + 0.2 * (1 - y) / 2, 0.75))
    inner = 0.42 + 0.22 * (angle + torch.pi) / (2 * torch.pi)
    body = ((radius < 0.95) & (radius > inner)).to(torch.float64)
    _paint(canvas, body, (0.95 + 0 * x, 0.35 + 0.35 * (1 - y) / 2, 0.05))
    ear = ((x + 0.35).abs() * 1.6 + (y + 0.55).abs() < 0.3).to(torch.float64)
    _paint(canvas, ear, (1.0, 0.85, 0.2))
    return canvas


def kitten() -> Tensor:
    r"""A white cartoon kitten with a red bow on a pink ground, opaque: the full-image blending picture."""
    y, x = _plane()
    canvas = torch.zeros(4, _SIZE, _SIZE, dtype=torch.float64)
    stripes = (torch.sin(8 * torch.pi * (x + y)) > 0).to(torch.float64)
    _paint(canvas, torch.ones_like(x), (0.95, 0.45 + 0.25 * stripes, 0.65 + 0.2 * stripes))
    _paint(canvas, _ellipse(x, y, 0, 0.12, 0.78, 0.58), (1.0, 1.0, 1.0))
    for side in (-1, 1):
        _paint(canvas, (((x - side * 0.5).abs() * 1.3 + (y + 0.45).abs()) < 0.36).to(torch.float64), (1.0, 1.0, 1.0))
        _paint(canvas, _ellipse(x, y, side * 0.33, 0.12, 0.07, 0.11), (0.05, 0.05, 0.05))
        for tilt in (-0.08, 0.02, 0.12):
            whisker = ((y - 0.25 - tilt * side * x * 2).abs() < 0.02) & (side * x > 0.52) & (side * x < 0.95)
            _paint(canvas, whisker.to(torch.float64), (0.05, 0.05, 0.05))
    _paint(canvas, _ellipse(x, y, 0, 0.3, 0.08, 0.05), (0.95, 0.8, 0.1))
    for shift in (-0.16, 0.16):
        _paint(canvas, _ellipse(x, y, 0.45 + shift, -0.42, 0.16, 0.18), (0.85, 0.05, 0.1))
    _paint(canvas, _ellipse(x, y, 0.45, -0.42, 0.08, 0.08), (0.95, 0.2, 0.25))
    return canvas


def from_file(path: str | Path) -> Tensor:
    r"""A picture of the user's: its alpha channel is the mask; without one it is opaque (black is a colour, not a
    hole).

    Raises:
        ValueError: the file is not a readable picture.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image.convert("RGBA"))
    except OSError as error:
        raise ValueError(f"trigger file {path}: not a readable picture ({error}); give a PNG or JPEG") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"trigger file {path}: a picture of 8 bits per value is wanted, this one has mode {mode!r}")
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float64) / 255


def fit(picture: Tensor, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    r"""The picture at a given size and number of channels.

    Returns:
        (C, height, width) colours, with luminance (ITU-R 601) for one channel and the colours in turn for others than
        three, and the (1, height, width) mask. Averages over areas, so that small sizes keep the mean colour.
    """
    seen = torch.cat([picture[:3] * picture[3:], picture[3:]])  # what is transparent has no colour
    small = F.interpolate(seen[None], size=(height, width), mode="area")[0]
    mask = small[3:]
    colour = small[:3] / mask.clamp_min(1e-6)
    if channels == 1:
        colour = (colour * colour.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    elif channels != 3:
        colour = colour[torch.arange(channels) % 3]
    return colour, mask


def _plane() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(_SIZE, dtype=torch.float64) + 0.5) / _SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _ellipse(x: Tensor, y: Tensor, cx: float, cy: float, rx: float, ry: float) -> Tensor:
    return (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1).to(torch.float64)


def _paint(canvas: Tensor, mask: Tensor, colour: tuple[Tensor | float, Tensor | float, Tensor | float]) -> None:
    for plane, value in zip(canvas[:3], colour, strict=True):
        plane.copy_(mask * value + (1 - mask) * plane)
    torch.maximum(canvas[3], mask, out=canvas[3])
