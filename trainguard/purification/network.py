"""The user's model as purification works on it: made ready, and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainguard.data.reading import shown
from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.features import classifier_layer
from trainguard.models import UnitPixels, device_of, dtype_of
from trainguard.perturbation import frozen
from trainguard.training import autocast, settle

PROBABLE = 0.01  # how far from one the sum of probabilities may be, by rounding
GUESSING = 3.0  # standard errors above the share that guessing gets right, up to which a model has learned nothing


def for_training(net: nn.Module, device: torch.device) -> nn.Module:
    """The copy made ready for fine-tuning: float32 (or complex), on the device, parameters open, frozen layers as well.

    What stays closed are constants: parameters of no layer of torch's own (the mean of a normalisation, fixed
    positions) that need no gradient where others do.

    Raises:
        ModelError: it is a TorchScript program, or has one in it.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise ModelError(
            "a TorchScript program cannot be fine-tuned, nor a model with one in it: pass what it was made of"
        )
    net.to(device=device)
    for value in (*net.parameters(), *net.buffers()):
        if value.is_floating_point():
            value.data = value.data.float()
    constants = _constants(net)
    for parameter in net.parameters():
        if (parameter.is_floating_point() or parameter.is_complex()) and id(parameter) not in constants:
            parameter.requires_grad_(True)
    return net


def _constants(net: nn.Module) -> set[int]:
    """The identities of parameters that stay as they are, see `for_training`."""
    if not any(parameter.requires_grad for parameter in net.parameters()):
        return set()
    own = [module for module in net.modules() if not _is_layer(type(module))]
    return {id(p) for module in own for p in module.parameters(recurse=False) if not p.requires_grad}


def _is_layer(kind: type) -> bool:
    """Whether a class is one of torch's layers, or made of one."""
    return any(each.__module__.startswith("torch.nn.") for each in kind.__mro__ if each is not nn.Module)


def check_outputs(network: UnitPixels, images: Tensor, store: ImageStore) -> int:
    """Run a few images through, find out how the network runs best (`training.settle`), and look at what comes out.

    Args:
        network: in the mode that is to be tried.
        images: (B, C, H, W) in [0, 1], on the network's device.
        store: the data, whose labels the model must know; a part of a data set may keep the names of more.

    Returns:
        K, the width of the output.

    Raises:
        ModelError: the model fails on these images, gives something else than (B, K) logits with K above the
            largest label, gives probabilities or NaN, or has no gradient.
    """
    images = images.detach().clone().requires_grad_()
    try:
        logits: Any = settle(network, images)
    except Exception as error:  # whatever the user's forward may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the model fails on images of shape {tuple(images.shape)}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        when = " in training mode" if network.training else ""
        raise ModelError(
            f"expected logits of shape ({len(images)}, classes) from the model{when}, got {got}: let its forward give "
            "the logits, or an output with `logits`"
        )
    if logits.shape[1] < (needed := max(2, int(store.labels.max()) + 1)):
        raise ModelError(
            f"the model has {logits.shape[1]} outputs, the labels of the data need {needed}: give its last layer one "
            "output per class"
        )
    if not logits.isfinite().all():
        raise ModelError("the model gives NaN or infinite logits: its weights or its pixel range are wrong")
    same = torch.equal(logits, logits[:1].expand_as(logits))  # of a model that knows nothing, any numbers
    if not same and bool((logits >= 0).all()) and bool(((logits.float().sum(1) - 1).abs() < PROBABLE).all()):
        raise ModelError("the model gives probabilities: let its forward give the logits, without a softmax at the end")
    if not logits.requires_grad or torch.autograd.grad(logits.float().sum(), images, allow_unused=True)[0] is None:
        raise ModelError(
            "the model has no gradient to its images: pass the one that was trained, not quantized or under no_grad"
        )
    if not network.training:  # in which BatchNorm may want more than one image
        try:
            with torch.no_grad(), autocast(images.device):
                alone: Any = network(images[:1])
        except Exception as error:  # whatever the user's forward may raise
            raise ModelError(
                f"the model fails on a single image, where it takes {len(images)}: {shown(error)}; let it flatten(1) "
                "in the place of squeeze()"
            ) from error
        if alone.shape != (1, logits.shape[1]):
            raise ModelError(
                f"the model gives shape {tuple(alone.shape)} for a single image, expected (1, {logits.shape[1]}): let "
                "it flatten(1) in the place of squeeze()"
            )
    return logits.shape[1]


def guessing(accuracy: float, labels: NDArray[np.int64]) -> str:
    """What to say of a model that gets no more images right than one that always says the same class; or nothing.

    Args:
        accuracy: in [0, 1].
        labels: (n,) of the images that it was measured on.
    """
    share = float(np.bincount(labels).max() / len(labels))
    by_chance = share + GUESSING * (share * (1 - share) / len(labels)) ** 0.5
    if accuracy > min(by_chance, 0.99) or len(np.unique(labels)) < 2:
        return ""
    return (
        f"the model gets {accuracy:.0%} of {len(labels)} images right, and one that always says the same class "
        f"{share:.0%}: it has learned nothing, or the data, the order of its classes or the pixel range are not its own"
    )


def renew_head(network: UnitPixels, num_classes: int, images: Tensor) -> None:
    """Random weights of the same norm in the layer that gives the logits, if there is such a layer, see its finder."""
    layer = classifier_layer(network, num_classes, images)
    if layer is not None and isinstance(layer.weight, nn.Parameter):
        norm = layer.weight.detach().norm()
        layer.reset_parameters()
        with torch.no_grad():
            layer.weight.mul_(norm / layer.weight.norm())
            if layer.bias is not None:
                layer.bias.zero_()


def coloured_for(net: nn.Module, store: ImageStore) -> ImageStore:
    """Grey images with three equal channels where the network's first convolution takes three, and not from them."""
    stem = next((layer for layer in net.modules() if isinstance(layer, nn.Conv2d)), None)
    if store.shape[0] != 1 or stem is None or stem.in_channels != 3:
        return store
    network = UnitPixels(net, store.pixel_range)
    try:
        with frozen(network), torch.no_grad():  # it may repeat the channel itself
            network(store.batch(store.readable[:2], device_of(net)).to(dtype_of(net)))
    except Exception:  # whatever its layers raise
        return store.coloured()
    return store
