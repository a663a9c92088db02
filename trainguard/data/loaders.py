"""A user's loader taken apart and put together again around a live view; never iterated."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainguard.data.pixels import PixelRange, loader_range, transform_range
from trainguard.data.sources import rewrapped, unwrap
from trainguard.data.views import LiveView
from trainguard.errors import DataError

HOSTS = {"timm": "trainguard.integrations.timm_train", "accelerate": "trainguard.integrations.accelerate_loop"}
PUT_THERE = ("sampler", "batch_sampler", "generator")
FOLLOWED = "_trainguard_followed"  # on a loader of ours: the user's own, which it follows
WAY_OUT = (
    "use one of torch's samplers, or screen first: result = trainguard.screen(dataset, model), and build the loader on "
    "result.apply(dataset)"
)


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
    host = _host_of(loader, getattr(loader, "dataset", None))
    if host is not None:
        found = _adapter(host).open_loader(loader)
    elif isinstance(loader, DataLoader):
        found = HostLoader(loader, lambda inner: inner, pixel_range=loader_range(loader))
    else:
        raise DataError(
            f"expected a torch DataLoader, got {type(loader).__name__}: pass the loader that training iterates"
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
    found = _adapter("timm").readable(base) if _host_of(base) == "timm" else None
    return dataset if found is None else rewrapped(found, index)


def _unprotected(found: HostLoader) -> HostLoader:
    """The loader that a protected one follows: screened again is all of the data, not what was kept."""
    original = vars(found.inner).get(FOLLOWED)
    if original is None:
        raise DataError(
            "the loader is protected already, and was built anew since: protect the loader that it was made of"
        )
    return replace(found, inner=original, dataset=None)


def _host_of(*things: Any) -> str | None:
    packages = [kind.__module__.split(".")[0] for thing in things for kind in type(thing).__mro__]
    return next((package for package in packages if package in HOSTS), None)


def _adapter(host: str) -> Any:
    try:
        return import_module(HOSTS[host])
    except ModuleNotFoundError as error:
        if error.name != HOSTS[host]:
            raise
        raise DataError(
            f"loaders of {host} are not known here: protect the torch DataLoader before it is handed to {host}"
        ) from error


def population_of(loader: DataLoader) -> np.ndarray | None:
    """The samples that a loader may give, (P,) int64 in the sampler's order; None for the whole data set."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while isinstance(getattr(sampler, "sampler", None), Sampler):
        sampler = sampler.sampler
    return np.asarray(sampler.indices, dtype=np.int64) if type(sampler) is SubsetRandomSampler else None


