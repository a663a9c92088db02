"""Kinds of data sets, and how each gives a sample decoded but not augmented."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import VisionDataset

from trainguard.data.hugging_face import HuggingFaceSource
from trainguard.data.samples import Key, as_floats, find_keys, is_image
from trainguard.data.source import Source
from trainguard.data.traces import left_as_is
from trainguard.data.views import Kept
from trainguard.data.walk import attributes_of
from trainguard.errors import DataError
from trainguard.rng import Generator, seed_streams

PROOF_ROWS = 256  # a step that touches 2% of the images is seen with a probability of 99.4%
TRANSFORM_NAMES = ("transform", "image_transform", "tf", "preprocess")


def open_source(
    dataset: Any, image_column: Key | None = None, label_column: Key | None = None, generators: Sequence[Generator] = ()
) -> Source:
    """Find out what kind of data set this is. Reads some samples and draws random numbers: isolate the streams.

    Args:
        dataset: a map-style torch data set (subsets of subsets included) or a Hugging Face `Dataset`.
        image_column: key or position of the image in a sample, where it cannot be told.
        label_column: likewise of the label.
        generators: random generators that the data set keeps.

    Raises:
        DataError: the data set has no positions (iterable), several splits, no samples, or no clear image and label.
    """
    base, index = unwrap(dataset)
    _refuse(base)
    size = len(base) if index is None else len(index)
    if size == 0:
        raise DataError("the data set is empty: expected at least two samples of two classes")
    if is_hugging_face(base):
        source: Source = HuggingFaceSource(base, image_column, label_column)
    else:
        rows = index if index is not None else np.arange(size)
        source = TorchSource(base, image_column, label_column, spread(rows, PROOF_ROWS), generators)
    return source if index is None else SubsetSource(source, index)


def unwrap(dataset: Any) -> tuple[Any, np.ndarray | None]:
    """The data set under a chain of `Subset`s, and its indices (N,) int64 in order; None where there is no chain."""
    index = None
    while type(dataset) in (Subset, Kept):
        below = np.asarray(dataset.indices, dtype=np.int64).reshape(-1)
        index = below if index is None else below[index]
        dataset = dataset.dataset
    return dataset, index


def rewrapped(base: Any, index: np.ndarray | None) -> Any:
    """The inverse of `unwrap`."""
    return base if index is None else Subset(base, index.tolist())


def spread(rows: np.ndarray, count: int) -> list[int]:
    """At most `count` of `rows`, evenly over them, the first one included."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int))].tolist()


def path_at(dataset: Any, index: int) -> str | None:
    """The file of a sample, for data sets with a list `samples` or `imgs` of (path, label)."""
    for name in ("samples", "imgs"):
        entries = getattr(dataset, name, None)
        if isinstance(entries, list) and index < len(entries):
            entry = entries[index]
            first = entry[0] if isinstance(entry, (tuple, list)) and entry else entry
            return str(first) if isinstance(first, str) or hasattr(first, "__fspath__") else None
    return None


def is_hugging_face(dataset: Any) -> bool:
    """Whether this is a map-style Hugging Face `Dataset`; does not import the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, library.Dataset)


class TorchSource(Source):
    """A map-style torch data set.

    One with an attribute `transform` is read without it, if on a few hundred rows what it then gives, sent through the
    transform, is bit for bit what training gets: only then is nothing else done to the image, before or after. A data
    set with a method `read_raw(index)`, giving (decoded image, label), is read by that. Others are read as training
    reads them.

    Args:
        dataset: to read.
        image_column: key or position of the image in a sample, where it cannot be told.
        label_column: likewise of the label.
        rows: where to compare.
        generators: random generators that the data set keeps.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: Key | None,
        label_column: Key | None,
        rows: Sequence[int],
        generators: Sequence[Generator],
    ) -> None:
        self.size = len(dataset)
        found = (getattr(dataset, name, None) for name in TRANSFORM_NAMES)
        self._transform = next((one for one in found if callable(one)), None)
        # Whoever sets `dataset.transform` anew leaves torchvision's `dataset.transforms` stale: look at one of them.
        self.transform = self._transform if isinstance(dataset, VisionDataset) else dataset
        self._dataset = dataset
        self._wanted = image_column, label_column
        self._keys: tuple[Key, Key] | None = None
        self._read_raw = dataset.read_raw if _is_own(dataset, "read_raw") else None
        self._transform_name = None if self._read_raw else _own_transform(dataset)
        if self._transform_name is not None and not self._transform_is_all(rows, generators):
            self._transform_name = None
        self.raw = self._read_raw is not None or self._transform_name is not None
        # Names are of the labels that a data set keeps, which are others once a `target_transform` has changed them.
        changed = getattr(dataset, "target_transform", None) is not None
        names = None if changed else getattr(dataset, "classes", None)
        self.class_names = tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        if self._read_raw is not None:
            return self._read_raw(index)[:2]
        return self._split(self._dataset[index] if self._transform_name is None else self._without_transform(index))

    def seen(self, index: int) -> Any:
        """The image through the transform; see `Source.seen`."""
        return self._split(self._dataset[index])[0]

    def path(self, index: int) -> str | None:
        """The file; see `path_at`."""
        return path_at(self._dataset, index)

    def probe(self, image: Image.Image) -> Any:
        """The image through the data set's `transform`, as a PIL image."""
        if self._transform is None:
            raise DataError("the data set has no transform")
        return self._transformed(image)

    def left_as_is(self) -> AbstractContextManager:
        """See `Source.left_as_is`."""
        return left_as_is(self._dataset)

    def _transform_is_all(self, rows: Sequence[int], generators: Sequence[Generator]) -> bool:
        compared = 0
        for row in rows:
            try:
                seed_streams(row, generators)
                expected = self.seen(row)
            except Exception:  # an unreadable row; named when all rows are read
                continue
            try:
                seed_streams(row, generators)
                stored = self._split(self._without_transform(row))[0]
                if not _is_same(self._transformed(stored), expected):
                    return False
            except Exception:  # a data set or a transform that cannot do with a bare image
                return False
            compared += 1
        return compared > 0

    def _without_transform(self, index: int) -> Any:
        """A sample while the data set's transform does nothing."""
        name: Any = self._transform_name
        own = attributes_of(self._dataset)
        object.__setattr__(self._dataset, name, _as_is)
        try:
            return self._dataset[index]
        finally:
            if name in own:
                object.__setattr__(self._dataset, name, own[name])
            else:
                object.__delattr__(self._dataset, name)

    def _transformed(self, image: Any) -> Any:
        assert self._transform is not None
        try:
            return self._transform(image)
        except KeyError:  # albumentations takes arguments by name only
            return self._transform(image=np.array(image))["image"]

    def _split(self, sample: Any) -> tuple[Any, Any]:
        if sample is None:  # an image that is missing
            return None, None
        if self._keys is None:
            self._keys = find_keys(sample, *self._wanted)
        return sample[self._keys[0]], sample[self._keys[1]]


