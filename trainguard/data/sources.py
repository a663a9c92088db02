"""Kinds of data sets, and how each gives a sample decoded but not augmented."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform

from trainguard.data.samples import Key, find_keys, is_image
from trainguard.errors import DataError

TRANSFORM_NAMES = ("transform", "transforms", "image_transform", "tf", "preprocess")


class Source(ABC):
    """A data set as screening reads it, in the data set's own index space.

    Attributes:
        size: number of samples.
        class_names: names of the classes, or None where the data set does not know them.
        transform: what to look through for a normalisation.
        raw: whether `read` leaves out a transform that training applies.
    """

    size: int
    class_names: tuple[str, ...] | None
    transform: Any
    raw: bool

    @abstractmethod
    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label of one sample, without the training transform where the data set lets it be left out."""

    @abstractmethod
    def seen(self, index: int) -> Any:
        """The image as training sees it, through the transform."""

    @abstractmethod
    def path(self, index: int) -> str | None:
        """The file that holds a sample's image, where there is one."""

    @abstractmethod
    def probe(self, image: Image.Image) -> Any:
        """One PIL image sent through the transform."""


def open_source(dataset: Any, image_column: Key | None = None, label_column: Key | None = None) -> Source:
    """Find out what kind of data set this is.

    Args:
        dataset: a map-style torch data set (subsets of subsets included) or a Hugging Face `Dataset`.
        image_column: key or position of the image in a sample, where it cannot be told.
        label_column: likewise of the label.

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
        source = TorchSource(base, image_column, label_column, first=0 if index is None else int(index[0]))
    return source if index is None else SubsetSource(source, index)


def unwrap(dataset: Any) -> tuple[Any, np.ndarray | None]:
    """The data set under a chain of `Subset`s, and its indices (N,) int64 in order; None where there is no chain."""
    index = None
    while type(dataset) is Subset:
        below = np.asarray(dataset.indices, dtype=np.int64).reshape(-1)
        index = below if index is None else below[index]
        dataset = dataset.dataset
    return dataset, index


def is_hugging_face(dataset: Any) -> bool:
    """Whether this is a map-style Hugging Face `Dataset`; does not import the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, library.Dataset)


class TorchSource(Source):
    """A map-style torch data set.

    Torchvision's own data sets are read without their transform, and any data set is that offers a method
    `read_raw(index)` giving (decoded image, label). Others are read as training reads them.
    """

    def __init__(self, dataset: Any, image_column: Key | None, label_column: Key | None, first: int = 0) -> None:
        self.size = len(dataset)
        found = (getattr(dataset, name, None) for name in TRANSFORM_NAMES)
        self._transform = next((one for one in found if callable(one)), None)
        # Whoever sets `dataset.transform` anew leaves torchvision's `dataset.transforms` stale: look at one of them.
        self.transform = self._transform if isinstance(dataset, VisionDataset) else dataset
        self._dataset = dataset
        self._read_raw = _raw_reader(dataset)
        self.raw = self._read_raw is not None
        names = getattr(dataset, "classes", None)
        self.class_names = tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None
        self._wanted = image_column, label_column
        self._keys: tuple[Key, Key] | None = None

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        if self._read_raw is not None:
            return self._read_raw(index)[:2]
        return self._split(self._dataset[index])

    def seen(self, index: int) -> Any:
        """The image through the transform; see `Source.seen`."""
        return self._split(self._dataset[index])[0]

    def path(self, index: int) -> str | None:
        """The file, for data sets with a list `samples` or `imgs` of (path, label)."""
        for name in ("samples", "imgs"):
            entries = getattr(self._dataset, name, None)
            if isinstance(entries, list) and index < len(entries):
                entry = entries[index]
                first = entry[0] if isinstance(entry, (tuple, list)) and entry else entry
                return str(first) if isinstance(first, str) or hasattr(first, "__fspath__") else None
        return None

    def probe(self, image: Image.Image) -> Any:
        """The image through the data set's `transform`, as a PIL image."""
        if self._transform is None:
            raise DataError("the data set has no transform")
        output = self._transform(image)
        return output["image"] if isinstance(output, dict) else output

    def _split(self, sample: Any) -> tuple[Any, Any]:
        if self._keys is None:
            self._keys = find_keys(sample, *self._wanted)
        return sample[self._keys[0]], sample[self._keys[1]]


