r"""The one epoch loop: mixed precision, channels_last, a seeded order, augmentation, gradients averaged over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.data.store import ImageStore
from trainguard.distributed import Processes
from trainguard.errors import ModelError
from trainguard.models import UnitPixels, copy_of, device_of, full_precision, own_hooks, short_strides
from trainguard.progress import Stage

AT_ONCE = 512  # images that are looked at together
LARGEST_STEP = 5.0  # norm of the gradient
LARGE = 3 * 64 * 64  # values of an image from which fewer are


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained.

    Attributes:
        epochs: passes over the samples.
        batch_size: over all processes together.
        rate: peak learning rate of a one-cycle schedule (Smith and Topin 2018) for SGD with Nesterov momentum.
        momentum: of SGD.
        weight_decay: of SGD.
        shift: random translation, as a share of the image's side; 0 for none.
    """

    epochs: int
    batch_size: int = 128
    rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: float = 0.125

    def rate_at(self, progress: float) -> float:
        """The learning rate after a share `progress` of all steps, in [0, 1]: linear up to a quarter, cosine down."""
        if progress < 0.25:
            return self.rate * (0.04 + 0.96 * progress / 0.25)
        return self.rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (progress - 0.25) / 0.75)))

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """A fresh optimizer for `model`."""
        return torch.optim.SGD(
            model.parameters(), self.rate, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


def autocast(device: torch.device | str) -> AbstractContextManager:
    """bf16 where the device gains from it (a GPU, a CPU with bf16 instructions); otherwise fp32.

    No weights are kept in bf16: torch forgets them only where the outermost autocast ends, and within a user's own one
    every step would go on from those of the first.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", torch.bfloat16, enabled=gains, cache_enabled=False)
    if device.type == "cpu":
        gains = torch.cpu._is_avx512_bf16_supported()
        return torch.autocast("cpu", torch.bfloat16, enabled=gains, cache_enabled=False)
    return full_precision(device)


def settle(network: UnitPixels, images: Tensor) -> Tensor:
    """Find out how a user's network can be run, fastest way first from the present one on, and keep to it.

    Some flatten with `view`, which wants contiguous memory; some put parts together that must be of one precision.

    Args:
        network: one of our own copies; strides of it may be shortened on the way.
        images: (B, C, H, W) in [0, 1], on the network's device.

    Returns:
        What it gives for them.

    Raises:
        Exception: what the network raises in contiguous memory and full precision.
    """
    ways = ((torch.channels_last, True), (torch.contiguous_format, True), (torch.contiguous_format, False))
    for way in ways[ways.index((network.format, network.mixed)) :]:
        network.format, network.mixed = way
        for value in (*network.net.parameters(), *network.net.buffers()):
            if value.ndim == 4:
                value.data = value.data.contiguous(memory_format=network.format)
        try:
            with torch.enable_grad(), autocast(images.device), short_strides(network):
                return network(images)
        except Exception:  # whatever the user's forward may raise
            if not network.mixed:
                raise
    raise AssertionError  # the last way returns or raises


def check_hooks(model: Any, network: UnitPixels, images: Tensor) -> None:
    """Refuse a model whose own forward hooks change what it gives: a copy does not have them.

    Args:
        model: the user's, or a function that builds it.
        network: the copy, in eval mode.
        images: (B, C, H, W) in [0, 1], on the network's device.

    Raises:
        ModelError: so it is.
    """
    if not isinstance(model, nn.Module) or not own_hooks(model):
        return
    whole = UnitPixels(copy_of(model, hooks=True).to(images.device).float(), network.pixel_range).eval()
    try:
        expected: Any = settle(whole, images)
    except Exception:  # with its hooks it runs no better
        return
    try:
        given: Any = settle(network, images).detach().float()
        expected = expected.detach().float()
        same = torch.allclose(given, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except Exception:  # whatever the user's forward may raise
        same = False
    if not same:
        raise ModelError("the model gives something else without its forward hooks: pass a function that builds it")


def at_once(shape: tuple[int, int, int], most: int = AT_ONCE) -> int:
    """How many images (C, H, W) may be held together: `most`, of large ones as many as have as many values."""
    return max(1, min(most, most * LARGE // math.prod(shape)))


def shifted(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `share` of its side in both directions, its border mirrored.

    No flips: a mirrored digit or traffic sign is another class.

    Args:
        images: (B, C, H, W).
        share: in [0, 0.5); 0 gives the images back.
        generator: on the CPU.
    """
    count, channels, height, width = images.shape
    up, left = int(share * height), int(share * width)
    if up == 0 and left == 0:
        return images
    padded = F.pad(images, (left, left, up, up), mode="reflect")
    top = torch.randint(2 * up + 1, (count, 1), generator=generator) + torch.arange(height)
    side = torch.randint(2 * left + 1, (count, 1), generator=generator) + torch.arange(width)
    place = (top[:, :, None] * padded.shape[3] + side[:, None, :]).flatten(1).to(images.device)
    return padded.flatten(2).gather(2, place[:, None].expand(-1, channels, -1)).view_as(images)


def batches(index: np.ndarray, size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """The samples in a random order, in batches of `size`; a last batch under half of it is left out."""
    order = index[torch.randperm(len(index), generator=generator).numpy()]
    for start in range(0, len(order), size):
        part = order[start : start + size]
        if start == 0 or len(part) * 2 >= size:
            yield part


def run_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: list[np.ndarray],
    store: ImageStore,
    loss: Callable[[Tensor, np.ndarray], Tensor],
    rates: list[float],
    *,
    shift: float,
    generator: torch.Generator,
    processes: Processes,
    stage: Stage | None = None,
) -> float:
    r"""Train for the batches of a plan.

    Args:
        model: eats unit pixels; it is left in train mode.
        optimizer: over the model's parameters.
        plan: the batches, equal on every rank; each rank takes its share of each batch.
        store: the images.
        loss: from logits (B, K) and the batch's indices (B,) to a mean loss.
        rates: the learning rate of each batch.
        shift: see `shifted`.
        generator: on the CPU, equal on every rank.
        processes: the ranks.
        stage: where to show progress.

    Returns:
        The mean loss, over the ranks.
    """
    device, total = device_of(model), 0.0
    model.train()
    for part, rate in zip(plan, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        own = processes.share(part)
        weight = len(own) * processes.world / len(part)
        own = own if len(own) else part[:1]  # a rank without a share runs along, with no weight
        images = shifted(store.batch(own, device), shift, generator)
        with autocast(device):
            logits = model(images.contiguous(memory_format=torch.channels_last)).float()
        value = loss(logits, own)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        processes.average_gradients(model, weight)
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_STEP)
        optimizer.step()
        total += float(value.detach())
        if stage is not None:
            stage.advance(len(part))
    processes.average_buffers(model)
    return processes.mean(total / max(1, len(plan)))


@torch.no_grad()
def outputs(
    function: Callable[[Tensor], Tensor],
    model: nn.Module,
    store: ImageStore,
    index: np.ndarray,
    processes: Processes | None = None,
) -> np.ndarray:
    """What `function` gives for every sample of `index`, with `model` in eval mode, shared among the ranks.

    Args:
        function: from unit pixels (B, C, H, W) to (B, ...).
        model: the module that `function` runs; its mode is put back.
        store: the images.
        index: (M,) int64, without repeats.
        processes: the ranks; None for one.

    Returns:
        (M, ...) float32, in the order of `index`.
    """
    processes = processes or Processes()
    device, mode, size = device_of(model), model.training, at_once(store.shape)
    places = processes.share(np.arange(len(index)))
    own = np.zeros((0, 1), np.float32)
    model.eval()
    try:
        for start in range(0, len(places), size):
            images = store.batch(index[places[start : start + size]], device)
            with autocast(device):
                part = function(images.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
            if start == 0:
                own = np.empty((len(places), *part.shape[1:]), np.float32)
            own[start : start + len(part)] = part
    finally:
        model.train(mode)
    return own if processes.world == 1 else processes.merge(places, own, len(index))  # alone, all places are its own
