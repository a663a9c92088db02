"""A loader followed by a view of its data set, with a loader and samplers over it, and what must hold of these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from trainguard.data.loaders import FOLLOWED, HostLoader, adapter, batch_of, host_of, samples_at, whole_numbers_in
from trainguard.data.samplers import (
    Told,
    draws_by_itself,
    follows,
    is_setting,
    part_of_all,
    scaled,
    tell,
    weights_for,
)
from trainguard.data.samples import Key, class_in, find_derived, find_label, find_twins, relabelled
from trainguard.data.sources import spread
from trainguard.data.store import ImageStore
from trainguard.data.traces import left_as_is
from trainguard.data.views import SCREEN_FIRST, WAY_OUT, LiveView
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.rng import isolated_rng
from trainguard.warning import warn

LOOKED_AT = 64  # rows that say whether a sample holds its label twice, and whether it is the one that is screened
CLASSES = 8  # of which batches are made, to see whether they have the labels that their samples have
COPIES = 4  # of a sample in such a batch: a function may bring samples into another order
OTHERS = 0.1  # share of the rows that may have another label each time they are read
DISTRIBUTED = ("num_replicas", "rank", "epoch", "drop_last", "shuffle", "seed")  # settings of a `DistributedSampler`
WRITTEN_DOWN = "__pl_"  # attributes in which Lightning writes down how a loader in a hook was built
BUILT_WITH = tuple(f"{WRITTEN_DOWN}saved_{name}" for name in ("args", "kwargs", "default_kwargs"))


def follow(host: HostLoader) -> LiveView:
    """A view of the loader's data set that still shows everything, with the loader over it; nothing is read for it.

    Raises:
        DataError: the loader or its sampler cannot be followed.
    """
    view = LiveView(host.inner.dataset, 1, population_of(host.inner))
    view.follower = Follower(host.inner, view)
    return view


def find_labels(view: LiveView, images: ImageStore, label_column: Key | None) -> None:
    """Tell a view where the label is in a sample, and see that training gets those that are screened.

    Raises:
        DataError: it does not, or new labels of flagged samples would not reach it.
    """
    rows, some = _looked_at(view._view_dataset, images)
    label_key = find_label(some[0], images.label_key if label_column is None else label_column)
    twins = find_twins(some if len(some[0]) > 2 else [], label_key)
    _check_labels(images, rows, [class_in(sample[label_key]) for sample in some])
    _check_batches(view.follower.original, images, label_key, twins)
    view._view_label_key, view._view_twins = label_key, twins


def check_order(view: LiveView, images: ImageStore) -> None:
    """The data set behind a view must still have its samples where they were when they were screened.

    Warns of what samples hold beside their label that follows from it: nobody but the user knows what it is for.

    Raises:
        DataError: it has not.
    """
    rows, some = _looked_at(view._view_dataset, images)
    key = view._view_label_key
    _check_labels(images, rows, [class_in(sample[key]) for sample in some], moved=True)
    if derived := find_derived(some, key, view._view_twins):
        warn(
            f"{', '.join(map(repr, derived))} of a sample goes with its label {key!r}, and stays as it was where a "
            "flagged sample gets another one: if training learns from it, let collate_fn make it from the label"
        )


def _looked_at(dataset: Any, images: ImageStore) -> tuple[list[int], list[Any]]:
    """Some rows of a data set, and the samples that training sees there; none that is missing (`on_error="skip"`)."""
    rows = spread(images.readable, LOOKED_AT)
    found = [(row, sample) for row, sample in zip(rows, samples_at(dataset, rows), strict=True) if sample is not None]
    if not found:
        raise DataError(f"the data set gives None for all of {len(rows)} rows that were read before: read it anew")
    return [row for row, _ in found], [sample for _, sample in found]


def _check_labels(images: ImageStore, rows: Sequence[int], seen: Sequence[int | None], *, moved: bool = False) -> None:
    """Training must see the labels that are screened; where they are drawn at random a few may differ.

    Args:
        images: of the data set.
        rows: some of its samples.
        seen: their labels, as training sees them now.
        moved: they were as they should be when the data set was screened.
    """
    other = [(row, label) for row, label in zip(rows, seen, strict=True) if label not in (None, images.labels[row])]
    if len(other) > OTHERS * len(rows):
        row, label = other[0]
        if moved:
            raise DataError(
                f"the data set has changed since it was screened: {images.name(row)} had the label "
                f"{images.labels[row]} and has {label} now; flagged samples are known by their place, so let a sampler "
                "or the loader's shuffle=True bring them into another order"
            )
        raise DataError(
            f"training sees other labels than the data set holds: {images.name(row)} has {images.labels[row]}, and "
            f"training gets {label}; say which is meant by label_column=, or give the data set itself the labels that "
            "training needs (of a Hugging Face data set by map() in place of with_transform())"
        )


def _check_batches(loader: DataLoader, images: ImageStore, label_key: Key, twins: Sequence[Key]) -> None:
    """A loader must give samples one by one to the view, and their labels to training as they are, new ones too."""
    classes, last = np.unique(images.labels[images.readable[::-1]], return_index=True)
    some = images.readable[::-1][last[:CLASSES]]  # the first ones' numbers might be their labels
    _check_fetched(loader.dataset, some)
    if loader.collate_fn is not default_collate and loader.batch_sampler is not None:
        _check_collated(loader, images, some, classes, label_key, twins)


def _check_fetched(dataset: Any, some: np.ndarray) -> None:
    """A data set that is asked for several samples (n,) at once must give them one by one."""
    fetch = getattr(dataset, "__getitems__", None)
    if not callable(fetch):
        return
    with isolated_rng(0, find_generators(dataset)), left_as_is(dataset):
        fetched = fetch(some.tolist())
    if not isinstance(fetched, list) or len(fetched) != len(some):
        raise DataError(
            f"the data set's __getitems__ gives a {type(fetched).__name__} for {len(some)} samples: let it give a "
            "list of samples, and make batches in collate_fn"
        )


def _check_collated(
    loader: DataLoader, images: ImageStore, some: np.ndarray, classes: np.ndarray, label_key: Key, twins: Sequence[Key]
) -> None:
    """What makes batches must leave the labels of samples (n,) as they are, and follow new ones out of all classes."""
    seen: list[tuple[str, int, int, Any, Any]] = []  # name, label, another one, and the batches that are made of each
    for row, sample in zip(some, samples_at(loader.dataset, some), strict=True):
        label = None if sample is None else class_in(sample[label_key])
        if label is None:
            continue
        other = int(classes[(np.searchsorted(classes, label) + 1) % len(classes)])
        one, two = (
            whole_numbers_in(batch_of(loader, [each] * COPIES))
            for each in (sample, relabelled(sample, label_key, other, twins))
        )
        seen.append((images.name(row), label, other, one, two))
    names = [name for name in (seen[0][3] if seen else ()) if all(name in one and name in two for *_, one, two in seen)]
    given = [name for name in names if all(set(one[name]) == {label} for _, label, _, one, _ in seen)]
    if any(all(set(two[name]) == {other} for _, _, other, _, two in seen) for name in given):
        return
    for row_name, label, _, one, two in seen:
        for name in names:
            if one[name] != two[name] and set(one[name]) != {label}:
                raise DataError(
                    f"collate_fn changes labels: {row_name} has {label}, and training gets {one[name][0]}; give the "
                    "data set the labels that training needs, or new labels of flagged samples would be changed again"
                )
    if given:
        raise DataError(
            "collate_fn takes labels from another part of the samples than the label, so that new labels of flagged "
            f"samples would not reach training: {seen[0][0]} is given {seen[0][2]}, and training still gets "
            f"{seen[0][1]}; let it take them from {label_key!r}"
        )


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
            vars(known).update(self._counts(sampler, self._view))
            return known
        if not isinstance(sampler, Sampler):
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples: {WAY_OUT}"
            )
        inner, counts = self._follow_inner(sampler), self._counts(sampler, self._view)
        changed = {**self._held(sampler, {*inner, *counts}), **inner, **counts}
        if not changed:
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it does not hold "
                f"the data set: {WAY_OUT}"
            )
        if draws_by_itself(sampler) and not self._draws_from_all(sampler):
            raise DataError(
                f"cannot rebuild the sampler {type(sampler).__name__} without the flagged samples, it draws from a "
                f"part of the data set, or by numbers that it once worked out, or more than positions: {WAY_OUT}"
            )
        live = _copied(sampler, changed)
        self._live[id(sampler)] = sampler, live
        return live

    def _draws_from_all(self, sampler: Any) -> bool:
        """Whether a user's own sampler follows its data set, as far as an epoch tells."""
        few = LiveView(self.original.dataset, 1, part_of_all(len(self.original.dataset)))  # type: ignore[arg-type]
        return follows(sampler, lambda: self._over(sampler, few), few, self._view._view_population)

    def _over(self, sampler: Any, view: LiveView) -> Any:
        """A copy of a sampler over another view, to see whether it keeps to that."""
        inner = {name: self._over(value, view) for name, value in vars(sampler).items() if isinstance(value, Sampler)}
        held = {name: view for name, value in vars(sampler).items() if value is self.original.dataset}
        return _copied(sampler, inner | held | self._counts(sampler, view))

    def _follow_inner(self, sampler: Any) -> dict[str, Any]:
        """The samplers that a sampler holds, followed. Accelerate's `prepare` may exchange them later: it knows why."""
        return {name: self._follow(value) for name, value in vars(sampler).items() if isinstance(value, Sampler)}

    def _counts(self, sampler: Any, view: LiveView) -> dict[str, Any]:
        """What a sampler computes from the data set once, as it is for a view."""
        size, kind = len(self.original.dataset), type(sampler)  # type: ignore[arg-type]
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
        return adapter("timm").counts_of(sampler, view) if host_of(sampler) == "timm" else {}

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
        return held


def _copied(sampler: Any, changed: dict[str, Any]) -> Any:
    """A copy of a sampler that holds something else under some names, and that nobody else is told of."""
    live: Any = copy.copy(sampler)
    if isinstance(vars(live).get("set_epoch"), Told):
        del live.set_epoch
    vars(live).update(changed)
    return live


def _samplers_in(sampler: Any) -> list[Any]:
    """A sampler and all that it draws from, under whatever names it holds them."""
    inner = [value for value in getattr(sampler, "__dict__", {}).values() if isinstance(value, Sampler)]
    return [sampler, *(found for one in inner for found in _samplers_in(one))]


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
