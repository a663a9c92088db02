"""How `purify` and `audit` begin: the data opened, the model copied and made ready, and both tried on each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainguard.distributed import Processes
from trainguard.errors import DataError
from trainguard.models import UnitPixels, copy_of, device_of
from trainguard.purification.network import check_outputs, coloured_for, for_training
from trainguard.rng import isolated_rng
from trainguard.training import check_hooks
from trainguard.warning import warn

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange
    from trainguard.data.store import ImageStore

Model = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class Opened:
    """A model and labelled images of the kind that it was trained on.

    Attributes:
        model: as it was given; never changed.
        store: the images, with three channels where the model takes grey ones so.
        network: a copy of the model for unit pixels, in eval mode.
        few: (2, C, H, W) of the images in [0, 1], on the device.
        classes: K, outputs of the network, at least as many as the data have classes.
        device: where to compute.
        as_given: what model input values mean, for images with as many channels as the data had.
    """

    model: Model
    store: ImageStore
    network: UnitPixels
    few: Tensor
    classes: int
    device: torch.device
    as_given: PixelRange

    def another(self) -> UnitPixels:
        """A further copy of the model."""
        return UnitPixels(for_training(copy_of(self.model), self.device), self.store.pixel_range)

    def to_tune(self) -> UnitPixels:
        """A further copy, in eval mode, run in a way that serves it in training mode as well.

        Raises:
            ModelError: it fails in one of the two.
        """
        tried = self.another().train()
        check_outputs(tried, self.few, self.store)
        way = tried.format, tried.mixed
        del tried
        network = self.another().eval()
        network.format, network.mixed = way
        check_outputs(network, self.few, self.store)
        return network

    def more(self, data: Any, **reading: Any) -> ImageStore:
        """Further images of the same kind, to judge on.

        Args:
            data: see `purify`, which calls them `validation`.
            **reading: of `open_images`.

        Raises:
            DataError: they cannot be used, or are not of the same kind.
        """
        store = coloured_for(self.network.net, open_store(data, self.as_given, comparable=False, **reading))
        _check_alike(store, self.store, self.classes)
        return store


def opened(
    model: Model, data: Any, pixel_range: PixelRange | None, *, accelerator: Any, seed: int, **reading: Any
) -> Opened:
    """Open both.

    Args:
        model: see `purify`.
        data: likewise.
        pixel_range: what the model's input values mean, where it is known.
        accelerator: says where to compute; None: where the model is.
        seed: of what a model may draw.
        **reading: of `open_images`.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be copied, or does not fit the data.
    """
    Processes.of(accelerator)  # before all is read: it may be none
    store = open_store(data, pixel_range, comparable=False, **reading)
    net, as_given = copy_of(model), store.pixel_range
    store = coloured_for(net, store)
    device = accelerator.device if accelerator is not None else device_of(net)
    network = UnitPixels(for_training(net, device), store.pixel_range).eval()
    with isolated_rng(seed):
        few = store.batch(store.readable[[0, -1]], device)
        check_hooks(model, network, few)
        classes = check_outputs(network, few, store)
    return Opened(model, store, network, few, classes, device, as_given)


def open_store(data: Any, pixel_range: PixelRange | None = None, **reading: Any) -> ImageStore:
    """`data` as a store of images in unit pixels; one that is open already stays as it is, but for a given range.

    Args:
        data: see `purify`.
        pixel_range: what the model's input values mean, where it is known.
        **reading: of `open_images`.
    """
    from trainguard.data.loaders import readable
    from trainguard.data.pixels import ASSUMED
    from trainguard.data.store import ImageStore, open_images

    if not isinstance(data, ImageStore):
        store = open_images(readable(data), pixel_range=pixel_range, **reading)
        if store.pixel_range.source == "assumed":
            warn(f"{ASSUMED}, if it was trained with something else")
        return store
    if pixel_range is None:
        return data
    store = copy.copy(data)
    store.pixel_range = pixel_range.for_channels(data.shape[0])
    return store


def _check_alike(trusted: ImageStore, store: ImageStore, classes: int) -> None:
    """Refuse images of another size, of more classes than the model has outputs, or with classes numbered otherwise."""
    if trusted.shape != store.shape:
        raise DataError(
            f"validation= has images of shape {trusted.shape}, the data of {store.shape}: bring them to one size"
        )
    if (largest := int(trusted.labels.max())) >= classes:
        raise DataError(f"validation= has the label {largest}, the model {classes} outputs, 0 to {classes - 1}")
    if all(each.class_names != tuple(map(str, range(each.num_classes))) for each in (trusted, store)):
        for label, (name, own) in enumerate(zip(trusted.class_names, store.class_names, strict=False)):
            if name != own:
                raise DataError(
                    f"validation= calls class {label} {name!r}, the data {own!r}: both need the same classes"
                )
