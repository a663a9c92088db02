"""A loader's data set followed by a view: where its labels are, and what must hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, default_collate

from trainguard.data.loaders import Follower, HostLoader, labels_by, population_of
from trainguard.data.samples import Key, class_in, find_label, find_twins
from trainguard.data.sources import spread
from trainguard.data.store import ImageStore
from trainguard.data.traces import left_as_is
from trainguard.data.views import LiveView
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.rng import isolated_rng

LOOKED_AT = 64  # rows that say whether a sample holds its label twice, and whether it is the one that is screened
CLASSES = 8  # of which a batch is made, to see whether it has the labels that its samples have
OTHERS = 0.1  # share of the rows that may have another label each time they are read


def follow(host: HostLoader, images: ImageStore, label_column: Key | None) -> LiveView:
    """A view of the loader's data set that still shows everything, with the loader over it."""
    dataset: Any = host.inner.dataset
    population = population_of(host.inner)
    rows, some = _looked_at(dataset, images)
    label_key = find_label(some[0], images.label_key if label_column is None else label_column)
    twins = find_twins(some if len(some[0]) > 2 else [], label_key)
    _check_labels(images, rows, [class_in(sample[label_key]) for sample in some])
    _check_batches(host.inner, images, label_key)
    view = LiveView(dataset, label_key, population, twins)
    view.follower = Follower(host.inner, view)
    return view


def check_order(view: LiveView, images: ImageStore) -> None:
    """The data set behind a view must still have its samples where they were when they were screened.

    Raises:
        DataError: it has not.
    """
    rows, some = _looked_at(view._view_dataset, images)
    _check_labels(images, rows, [class_in(sample[view._view_label_key]) for sample in some], moved=True)


def _looked_at(dataset: Any, images: ImageStore) -> tuple[list[int], list[Any]]:
    """Some rows of a data set, and the samples that training sees there."""
    with isolated_rng(0, find_generators(dataset)), left_as_is(dataset):
        rows = spread(images.readable, LOOKED_AT)
        return rows, [dataset[row] for row in rows]


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


def _check_batches(loader: DataLoader, images: ImageStore, label_key: Key) -> None:
    """A loader must give samples one by one to the view, and their labels as they are to training."""
    labels = images.labels[images.readable]
    some = images.readable[np.unique(labels, return_index=True)[1][:CLASSES]]
    fetch = getattr(loader.dataset, "__getitems__", None)
    if callable(fetch):
        with isolated_rng(0, find_generators(loader.dataset)), left_as_is(loader.dataset):
            fetched = fetch(some.tolist())
        if not isinstance(fetched, list) or len(fetched) != len(some):
            raise DataError(
                f"the data set's __getitems__ gives a {type(fetched).__name__} for {len(some)} samples: let it give a "
                "list of samples, and make batches in collate_fn"
            )
    if loader.collate_fn is default_collate or loader.batch_sampler is None:
        return
    for row, (own, label) in zip(some, labels_by(loader, some, label_key), strict=False):
        if own not in (None, label):
            raise DataError(
                f"collate_fn changes labels: {images.name(row)} has {own}, and training gets {label}; give the data "
                "set the labels that training needs, or new labels of flagged samples would be changed again"
            )
