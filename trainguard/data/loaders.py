"""A user's loader taken apart and put together again around a live view; never iterated."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
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
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter, default_collate

from trainguard.data.pixels import ESTIMATED, PixelRange, fitted_range, loader_range, transform_range
from trainguard.data.samplers import Told, follows, is_setting, scaled, tell, weights_for
from trainguard.data.samples import LABEL_NAMES, Key, class_in
from trainguard.data.sources import rewrapped, unwrap
from trainguard.data.store import ImageStore
from trainguard.data.traces import left_as_is
from trainguard.data.views import SCREEN_FIRST, WAY_OUT, Kept, LiveView
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.rng import isolated_rng

HOSTS = {"timm": "trainguard.integrations.timm_train", "accelerate": "trainguard.integrations.accelerate_loop"}
DISTRIBUTED = ("num_replicas", "rank", "epoch", "drop_last", "shuffle", "seed")  # settings of a `DistributedSampler`
WRITTEN_DOWN = "__pl_"  # attributes in which Lightning writes down how a loader in a hook was built
BUILT_WITH = tuple(f"{WRITTEN_DOWN}saved_{name}" for name in ("args", "kwargs", "default_kwargs"))
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
    host = _host_of(loader, getattr(loader, "dataset", None))
    if host is not None:
        found = _adapter(host).open_loader(loader)
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
    found = _adapter("timm").readable(base) if _host_of(base) == "timm" else None
    return dataset if found is None else rewrapped(found, index)


def part_of(dataset: Any, keep: np.ndarray) -> Subset:
    """The samples `keep` (M,) of a torch data set; of a host that sets its transform, one that takes it."""
    return (Kept if _host_of(dataset) == "timm" else Subset)(dataset, keep.tolist())


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
    subsets = {id(found): found for found in _samplers_in(sampler) if type(found) is SubsetRandomSampler}
    if len(subsets) > 1:
        raise DataError(
            f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it draws from "
            f"{len(subsets)} subsets: {WAY_OUT}"
        )
    return next((np.asarray(found.indices, dtype=np.int64) for found in subsets.values()), None)


def learn_what_is_fed(loader: DataLoader, images: ImageStore) -> None:
    """Tell a store what a loader's own `collate_fn` makes of its images, where that can be told from two of them.

    Their shape, where another number of channels than the images have is believed if grey ones are made colour images.
    And their pixel range, where nothing else has said one: a function of the user's may normalise them.
    """
    if loader.collate_fn is default_collate or loader.batch_sampler is None:
        return
    fed = fed_by(loader, images.readable[:2])
    if fed is None:
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

    As training is fed with them, augmented and collated. None where that cannot be told: there is no one part of the
    batch that is floating-point images, or the user's function does not take these samples.
    """
    _, batch = _batch_of(loader, index)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    fed = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 4 and part.is_floating_point()]
    return fed[0] if len(fed) == 1 and len(fed[0]) == len(index) else None


def labels_by(loader: DataLoader, index: np.ndarray, key: Key) -> list[tuple[int | None, int]]:
    """The labels of the samples `index` (B,), and those in the batch that a loader makes of them.

    Empty where the batch has no such column of whole numbers: labels may have been mixed, or have become vectors.

    Args:
        loader: of a torch data set.
        index: some samples.
        key: where the label is in a sample.
    """
    samples, batch = _batch_of(loader, index)
    if isinstance(batch, Mapping):
        names = [name for name in (key, *LABEL_NAMES) if name in batch]
        found = batch[names[0]] if names else None
    else:
        found = batch[key] if isinstance(batch, (list, tuple)) and isinstance(key, int) and key < len(batch) else None
    if not isinstance(found, torch.Tensor) or found.ndim != 1 or found.is_floating_point() or len(found) != len(index):
        return []
    return list(zip([class_in(sample[key]) for sample in samples], found.tolist(), strict=True))


def _batch_of(loader: DataLoader, index: np.ndarray) -> tuple[list[Any], Any]:
    """Some samples, and what `collate_fn` makes of them; None where it does not take them."""
    collate, dataset = loader.collate_fn, loader.dataset
    with isolated_rng(0, [*find_generators(dataset), *find_generators(collate)]), left_as_is(dataset, collate):
        samples = [dataset[int(row)] for row in index]
        try:
            return samples, collate(list(samples))
        except Exception:  # a user's function may want a whole batch
            return samples, None


