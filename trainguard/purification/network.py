"""The user's model as purification works on it: made ready, and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainguard.errors import ModelError
from trainguard.models import UnitPixels, classifier_layer, short_strides


def for_training(net: nn.Module, device: torch.device) -> nn.Module:
    """The copy made ready for fine-tuning: float32 (or complex), on the device, channels_last, parameters open."""
    net.to(device=device)
    for value in (*net.parameters(), *net.buffers()):
        if value.is_floating_point():
            value.data = value.data.float()
        if value.ndim == 4:
            value.data = value.data.to(memory_format=torch.channels_last)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    return net


def check_outputs(network: UnitPixels, images: Tensor, num_classes: int) -> int:
    """Run a few images through and look at what comes out. Strides of the network may be shortened on the way.

    Args:
        network: in eval mode.
        images: (B, C, H, W) in [0, 1], on the network's device.
        num_classes: classes of the data set.

    Returns:
        K, the width of the output.

    Raises:
        ModelError: the model fails on these images, gives something else than (B, K) logits with K >= `num_classes`, or
            gives NaN.
    """
    try:
        with torch.no_grad(), short_strides(network):
            logits: Any = network(images)
    except Exception as error:  # whatever the user's forward may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the model fails on images of shape {tuple(images.shape)}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected logits of shape ({len(images)}, classes) from the model, got {got}")
    if logits.shape[1] < num_classes:
        raise ModelError(f"the model has {logits.shape[1]} outputs, the data set has {num_classes} classes")
    if not logits.isfinite().all():
        raise ModelError("the model gives NaN or infinite logits: its weights or its pixel range are wrong")
    return logits.shape[1]


def renew_head(net: nn.Module, num_classes: int) -> None:
    """Random weights of the same norm in the layer that gives the logits, if there is such a layer."""
    layer = classifier_layer(net, num_classes)
    if isinstance(layer, nn.Linear) and isinstance(layer.weight, nn.Parameter):
        norm = layer.weight.detach().norm()
        layer.reset_parameters()
        with torch.no_grad():
            layer.weight.mul_(norm / layer.weight.norm())
            if layer.bias is not None:
                layer.bias.zero_()


class Tap:
    """Keeps what went into the classifier's last layer, or takes the logits where there is no such layer."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook: as torch calls it before the layer runs."""
        self.last = inputs[0]

    def read(self, logits: Tensor) -> Tensor:
        """(B, D) float32 features of the images that the logits (B, K) were just computed from."""
        features = logits if self.last is None else self.last
        return features.float().flatten(1)


@contextmanager
def features_of(net: nn.Module, classes: int) -> Iterator[Tap]:
    """Watch the features while the block runs: the input of the last linear layer with `classes` outputs."""
    tap, layer = Tap(), classifier_layer(net, classes)
    hook = layer.register_forward_pre_hook(tap) if layer is not None else None
    try:
        yield tap
    finally:
        if hook is not None:
            hook.remove()