class HuggingFaceSource(Source):
    """A Hugging Face `Dataset`, read without its format: columns are found by their types."""

    def __init__(self, dataset: Any, image_column: Key | None, label_column: Key | None) -> None:
        import datasets

        image = _column(dataset, datasets.Image, image_column, "image")
        label = _column(dataset, datasets.ClassLabel, label_column, "label")
        self.size = len(dataset)
        self.class_names = tuple(getattr(dataset.features[label], "names", None) or ()) or None
        self.transform = (
            dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None
        )
        self.raw = self.transform is not None
        self._dataset = dataset
        self._image, self._label = image, label
        plain = dataset.with_format(None).select_columns([image, label])
        self._plain = plain.cast_column(image, datasets.Image())
        self._paths = plain.cast_column(image, datasets.Image(decode=False))

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        row = self._plain[index]
        if row[self._image] is None:
            raise ValueError("the row holds no image (null)")
        return row[self._image], row[self._label]

    def seen(self, index: int) -> Any:
        """The image through `with_transform`, else as stored."""
        if self.transform is None:
            return self.read(index)[0]
        return self._image_in(self._dataset[index])

    def path(self, index: int) -> str | None:
        """The file name stored with the image."""
        stored = self._paths[index][self._image]
        return stored["path"] if stored and stored["path"] else None

    def probe(self, image: Image.Image) -> Any:
        """The image through `with_transform`."""
        batch = self.transform({self._image: [image], self._label: [0]})
        return self._image_in({key: values[0] for key, values in batch.items()})

    def _image_in(self, row: dict[str, Any]) -> Any:
        images = [self._image] if is_image(row.get(self._image)) else [key for key in row if is_image(row[key])]
        if len(images) != 1:
            raise DataError(f"expected one image in what with_transform gives, found {len(images)} in {', '.join(row)}")
        return row[images[0]]


class SubsetSource(Source):
    """Some samples of another source, under their positions in the subset."""

    def __init__(self, source: Source, index: np.ndarray) -> None:
        self.size = len(index)
        self.class_names = source.class_names
        self.transform = source.transform
        self.raw = source.raw
        self._source = source
        self._index = index

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label; see `Source.read`."""
        return self._source.read(int(self._index[index]))

    def seen(self, index: int) -> Any:
        """The image through the transform; see `Source.seen`."""
        return self._source.seen(int(self._index[index]))

    def path(self, index: int) -> str | None:
        """The file; see `Source.path`."""
        return self._source.path(int(self._index[index]))

    def probe(self, image: Image.Image) -> Any:
        """The image through the transform; see `Source.probe`."""
        return self._source.probe(image)


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


def _raw_reader(dataset: Any) -> Callable[[int], Any] | None:
    if hasattr(dataset, "read_raw"):
        return dataset.read_raw
    own = isinstance(dataset, VisionDataset) and type(dataset).__getitem__.__module__.startswith("torchvision.")
    if not own:
        return None
    if dataset.transform is None and dataset.transforms is None:
        return None
    plain = copy.copy(dataset)
    plain.transform = None
    keeps_labels = plain.target_transform is not None
    plain.transforms = StandardTransform(None, plain.target_transform) if keeps_labels else None
    return plain.__getitem__


def _column(dataset: Any, kind: type, wanted: Key | None, what: str) -> str:
    if wanted is not None:
        if wanted not in dataset.features:
            raise DataError(f"the data set has no column {wanted!r}: it has {', '.join(dataset.features)}")
        return str(wanted)
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        count = f"{len(found)} ({', '.join(found)})" if found else f"none among {', '.join(dataset.features)}"
        raise DataError(f"expected one {kind.__name__} column, found {count}: pass {what}_column=")
    return found[0]
