r"""The random views of an image that fine-tuning sees."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_view(
    x: Tensor, generator: torch.Generator, *, degrees: float = 10.0, shift: float = 0.125, flip: bool = True
) -> Tensor:
    r"""Turn, shift and mirror each image at random, in one resampling.

    Args:
        x: (B, C, H, W) in [0, 1].
        generator: where the draws come from; on its device, so that one seed gives the same views everywhere.
        degrees: rotation is uniform in +-degrees. 10, a shift of 4 pixels in 32 and a mirror are what PBE's authors'
            code uses on CIFAR-10.
        shift: along each axis, uniform in +-shift of the side.
        flip: mirror half of the images. Not for digits or traffic signs, where left and right differ.

    Returns:
        (B, C, H, W) in [0, 1], black where a view reaches beyond the image.
    """
    batch, _, height, width = x.shape
    draw = torch.rand(batch, 4, generator=generator, device=generator.device).to(x.device)
    angle = (2 * draw[:, 0] - 1) * math.radians(degrees)
    mirror = torch.where((draw[:, 1] < 0.5) & flip, -1.0, 1.0)
    move = (2 * draw[:, 2:] - 1) * 2 * shift  # grid coordinates run from -1 to 1, so a side is 2 long
    across = torch.stack([mirror * angle.cos(), -angle.sin() * height / width, move[:, 0]], dim=1)
    down = torch.stack([mirror * angle.sin() * width / height, angle.cos(), move[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0.0, 1.0)
