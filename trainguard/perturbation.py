r"""Bounded perturbations of images: the inner maximisation that both papers share.

PBE's untargeted adversarial examples (Eq. 6) and AdvrBD's perturbation inside a random patch (Eq. 3) are the same few
steps of gradient ascent, projected onto a ball and onto valid pixels. Everything here works on images in unit pixel
space, float32 in [0, 1], and changes nothing that it is given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.errors import ModelError

Norm = Literal["linf", "l2"]

_TINY = 1e-12  # a gradient of zero stays a step of zero instead of becoming NaN


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode with no parameter asking for a gradient; put every flag back on the way out.

    Eval mode keeps BatchNorm's running statistics as they are. Without parameter gradients a backward pass to the input
    costs about one forward pass, and keeps fewer activations.

    Args:
        model: the model to hold. Its modes and `requires_grad` flags are restored module by module, also on an error.

    Yields:
        The same model.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def patch_mask(places: Tensor, height: int, width: int, side: int, *, device: torch.device | str = "cpu") -> Tensor:
    r"""One square patch per sample: M in AdvrBD Eq. 3.

    Args:
        places: (B, 2) uniform numbers in [0, 1), the patch's place from top to bottom and from left to right; see
            `trainguard.draws` for numbers that depend on the sample alone.
        height: of the images, in pixels.
        width: of the images, in pixels.
        side: of the square, in pixels. A side beyond the image covers it in that direction.
        device: where the mask is wanted.

    Returns:
        (B, 1, height, width) float32 of 0 and 1. The patch always lies whole inside the image and every position is
        equally likely.

    Raises:
        ValueError: `side` is below one.

    Deviation from the paper: its text speaks of a patch 'of a given radius'; a square of `side` = 2 radius is used.
    """
    if side < 1:
        raise ValueError(f"expected a patch of one pixel or more, got side={side}")
    high, wide = min(side, height), min(side, width)
    top = (places[:, :1] * (height - high + 1)).long().to(device)
    left = (places[:, 1:] * (width - wide + 1)).long().to(device)
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row >= top) & (row < top + high)  # (B, H)
    columns = (column >= left) & (column < left + wide)  # (B, W)
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def project(delta: Tensor, x: Tensor, eps: float, norm: Norm = "linf", mask: Tensor | None = None) -> Tensor:
    r"""Bring a perturbation back to what is allowed: :math:`\|r\|_p \le \epsilon`, inside the mask, x + r in [0, 1].

    Args:
        delta: (B, C, H, W) the perturbation.
        x: (B, C, H, W) in [0, 1], the images that it is added to.
        eps: radius in unit pixel space; per sample over all its values for "l2".
        norm: "linf" or "l2".
        mask: (B, 1, H, W) or (B, C, H, W) of 0 and 1; None allows the whole image.

    Returns:
        (B, C, H, W) the projected perturbation. The valid-pixel clamp comes last: it only ever shortens a coordinate,
        so the result is inside the ball as well. Projecting twice gives the same as once.
    """
    if mask is not None:
        delta = delta * mask
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(_TINY).view(-1, 1, 1, 1)
        delta = delta * (eps / length).clamp_max(1.0)
    return (x + delta).clamp(0.0, 1.0) - x


def ascend(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    norm: Norm = "linf",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Raise a loss by bounded gradient steps on the image (PBE Eq. 4 to 6, AdvrBD Eq. 3).

    .. math:: r \leftarrow \Pi_{\epsilon}\bigl(r + \alpha \, g(\nabla_r L(x + r))\bigr), \qquad
              g(v) = \operatorname{sign}(v) \text{ for linf},\; v / \|v\|_2 \text{ for l2}

    Take the steps inside `frozen(model)`; one `frozen` can hold for many batches.

    Args:
        loss: from perturbed images (B, C, H, W) to losses, one per sample or summed; each image's loss should depend on
            that image alone. It may run under autocast: the perturbation itself stays in the precision of `x`.
        x: (B, C, H, W) in [0, 1].
        eps: radius in unit pixel space, e.g. 6/255; per sample over all its values for "l2".
        steps: how many gradient steps, from zero.
        step_size: length of a step in the same norm. None: eps / 5, as PBE's authors' code has it; it then takes five
            steps to reach the border.
        norm: "linf" or "l2".
        mask: (B, 1, H, W) or (B, C, H, W) of 0 and 1: where the perturbation may live. None: everywhere.

    Returns:
        (B, C, H, W) the perturbation, without gradient; x + it is in [0, 1].

    Raises:
        ValueError: a negative `eps` or `steps`, or an unknown `norm`.
        ModelError: the loss does not depend on the images by any gradient.

    Deviation from the paper: none; the number of steps and their size are not in PBE's text and come from its code.
    """
    if eps < 0 or steps < 0:
        raise ValueError(f"expected eps >= 0 and steps >= 0, got eps={eps}, steps={steps}")
    if norm not in ("linf", "l2"):
        raise ValueError(f'expected norm "linf" or "l2", got {norm!r}')
    step_size = eps / 5 if step_size is None else step_size
    x = x.detach()
    delta = project(torch.zeros_like(x), x, eps, norm, mask)
    for _ in range(steps):
        with torch.enable_grad():
            delta.requires_grad_(True)
            value = loss(x + delta).sum()
            if not value.requires_grad:
                raise ModelError(
                    "the model's output has no gradient towards its images, along which they are to be perturbed: take "
                    "torch.no_grad() and detach() out of its forward"
                )
            (slope,) = torch.autograd.grad(value, delta)
        if mask is not None:
            slope = slope * mask
        if norm == "linf":
            step = slope.sign()
        else:
            step = slope / slope.flatten(1).norm(dim=1).clamp_min(_TINY).view(-1, 1, 1, 1)
        delta = project(delta.detach() + step_size * step, x, eps, norm, mask)
    return delta


def untargeted(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 6 / 255,
    steps: int = 7,
    norm: Norm = "linf",
) -> Tensor:
    r"""Make untargeted adversarial examples: :math:`\max_r L(f(x + r), y)` within the ball (PBE Eq. 6).

    Args:
        model: from unit pixels (B, C, H, W) to logits (B, K). Hold the network with `frozen` around the call.
        x: (B, C, H, W) in [0, 1].
        y: (B,) int64, the labels to move away from.
        eps: radius in unit pixel space. 6/255, 7 steps of eps/5, no random start: the values of PBE's authors' code.
        steps: how many gradient steps.
        norm: "linf" or "l2". For "l2" give an `eps` that fits: 0.5 is of the order of 6/255 on CIFAR-10.

    Returns:
        (B, C, H, W) in [0, 1], the adversarial images.
    """

    def loss(image: Tensor) -> Tensor:
        return F.cross_entropy(model(image).float(), y, reduction="none")

    return (x + ascend(loss, x, eps=eps, steps=steps, norm=norm)).clamp(0.0, 1.0)