def _samplers_in(sampler: Any) -> list[Any]:
    """A sampler and all that it draws from, under whatever names it holds them."""
    inner = [value for value in getattr(sampler, "__dict__", {}).values() if isinstance(value, Sampler)]
    return [sampler, *(found for one in inner for found in _samplers_in(one))]


class Follower:
    """A loader like the given one over a view, and its samplers, which follow the view when it changes.

    Args:
        loader: the user's; shared with the new one are its generator, collate function and all other settings.
        view: of the loader's data set, on the loader's population.

    Attributes:
        loader: the new loader, of the same class.
        original: the user's.

    Raises:
        DataError: the loader has a sampler that cannot be rebuilt.
    """

    def __init__(self, loader: DataLoader, view: LiveView) -> None:
        self.original = loader
        self._view = view
        self._live: dict[int, tuple[Any, Any]] = {}  # id of the user's sampler -> that and ours
        self.loader: DataLoader = copy.copy(loader)
        samplers = self._follow_all()
        # DataLoader forbids setting these one by one; a copy of its state keeps whatever else a subclass or a later
        # version of torch has there, which calling the constructor again would not.
        held = self._held_by_loader()
        vars(self.loader).update(held | {"dataset": view, "_iterator": None, FOLLOWED: loader} | samplers)
        self._take_along()
        if hasattr(loader, "_initial_iter_for_state_dict"):  # torchdata's: the user's iterator waits to be used
            vars(self.loader).update(_initial_iter_for_state_dict=False)

    def refresh(self) -> None:
        """Bring the samplers in line with a view that has changed."""
        self._follow_all()
        for sampler, live in self._live.values():
            tell(sampler, live)

    def _follow_all(self) -> dict[str, Any]:
        return {name: self._follow(getattr(self.original, name)) for name in ("sampler", "batch_sampler")}

    def _take_along(self) -> None:
        """Lightning writes down what a loader in a hook was built with, and builds it anew: of these parts of ours."""
        ours: dict[int, Any] = {id(sampler): live for sampler, live in self._live.values()}
        ours[id(self.original.dataset)] = self._view
        for built in (self.loader, *(live for _, live in self._live.values())):
            written = {name: vars(built)[name] for name in BUILT_WITH if name in vars(built)}
            parts = [part.values() if isinstance(part, dict) else part for part in written.values()]
            if built is self.loader and not any(value is self.original.dataset for part in parts for value in part):
                for name in [name for name in vars(built) if name.startswith(WRITTEN_DOWN)]:
                    del vars(built)[name]  # a class that makes its own data set: Lightning goes by the attributes
            else:
                vars(built).update({name: _exchanged(part, ours) for name, part in written.items()})

    def _held_by_loader(self) -> dict[str, Any]:
        """Where a user's own class of loader holds the data set; one that reads past the data set is refused."""
        loader, dataset, held = self.original, self.original.dataset, {}
        parts = [part for value in getattr(dataset, "__dict__", {}).values() for part in _arrays_in(value)]
        passes_by, size = type(loader).__iter__ is not DataLoader.__iter__, len(dataset)  # type: ignore[arg-type]
        for name, value in vars(loader).items():
            if value is dataset:
                held[name] = self._view
            elif (isinstance(value, _BaseDataLoaderIter) and name != "_iterator") or (
                passes_by and any(_holds(found, size, parts) for found in _arrays_in(value))
            ):
                raise DataError(
                    f"cannot rebuild the loader {type(loader).__name__} without the flagged samples, because of its "
                    f"attribute {name!r}, which reads the data set by itself: protect a plain DataLoader, or "
                    f"{SCREEN_FIRST}"
                )
        return held

    def _follow(self, sampler: Any) -> Any:
        """The sampler that takes a user's place: a copy, of which only what depends on the view is ours."""
        if sampler is None:
            return None
        if id(sampler) in self._live:
            known = self._live[id(sampler)][1]
            self._follow_inner(sampler)
            vars(known).update(self._counts(sampler))
            return known
        if not isinstance(sampler, Sampler):
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples: {WAY_OUT}"
            )
        inner, counts = self._follow_inner(sampler), self._counts(sampler)
        changed = {**self._held(sampler, {*inner, *counts}), **inner, **counts}
        if not changed:
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it does not hold "
                f"the data set: {WAY_OUT}"
            )
        live: Any = copy.copy(sampler)
        if isinstance(vars(live).get("set_epoch"), Told):
            del live.set_epoch
        vars(live).update(changed)
        self._live[id(sampler)] = sampler, live
        return live

    def _follow_inner(self, sampler: Any) -> dict[str, Any]:
        """The samplers that a sampler holds, followed. Accelerate's `prepare` may exchange them later: it knows why."""
        return {name: self._follow(value) for name, value in vars(sampler).items() if isinstance(value, Sampler)}

    def _counts(self, sampler: Any) -> dict[str, Any]:
        """What a sampler computes from the data set once, as it is for the view."""
        view, size, kind = self._view, len(self.original.dataset), type(sampler)  # type: ignore[arg-type]
        if kind is SubsetRandomSampler:
            return {"indices": range(len(view))}
        if isinstance(sampler, RandomSampler) and len(vars(sampler).get("data_source", ())) == size:
            count = vars(sampler).get("_num_samples")
            return {"data_source": view, "_num_samples": None if count is None else scaled(count, view)}
        if kind is SequentialSampler and len(sampler.data_source) == size:
            return {"data_source": view}
        if kind is WeightedRandomSampler and len(sampler.weights) == size:
            weights, count = weights_for(view, sampler.weights), scaled(sampler.num_samples, view)
            if not sampler.replacement:  # torch goes on with samples of weight 0 where those above it are all drawn
                count = min(count, int((weights > 0).sum()))
            return {"weights": weights, "num_samples": count}
        if isinstance(sampler, DistributedSampler) and len(sampler.dataset) == size:  # type: ignore[arg-type]
            plain: DistributedSampler = DistributedSampler(
                view, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
            )
            return {name: getattr(plain, name) for name in ("dataset", "num_samples", "total_size")}
        return _adapter("timm").counts_of(sampler, view) if _host_of(sampler) == "timm" else {}

    def _held(self, sampler: Any, known: set[str]) -> dict[str, Any]:
        """Where a user's own sampler holds the data set, if the rest of what it holds are plain settings."""
        if type(sampler) is BatchSampler:
            return {}
        held, size = {}, len(self.original.dataset)  # type: ignore[arg-type]
        plain = DISTRIBUTED if isinstance(sampler, DistributedSampler) else ()
        for name, value in vars(sampler).items():
            if name in known or name in plain or name.startswith(WRITTEN_DOWN) or isinstance(value, Told):
                continue
            if value is self.original.dataset:
                held[name] = self._view
            elif not is_setting(name, value, size):
                raise DataError(
                    f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, because of its "
                    f"attribute {name!r}: {WAY_OUT}"
                )
        if held and not plain and not follows(sampler, held, self.original.dataset):
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it draws from a "
                f"part of the data set, or by numbers that it once worked out: {WAY_OUT}"
            )
        return held


def _exchanged(written: Any, ours: dict[int, Any]) -> Any:
    """Arguments, as a tuple or by name, with other objects in the place of some, by their ids."""
    if isinstance(written, dict):
        return {name: ours.get(id(value), value) for name, value in written.items()}
    return tuple(ours.get(id(value), value) for value in written)


def _arrays_in(value: Any) -> list[Any]:
    """An array or a list, or those in a tuple, a dict or a `TensorDataset`: what samples are kept in."""
    if isinstance(value, TensorDataset):
        value = value.tensors
    if isinstance(value, (tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [part for part in parts if isinstance(part, (torch.Tensor, np.ndarray, list))]
    return [value] if isinstance(value, (torch.Tensor, np.ndarray, list)) else []


def _holds(found: Any, size: int, parts: list[Any]) -> bool:
    """Whether an array is one of a data set's own, or has a place for each of its samples."""
    shape = getattr(found, "shape", None)
    return any(found is part for part in parts) or (len(found) == size if shape is None else list(shape[:1]) == [size])
