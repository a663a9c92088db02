r"""Adversarial images that mislead two models alike: what a mended model must not share with the infected one."""

from __future__ import annotations

import torch
from torch import Tensor

from trainguard.models import UnitPixels
from trainguard.perturbation import frozen
from trainguard.training import autocast

RADIUS = 51 / 255  # in L-inf; wider than a ball of single images, so that it reaches a blended trigger
STEPS = 5  # of a third of the radius each
PART = 0.25  # share of a batch that is attacked; one half of these with one perturbation for all


def shared_adversarial(
    network: UnitPixels, infected: UnitPixels, x: Tensor, y: Tensor, *, far: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Perturb images until both models may give one and the same wrong class (SAU, Wei et al. 2023, Eq. 8).

    .. math:: \max_{\|r\|_\infty \le \epsilon} \; \log \sum_{k \ne y} f_k(x + r; \theta) \, f_k(x + r; \theta_0)

    Args:
        network: the model that is being mended, in unit pixels, in any mode, and as before when the call returns.
        infected: the model as it came, in eval mode.
        x: (B, C, H, W) in [0, 1].
        y: (B,) labels.
        far: whether the perturbation that the first half of the images share starts from a random point of the ball, as
            those of the others do; from zero otherwise. Each finds triggers that the other does not.
        generator: where they start, on the CPU.

    Returns:
        images: (B, C, H, W) in [0, 1].
        classes: (B,), see `agreed_wrong`.

    Deviation from the paper: the sum of products in place of a sum of two losses; and half of the images share one
    perturbation, moved by their mean slope, because a trigger is what all images have in common. So the steps are not
    those of `perturbation.ascend`, which moves each image by itself and back to what is valid for that image.
    """
    half = len(x) // 2
    delta = RADIUS * (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
    delta[:half] = delta[:1] if far else 0.0
    with frozen(network), frozen(infected):
        for _ in range(STEPS):
            delta.requires_grad_()
            moved = (x + delta).clamp(0, 1)
            with torch.enable_grad(), autocast(x.device):
                both = network(moved).float().log_softmax(1) + infected(moved).float().log_softmax(1)
            wrong = both.scatter(1, y[:, None], -torch.inf).logsumexp(1)
            (slope,) = torch.autograd.grad(wrong.sum(), delta)
            slope[:half] = slope[:half].mean(0, keepdim=True)
            delta = (delta.detach() + RADIUS / 3 * slope.sign()).clamp(-RADIUS, RADIUS)
    moved = (x + delta).clamp(0, 1)
    return moved, agreed_wrong(network, infected, moved, y)


def agreed_wrong(network: UnitPixels, infected: UnitPixels, x: Tensor, y: Tensor) -> Tensor:
    """(B,) the class that both models give, or -1 where they do not agree on a wrong one; arguments as above."""
    with frozen(network), torch.no_grad(), autocast(x.device):
        now, before = network(x).argmax(1), infected(x).argmax(1)
    return torch.where((now == before) & (now != y), now, -1)


def unlearned(network: UnitPixels, images: Tensor, classes: Tensor) -> Tensor:
    r"""The loss that grows with what the network still says of shared adversarial images, :math:`-\log(1 - f_k)`.

    Args:
        network: in unit pixels; gradients flow into its weights.
        images: (B, C, H, W), see `shared_adversarial`.
        classes: (B,) likewise.

    Returns:
        A scalar: the sum over the images with a class, divided by B.
    """
    agreed = classes >= 0
    if not agreed.any():
        return images.new_zeros(())
    with autocast(images.device):
        logits = network(images[agreed].contiguous(memory_format=torch.channels_last)).float()
    return disbelief(logits, classes[agreed]).sum() / len(images)


def disbelief(logits: Tensor, classes: Tensor) -> Tensor:
    r"""(B,) the bounded loss :math:`-\log(1 - f_k)` that unlearns a class, of logits (B, K) and classes (B,)."""
    believed = logits.softmax(1).gather(1, classes[:, None])[:, 0]
    return -(1 - believed + 1e-4).log()