class Follower:
    """A loader like the given one over a view, and its samplers, which follow the view when it changes.

    Args:
        loader: the user's; shared with the new one are its generator, collate function and all other settings.
        view: of the loader's data set, on the loader's population.

    Attributes:
        loader: the new loader, of the same class.

    Raises:
        DataError: the loader has a sampler that cannot be rebuilt.
    """

    def __init__(self, loader: DataLoader, view: LiveView) -> None:
        self._original = loader
        self._view = view
        self._live: dict[int, Any] = {}  # id of the user's sampler -> ours
        self.loader: DataLoader = copy.copy(loader)
        samplers = self._follow_all()
        # DataLoader forbids setting these one by one; a copy of its state keeps whatever else a subclass or a later
        # version of torch has there, which calling the constructor again would not.
        vars(self.loader).update(dataset=view, _iterator=None, **samplers, **{FOLLOWED: loader})
        if hasattr(loader, "_initial_iter_for_state_dict"):  # torchdata's: the user's iterator waits to be used
            vars(self.loader).update(_initial_iter_for_state_dict=False)

    def refresh(self) -> None:
        """Bring the samplers in line with a view that has changed."""
        self._follow_all()

    def _follow_all(self) -> dict[str, Any]:
        return {name: self._follow(getattr(self._original, name)) for name in ("sampler", "batch_sampler")}

    def _follow(self, sampler: Any) -> Any:
        if sampler is None:
            return None
        if not isinstance(sampler, Sampler):
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples: {WAY_OUT}"
            )
        fresh = self._rebuilt(sampler)
        live = self._live.setdefault(id(sampler), fresh)
        own = getattr(sampler, "set_epoch", None)
        if live is fresh and callable(own):
            vars(sampler)["set_epoch"] = _Told(own, live)  # scripts keep a handle of their sampler
        if live is not fresh:  # accelerate's `prepare` may have put its own sampler or generator there: leave those
            vars(live).update({name: value for name, value in vars(fresh).items() if name not in PUT_THERE})
        return live

    def _rebuilt(self, sampler: Any) -> Sampler:
        view, size = self._view, len(self._original.dataset)  # type: ignore[arg-type]
        kind = type(sampler)
        if kind is BatchSampler:
            return BatchSampler(self._follow(sampler.sampler), sampler.batch_size, sampler.drop_last)
        if kind is SubsetRandomSampler:
            return SubsetRandomSampler(range(len(view)), sampler.generator)
        if kind is SequentialSampler and len(sampler.data_source) == size:
            return SequentialSampler(view)
        if kind is RandomSampler and len(sampler.data_source) == size:
            count = None if sampler._num_samples is None else scaled(sampler._num_samples, view)
            return RandomSampler(view, sampler.replacement, count, sampler.generator)
        if kind is WeightedRandomSampler and len(sampler.weights) == size:
            weights = weights_for(view, sampler.weights)
            return WeightedRandomSampler(
                weights.tolist(), scaled(sampler.num_samples, view), sampler.replacement, sampler.generator
            )
        if isinstance(sampler, DistributedSampler) and len(sampler.dataset) == size:  # type: ignore[arg-type]
            plain: DistributedSampler = DistributedSampler(
                view, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
            )
            plain.set_epoch(self._live.get(id(sampler), sampler).epoch)
            return self._copied(sampler, size, vars(plain))
        if _host_of(sampler) == "timm":
            return self._copied(sampler, size, _adapter("timm").counts_of(sampler, view))
        return self._copied(sampler, size)

    def _copied(self, sampler: Any, size: int, known: Mapping[str, Any] = MappingProxyType({})) -> Sampler:
        """A copy of a user's own sampler, if all that it holds is the data set, other samplers and plain settings.

        `known` has the new values of attributes that need no such look.
        """
        changed = dict(known)
        for name, value in vars(sampler).items():
            if name in known or isinstance(value, _Told):
                continue
            if value is self._original.dataset:
                changed[name] = self._view
            elif isinstance(value, Sampler):
                changed[name] = self._follow(value)
            elif not _is_setting(value) or value == size:
                raise DataError(
                    f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, because of its "
                    f"attribute {name!r}: {WAY_OUT}"
                )
        if not changed:
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it does not hold "
                f"the data set: {WAY_OUT}"
            )
        fresh = copy.copy(self._live.get(id(sampler), sampler))  # it may have counted epochs meanwhile
        if isinstance(vars(fresh).get("set_epoch"), _Told):
            del fresh.set_epoch
        vars(fresh).update(changed)
        return fresh


@dataclass(frozen=True, eq=False)
class _Told:
    """In the place of a user's `sampler.set_epoch`: the sampler that took its place is told as well."""

    own: Callable[[int], None]
    live: Any

    def __call__(self, epoch: int) -> None:
        self.own(epoch)
        self.live.set_epoch(epoch)


def weights_for(view: LiveView, weights: torch.Tensor) -> torch.Tensor:
    """Sampling weights by position, from weights by sample: a sample that comes n times shares its weight among them.

    Args:
        view: with len(view) positions.
        weights: (N,) float64, one per sample.

    Returns:
        (len(view),) float64.

    Raises:
        DataError: no kept sample has a weight above 0.
    """
    positions = torch.from_numpy(view.positions)
    times = torch.bincount(positions, minlength=len(weights))
    shared = weights.cpu()[positions] / times[positions]
    if not bool((shared > 0).any()):
        raise DataError("every kept sample has the sampling weight 0: there is nothing left to train on")
    return shared


def scaled(count: int, view: LiveView) -> int:
    """A number of samples per epoch, shortened as the view is; at least 1."""
    return max(1, round(count * view.share))


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.Generator))
