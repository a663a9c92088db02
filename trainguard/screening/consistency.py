r"""AdvrBD Eq. 3: how far a prediction moves under a small perturbation inside a random patch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.data.store import ImageStore
from trainguard.distributed import Processes
from trainguard.draws import draws
from trainguard.models import device_of
from trainguard.perturbation import ascend, frozen, patch_mask
from trainguard.progress import Stage
from trainguard.training import at_once, autocast


def divergence(model: nn.Module, images: Tensor, *, mask: Tensor, eps: float, steps: int) -> Tensor:
    r"""Eq. 3: the divergence between the predictions on x and on the perturbed x.

    .. math:: S(x) = KL\bigl(f(x) \,\|\, f(x + M \odot \delta)\bigr), \quad \|\delta\|_\infty \le \epsilon

    with M a random square patch and delta the adversarial perturbation inside it (AdvrBD Eq. 3, Sec. V-B1). Poisoned
    samples are expected to hold still: a low value is suspicious.

    Args:
        model: from unit pixels (B, C, H, W) to logits; call inside `perturbation.frozen`.
        images: (B, C, H, W) in [0, 1].
        mask: (B, 1, H, W) of 0 and 1, the patches.
        eps: radius of the perturbation in unit pixels.
        steps: gradient steps; of `eps` / `steps` each.

    Returns:
        (B,) float32, at least 0.

    Deviation from the paper: delta raises the cross-entropy to the predicted label, which has a slope at zero where the
    divergence itself has none; the divergence of the result is what is returned.
    """
    device = images.device

    def predict(x: Tensor) -> Tensor:
        with autocast(device):
            return model(x.contiguous(memory_format=torch.channels_last)).float()

    seen: list[Tensor] = []  # the first forward pass of the ascent is the one on x itself: no need for another

    def loss(x: Tensor) -> Tensor:
        logits = predict(x)
        seen.append(logits.detach())
        return F.cross_entropy(logits, seen[0].argmax(1), reduction="none")

    delta = ascend(
        loss,
        images,
        eps=eps,
        steps=steps,
        step_size=eps / max(1, steps),
        mask=mask,
    )
    with torch.no_grad():
        after = predict(images + delta)
    p, q = seen[0].log_softmax(1), after.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)


def consistency(
    model: nn.Module,
    store: ImageStore,
    *,
    side: int,
    eps: float,
    steps: int,
    seed: int,
    processes: Processes,
    stage: Stage | None = None,
) -> np.ndarray:
    """Eq. 3 for every readable sample, shared among the ranks. A sample's patch depends on seed and index alone.

    Returns:
        (N,) float32; NaN where a sample is unreadable.
    """
    device, own = device_of(model), processes.share(store.readable)
    values = []
    with frozen(model):
        size = at_once(store.shape)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            places = draws(part, seed, "Eq. 3 patch", 2)
            mask = patch_mask(places, *store.shape[1:], side, device=device)
            found = divergence(model, store.batch(part, device), mask=mask, eps=eps, steps=steps)
            values.append(found.cpu().numpy())
            if stage is not None:
                stage.advance(len(part) * processes.world)
    merged = processes.merge(own, np.concatenate(values) if values else np.zeros(0, np.float32), len(store))
    merged[list(store.unreadable)] = np.nan
    return merged.astype(np.float32)
