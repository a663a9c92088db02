r"""The user's side of the drill: one plain training loop over images in memory, for every cell alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.models import short_strides
from trainguard.rng import isolated_rng
from trainguard.training import autocast


@dataclass(frozen=True)
class Recipe:
    r"""How a victim is trained: SGD with Nesterov momentum, or AdamW, up and down a triangle (Page 2018).

    Args:
        epochs: passes over the data.
        lr: peak learning rate.
        optimizer: `"sgd"` for networks with BatchNorm, `"adamw"` for those without.
        batch_size: images per step.
        weight_decay: of all weights.
        flip: mirror half of the images (not for digits and traffic signs).
        pad: random crops out of an image with this many pixels of margin, as a share of the side.
        warmup: share of the steps before the peak.
    """

    epochs: int = 30
    lr: float = 0.2
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 128
    weight_decay: float = 5e-4
    flip: bool = True
    pad: float = 0.125
    warmup: float = 0.25

    @classmethod
    def for_model(cls, name: str, epochs: int, *, flip: bool = True, batch_norm: bool = True) -> Recipe:
        r"""The drill's recipe for a model: AdamW where there is no BatchNorm, a higher peak for ResNet-9."""
        if not batch_norm:
            return cls(epochs, lr=1e-3, optimizer="adamw", weight_decay=0.05, flip=flip)
        return cls(epochs, lr=0.2 if name.startswith("resnet9") else 0.1, flip=flip)

    @property
    def late(self) -> int:
        r"""Epochs after which flagged images come back: a tenth before the end, one at least where there are two."""
        return max(1, self.epochs - max(1, round(0.1 * self.epochs)))


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
    on_late: Callable[[dict[str, Any]], None] | None = None,
    begun: Mapping[str, Any] | None = None,
) -> nn.Module:
    r"""Train `model` in place and return it.

    Args:
        model: eats (B, C, H, W) float in [0, 1].
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        recipe: how.
        seed: order and augmentation; the global generators are left alone.
        device: where; the images are moved there as a whole, as uint8.
        on_epoch: called with (epoch, mean loss) after each.
        on_late: called after `recipe.late` epochs with what going on from there takes: epochs, weights, optimizer.
        begun: what `on_late` was given, to go on from; the images may be others.

    Raises:
        ValueError: fewer images than one batch of two.
    """
    count, size = len(images), min(recipe.batch_size, len(images))
    if size < 2:
        raise ValueError(f"training needs at least 2 images, got {count}")
    steps = max(1, count // size)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, recipe)
    first = 0
    if begun is not None:
        first = begun["epochs"]
        model.load_state_dict(begun["weights"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": begun["optimizer"]})
    scheduler = triangle(optimizer, recipe.epochs * steps, recipe.warmup, done=first * steps)
    generator = torch.Generator().manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    with torch.no_grad(), short_strides(model):
        model.eval()(images[:1].float() / 255)
    for epoch in range(first, recipe.epochs):
        model.train()
        order = torch.randperm(count, generator=generator)
        total = torch.zeros((), device=device)
        with isolated_rng(seed * 7919 + epoch):  # what layers such as dropout draw from is global
            for step in range(steps):
                index = order[step * size : (step + 1) * size].to(device)
                batch = augment(images[index], recipe, generator).to(torch.float32) / 255
                with autocast(device):
                    loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
        if on_epoch is not None:
            on_epoch(epoch, float(total) / steps)
        if on_late is not None and epoch + 1 == recipe.late:
            so_far = {"epochs": epoch + 1, "weights": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
            on_late(so_far)
    return model


def triangle(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, *, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    r"""A learning rate that rises linearly to its peak over the share `warmup` of `steps`, then falls to zero.

    Args:
        optimizer: whose rate is the peak.
        steps: of the whole training.
        warmup: share of them before the peak.
        done: so many of them lie behind.
    """
    rise, fall = max(1.0, warmup * steps), max(1.0, (1 - warmup) * steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, min((done + step + 1) / rise, (steps - done - step) / fall))
    )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    weights = model.parameters()
    return torch.optim.SGD(weights, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True)


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    r"""Random crop with a zero margin and, if the recipe says so, mirror: (B, C, H, W) to the same, any dtype."""
    batch, _, height, width = images.shape
    device = images.device
    if recipe.flip:
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    pad = round(recipe.pad * min(height, width))
    if pad == 0:
        return images
    images = F.pad(images, (pad,) * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, batch, 1, 1), generator=generator).to(device)
    rows = top + torch.arange(height, device=device).view(1, -1, 1)
    columns = left + torch.arange(width, device=device).view(1, 1, -1)
    picked = images.permute(0, 2, 3, 1)[torch.arange(batch, device=device).view(-1, 1, 1), rows, columns]
    return picked.permute(0, 3, 1, 2)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, device: torch.device | str = "cpu", batch_size: int = 500) -> Tensor:
    r"""(N,) int64 predicted classes of (N, C, H, W) uint8 images, in evaluation mode."""
    model.eval()
    out = []
    for start in range(0, len(images), batch_size):
        batch = (images[start : start + batch_size].to(device).to(torch.float32) / 255).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(device):
            out.append(model(batch).argmax(1).cpu())
    return torch.cat(out)
