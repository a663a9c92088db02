"""What a classifier sees of images: the input of the layer that gives its logits (PBE Sec. 4.3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainguard.perturbation import frozen


def classifier_layer(network: nn.Module, num_classes: int, images: Tensor) -> nn.Linear | None:
    """The linear layer that gives the logits; None where none does.

    Args:
        network: in any mode, and as before when the call returns.
        num_classes: K, outputs of that layer.
        images: (B, C, H, W), what the network eats. Of several such layers the one that runs last on these counts: a
            head for training alone, or an old one, does not.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if len(layers) < 2:
        return layers[0] if layers else None
    ran: list[nn.Linear] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in layers]
    try:
        with frozen(network), torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran else None


class Tap:
    """Keeps what went into the classifier's last layer, or takes the logits where there is no such layer."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The hook: as torch calls it before the layer runs."""
        self.last = next(iter((*inputs, *named.values())))

    def read(self, logits: Tensor) -> Tensor:
        """(B, D) float32 features of the images that the logits (B, K) were just computed from.

        The logits themselves where the layer did not run, or was given several rows for each image.
        """
        last, self.last = self.last, None
        features = logits if last is None or len(last) != len(logits) else last
        return features.float().flatten(1)


@contextmanager
def watched(layer: nn.Module | None) -> Iterator[Tap]:
    """Watch what goes into a layer while the block runs."""
    tap = Tap()
    hook = None if layer is None else layer.register_forward_pre_hook(tap, with_kwargs=True)
    try:
        yield tap
    finally:
        if hook is not None:
            hook.remove()
