"""The user's model as a function of unit pixels: copied, checked, and given back in the form in which it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainguard.errors import ModelError
from trainguard.models import logits_of

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange


class UnitPixels(nn.Module):
    """A classifier that eats images in [0, 1].

    Args:
        net: eats images in its own pixel range and gives logits, or an output that has `logits`.
        pixel_range: from unit pixels to the model's own.
        channels_last: hand the images over in channels_last memory format.
    """

    def __init__(self, net: nn.Module, pixel_range: PixelRange, channels_last: bool = True) -> None:
        super().__init__()
        self.net = net
        self.pixel_range = pixel_range
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, K) logits."""
        return logits_of(self.net(self.pixel_range.to_model(x).contiguous(memory_format=self.format)))


def for_training(net: nn.Module, device: torch.device) -> nn.Module:
    """The copy made ready for fine-tuning: float32, on the device, channels_last, every parameter open."""
    net.to(device=device, dtype=torch.float32)
    net.to(memory_format=torch.channels_last)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    return net


def check_outputs(network: UnitPixels, images: Tensor, num_classes: int) -> int:
    """Run a few images through and look at what comes out.

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
        with torch.no_grad():
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


def classifier_layer(net: nn.Module, num_classes: int) -> nn.Module | None:
    """The last linear layer with `num_classes` outputs, whose input is 'the features' (PBE Sec. 4.3.2), or None."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    return layers[-1] if layers else None
