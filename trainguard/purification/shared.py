r"""Adversarial images that mislead two models alike: what a mended model must not share with the infected one."""

from __future__ import annotations

import torch
from torch import Tensor

from trainguard.models import UnitPixels
from trainguard.perturbation import frozen
from trainguard.purification.families import families
from trainguard.training import autocast

STEPS = 5  # of the searches
PART = 0.25  # share of a batch that is attacked


def shared_adversarial(
    network: UnitPixels, infected: UnitPixels, x: Tensor, y: Tensor, *, far: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Move images until both models may give one and the same wrong class (SAU, Wei et al. 2023, Eq. 8).

    .. math:: \max_r \; \log \sum_{k \ne y} f_k(x \circ r; \theta) \, f_k(x \circ r; \theta_0)

    Args:
        network: the model that is being mended, in unit pixels, in any mode, and as before when the call returns.
        infected: the model as it came, in eval mode.
        x: (B, C, H, W) in [0, 1], in random order.
        y: (B,) labels.
        far: whether the change that some images share starts from a random point of the ball, as those of others do;
            from zero otherwise. Each finds triggers that the other does not.
        generator: where they start, on the CPU.

    Returns:
        images: (B, C, H, W) in [0, 1].
        classes: (B,), see `agreed_wrong`.

    Deviation from the paper: the sum of products in place of a sum of two losses; and beside a ball for each image
    changes that all share, waves and warps (see `families`): what steps of single pixels do not find in this model, a
    trigger of another kind, both models would go on sharing.
    """
    searches = families(x, far=far, generator=generator)
    counts = [count for _, count in searches]

    def moved() -> Tensor:
        parts = [family.on(part) for (family, _), part in zip(searches, x.split(counts), strict=True)]
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    with frozen(network), frozen(infected):
        for _ in range(STEPS):
            images = moved().requires_grad_()
            with torch.enable_grad(), autocast(x.device):
                both = network(images).float().log_softmax(1) + infected(images).float().log_softmax(1)
            wrong = both.scatter(1, y[:, None], -torch.inf).logsumexp(1)
            (slope,) = torch.autograd.grad(wrong.sum(), images)
            parts = zip(searches, images.detach().split(counts), slope.split(counts), strict=True)
            for (family, _), part, climbing in parts:
                family.climb(part, climbing)
    images = moved()
    return images, agreed_wrong(network, infected, images, y)


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
