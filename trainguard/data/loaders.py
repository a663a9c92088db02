"""A user's loader taken apart, and what it makes of a few samples; never iterated."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.data.dataloader import default_collate

from trainguard.data.pixels import ESTIMATED, PixelRange, fitted_range, loader_range, transform_range
from trainguard.data.samples import Key
from trainguard.data.sources import rewrapped, unwrap
from trainguard.data.store import ImageStore
from trainguard.data.traces import left_as_is
from trainguard.data.views import Kept, LiveView
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.rng import isolated_rng

HOSTS = {"timm": "trainguard.integrations.timm_train", "accelerate": "trainguard.integrations.accelerate_loop"}
FOLLOWED = "_trainguard_followed"  # on a loader of ours: the user's own, which it follows


@dataclass(frozen=True)
class HostLoader:
    """A loader of any host as the guard sees it. Modules named in `HOSTS` give one from `open_loader(loader)`.

    Attributes:
        inner: the torch loader at the core.
        rebuild: makes the host's loader around a new inner one.
        dataset: what screening reads, if not `inner.dataset`: a copy with an evaluation transform.
        pixel_range: where the loader itself normalises, or the function that makes its batches.
    """

    inner: DataLoader
    rebuild: Callable[[DataLoader], Any]
    dataset: Any = None
    pixel_range: PixelRange | None = None


def open_loader(loader: Any) -> HostLoader:
    """Take a loader apart. From one that is protected already the loader that it was made of is taken.

    Args:
        loader: a torch `DataLoader`, or one of a host that has a module in `HOSTS`, by its own type or its data set's.

    Raises:
        DataError: neither, or its data set is iterable, or it was protected and then built anew by a host.
    """
    host = host_of(loader, getattr(loader, "dataset", None))
    if host is not None:
        found = adapter(host).open_loader(loader)
    elif isinstance(loader, DataLoader):
        found = HostLoader(loader, lambda inner: inner, pixel_range=loader_range(loader))
    else:
        raise DataError(
            f"expected a torch DataLoader, got {type(loader).__name__}: pass the loader that training iterates, before "
            "a host wraps it"
        )
    if isinstance(found.inner.dataset, LiveView):
        found = _unprotected(found)
    if found.dataset is None:
        found = replace(found, dataset=readable(found.inner.dataset))
    if found.pixel_range is None:
        found = replace(found, pixel_range=transform_range(found.inner.collate_fn))
    library = sys.modules.get("datasets")
    streaming = library is not None and isinstance(found.inner.dataset, library.IterableDataset)
    if isinstance(found.inner.dataset, IterableDataset) or streaming:
        hint = "load it with streaming=False" if streaming else "use a map-style data set with __len__ and __getitem__"
        raise DataError(f"the loader's data set is iterable, it has no positions to flag: {hint}")
    return found


def readable(dataset: Any) -> Any:
    """What screening reads in place of a host's data set that hides samples it cannot read; others as they are."""
    base, index = unwrap(dataset)
    found = adapter("timm").readable(base) if host_of(base) == "timm" else None
    return dataset if found is None else rewrapped(found, index)


def part_of(dataset: Any, keep: np.ndarray) -> Subset:
    """The samples `keep` (M,) of a torch data set; of a host that sets its transform, one that takes it."""
    base, index = unwrap(dataset)
    if host_of(base) != "timm":
        return Subset(dataset, keep.tolist())
    return Kept(base, (keep if index is None else index[keep]).tolist())


def _unprotected(found: HostLoader) -> HostLoader:
    """The loader that a protected one follows: screened again is all of the data, not what was kept."""
    original = vars(found.inner).get(FOLLOWED)
    if original is None:
        raise DataError(
            "the loader is protected already, and was built anew since: protect the loader that it was made of"
        )
    return replace(found, inner=original, dataset=None)


def host_of(*things: Any) -> str | None:
    """Which host a loader, a data set or a sampler is of, by the package of its class; None for none of `HOSTS`."""
    packages = [kind.__module__.split(".")[0] for thing in things for kind in type(thing).__mro__]
    return next((package for package in packages if package in HOSTS), None)


def adapter(host: str) -> Any:
    """The module that knows a host.

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(HOSTS[host])
    except ModuleNotFoundError as error:
        if error.name != HOSTS[host]:
            raise
        raise DataError(
            f"loaders of {host} are not known here: protect the torch DataLoader before it is handed to {host}"
        ) from error


def learn_what_is_fed(loader: DataLoader, images: ImageStore) -> None:
    """Tell a store what a loader's own `collate_fn` makes of its images, where that can be told from two of them.

    Their shape, where another number of channels than the images have is believed if grey ones are made colour images.
    And their pixel range, where nothing else has said one: a function of the user's may normalise them.
    """
    if loader.collate_fn is default_collate or loader.batch_sampler is None:
        return
    fed = fed_by(loader, images.readable[:2])
    if fed is None or not fed.is_floating_point():
        return
    (_, channels, height, width), own = fed.shape, images.shape[0]
    if channels != own and (own, channels) != (1, 3):
        return
    images.fed_shape = (channels, height, width)
    if images.pixel_range.source in ("assumed", ESTIMATED) and images.fed_shape == images.shape:
        found = fitted_range(images.batch(images.readable[:2]), fed.cpu())
        if found is not None and not found.agrees_with(images.pixel_range):
            images.pixel_range = found


def fed_by(loader: DataLoader, index: np.ndarray) -> torch.Tensor | None:
    """The images (B, C, H, W) in the batch that a loader makes of the samples `index` (B,).

    As training is fed with them, augmented and collated: floating-point numbers, or bytes that the model normalises
    itself. None where that cannot be told: there is no one part of the batch that is images, or the user's function
    does not take these samples.
    """
    batch = batch_of(loader, samples_at(loader.dataset, index))
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    fed = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 4]
    fed = [part for part in fed if part.is_floating_point() or part.dtype == torch.uint8]
    return fed[0] if len(fed) == 1 and len(fed[0]) == len(index) else None


def samples_at(dataset: Any, index: Iterable[int]) -> list[Any]:
    """Some samples as training sees them, with no trace of their having been read."""
    with isolated_rng(0, find_generators(dataset)), left_as_is(dataset):
        return [dataset[int(row)] for row in index]


def batch_of(loader: DataLoader, samples: Iterable[Any]) -> Any:
    """What a loader's `collate_fn` makes of samples; None where it does not take them."""
    collate = loader.collate_fn
    with isolated_rng(0, find_generators(collate)), left_as_is(collate):
        try:
            return collate([copy.copy(sample) for sample in samples])
        except Exception:  # a user's function may want a whole batch
            return None


def whole_numbers_in(batch: Any) -> dict[Key, list[int]]:
    """The columns of whole numbers in a batch, by name or position: labels may be among them."""
    parts: Iterable[tuple[Key, Any]] = ()
    if isinstance(batch, (Mapping, list, tuple)):
        parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    found = ((name, part) for name, part in parts if isinstance(part, torch.Tensor) and part.ndim == 1)
    return {name: part.tolist() for name, part in found if not part.is_floating_point() and not part.is_complex()}