class _Around(Source):
    """Another source, read differently."""

    def __init__(self, source: Source, size: int, raw: bool) -> None:
        self.size = size
        self.class_names = source.class_names
        self.transform = source.transform
        self.raw = raw
        self.label_key = source.label_key
        self._source = source

    def _inside(self, index: int) -> int:
        """The position in the source inside."""
        return index

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        return self._source.read(self._inside(index))

    def seen(self, index: int) -> Any:
        """The image through the transform; see `Source.seen`."""
        return self._source.seen(self._inside(index))

    def path(self, index: int) -> str | None:
        """The file; see `Source.path`."""
        return self._source.path(self._inside(index))

    def probe(self, image: Image.Image) -> Any:
        """The image through the transform; see `Source.probe`."""
        return self._source.probe(image)

    def left_as_is(self) -> AbstractContextManager:
        """See `Source.left_as_is`."""
        return self._source.left_as_is()


class SubsetSource(_Around):
    """Some samples of another source, under their positions in the subset."""

    def __init__(self, source: Source, index: np.ndarray) -> None:
        super().__init__(source, len(index), source.raw)
        self._index = index

    def _inside(self, index: int) -> int:
        return int(self._index[index])


class SeenSource(_Around):
    """Another source read as training sees it, where the images that it stores cannot be kept as they are."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, source.size, raw=False)

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        return self._source.seen(index), self._source.read(index)[1]


def _refuse(dataset: Any) -> None:
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, (library.DatasetDict, library.IterableDatasetDict)):
        splits = ", ".join(dataset)
        raise DataError(
            f"expected one split, got a {type(dataset).__name__} of {splits}: pass dataset[{next(iter(dataset))!r}]"
        )
    if library is not None and isinstance(dataset, library.IterableDataset):
        raise DataError("a streaming data set has no positions to flag: load it with streaming=False")
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{type(dataset).__name__} is an IterableDataset, it has no positions to flag: "
            "pass a map-style data set with __len__ and __getitem__"
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(f"expected a data set with __len__ and __getitem__, got {type(dataset).__name__}")


def _own_transform(dataset: Any) -> str | None:
    """The attribute that holds a data set's transform, if setting it changes that data set and no other."""
    name = next((name for name in TRANSFORM_NAMES if callable(getattr(dataset, name, None))), None)
    forwarded = type(dataset).__setattr__ is not object.__setattr__
    if name is None or forwarded or isinstance(getattr(type(dataset), name, None), property):
        return None
    return name if _is_own(dataset, name) else None


def _is_own(dataset: Any, name: str) -> bool:
    """Whether a data set has an attribute itself, and not one inside that a wrapper's `__getattr__` finds."""
    return name in attributes_of(dataset) or hasattr(type(dataset), name)


def _as_is(*arguments: Any, **named: Any) -> Any:
    """A transform that does nothing, called as `transform(image)` or, for albumentations, `transform(image=...)`."""
    return arguments[0] if arguments else named


def _is_same(one: Any, other: Any) -> bool:
    if not (is_image(one) and is_image(other)):
        return False
    one, other = as_floats(one), as_floats(other)
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
