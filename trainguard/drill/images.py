r"""The drill's data: images held as uint8 in memory, from a data set on disk or from scikit-learn's digits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from trainguard.data.hugging_face import HuggingFaceSource
from trainguard.data.pixels import ESTIMATED, PixelRange
from trainguard.data.reading import Shape, learn_rows, resized
from trainguard.data.samples import Key, as_floats
from trainguard.data.sources import open_source, spread
from trainguard.errors import DataError
from trainguard.warning import warn

HELD_OUT = 5  # without a test split, every fifth row is one


@dataclass(frozen=True, eq=False)
class Images:
    r"""A training and a test set in memory.

    Attributes:
        train: (N, C, H, W) uint8.
        train_labels: (N,) int64.
        test: (M, C, H, W) uint8.
        test_labels: (M,) int64.
        class_names: K names.
        flip: whether a mirrored image is still an image of its class.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = True

    @property
    def num_classes(self) -> int:
        r"""Number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        r"""16 hexadecimal digits that change with any pixel or label."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_images(
    data: Any,
    *,
    test: Any = None,
    rows: int | None = None,
    test_rows: int | None = None,
    size: int | None = None,
    flip: bool | None = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
) -> Images:
    r"""Read a data set for the drill.

    Args:
        data: `"digits"`; a data set, such as a Hugging Face one with an image and a label column; or what
            `sources.open_data` opens: an image folder, a parquet file or folder, a data set's name.
        test: the same for the test set. Without it, the split `test` on the disk beside `data`, else every fifth row,
            or every fifth of each class, where the order of the rows would leave classes out.
        rows: the first so many training images, or as many from all over, where the first ones lack classes; None for
            all.
        test_rows: likewise of test images.
        size: side in pixels that images are scaled to; None for the size of the first one. Images are of the channels
            that screening would see: grey only where none of those looked at has colour.
        flip: whether training may mirror images; None for yes. Digits are never mirrored.
        image_column: key or position of the image in a sample, needed only where several could be meant.
        label_column: likewise of the label.

    Raises:
        DataError: no such data, columns that cannot be told apart, an image that cannot be read, or a test set of other
            classes.
    """
    if isinstance(data, str) and data == "digits":
        if test is not None:
            raise DataError("digits come with a test set: leave test= out")
        if Path(data).exists():
            raise DataError("'digits' is a built-in set and a folder here as well: pass ./digits, or run it elsewhere")
        return _digits(rows, test_rows, size or 16)
    train_set, test_set = _open(data, test)
    columns = image_column, label_column
    known = _labels(train_set, columns, needed=test_set is None) if test_set is None or rows else None
    train_rows = np.arange(len(train_set))
    if test_set is None:
        out = _held_out(len(train_set), known)
        test_set, train_rows, held_rows, held_known = train_set, train_rows[~out], train_rows[out], known
    else:
        held_rows, held_known = np.arange(len(test_set)), _labels(test_set, columns) if test_rows else None
    chosen, held_chosen = _first(train_rows, rows, known), _first(held_rows, test_rows, held_known)
    train, labels, names, given = _decode(train_set, chosen, size, None, columns)
    held, held_labels, held_names, _ = _decode(test_set, held_chosen, size, train.shape[1:], columns, given)
    if names and held_names:
        held_labels = _by_name(held_labels, held_names, names)
    names = names or tuple(map(str, range(int(labels.max()) + 1)))
    if int(labels.max()) >= len(names):
        raise DataError(f"the training set has the label {int(labels.max())}, but names {len(names)} classes")
    if int(held_labels.max()) >= len(names):
        raise DataError(
            f"the test set has the label {int(held_labels.max())}, the training set {len(names)} classes, 0 to "
            f"{len(names) - 1}: both need the same classes"
        )
    return Images(train, labels, held, held_labels, names, flip is None or flip)


def _by_name(labels: Tensor, names: tuple[str, ...], wanted: tuple[str, ...]) -> Tensor:
    r"""The labels of classes `names` as numbers of the same classes in `wanted`."""
    used = [names[label] for label in labels.unique().tolist()]
    foreign = [name for name in used if name not in wanted]
    if foreign:
        raise DataError(
            f"the test set has images of {', '.join(map(repr, foreign[:5]))}, which is no class of the training set: "
            "both need the same classes"
        )
    return torch.tensor([wanted.index(name) if name in wanted else -1 for name in names])[labels]


def _labels(dataset: Any, columns: tuple[Key | None, Key | None], *, needed: bool = False) -> np.ndarray | None:
    r"""(N,) labels of all rows, where they are listed, or else read if they are needed; None where they cannot be."""
    try:
        source = open_source(dataset, *columns)
        if isinstance(source, HuggingFaceSource):
            listed = np.asarray(source.labels(), dtype=np.int64)
            return listed if listed.ndim == 1 else None
        return np.array([int(source.read(row)[1]) for row in range(source.size)]) if needed else None
    except Exception:  # whatever is wrong with a row is said when it is decoded
        return None


def _held_out(size: int, labels: np.ndarray | None) -> np.ndarray:
    r"""(N,) bool, one row in five; one in five of each class, where that leaves fewer classes out on either side."""
    held = np.arange(size) % HELD_OUT == HELD_OUT - 1
    if labels is None:
        return held
    rank = np.empty(size, dtype=np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    of_class = rank % HELD_OUT == HELD_OUT - 1

    def there(held: np.ndarray) -> int:
        return len(np.unique(labels[held])) + len(np.unique(labels[~held]))

    return of_class if there(of_class) > there(held) else held


def _first(rows: np.ndarray, count: int | None, labels: np.ndarray | None) -> list[int]:
    r"""The first rows, or as many from all over where the first ones lack classes: folders come class by class."""
    if count is None or count >= len(rows) or labels is None:
        return rows[:count].tolist()
    first, over = rows[:count].tolist(), spread(rows, count)
    held, whole = len(np.unique(labels[first])), len(np.unique(labels[rows]))
    if len(np.unique(labels[over])) <= held:
        return first
    warn(f"the first {count} rows hold {held} of {whole} classes: {count} rows are taken from all over the data set")
    return over


def _open(data: Any, test: Any) -> tuple[Any, Any]:
    from trainguard.sources import has_split, open_data

    if test is None and isinstance(data, str | Path):
        path = Path(data)
        beside = path.with_name(path.name.replace("train", "test"))
        if path.is_dir() and has_split(path, "test"):
            test = path
        elif path.is_file() and beside != path and beside.exists():
            test = beside
    opened = open_data(data) if isinstance(data, str | Path) else data
    if isinstance(test, str | Path):
        alone = Path(test).is_dir() and not has_split(Path(test), "test")
        test = open_data(test, split="train" if alone else "test")
    return opened, test


def _decode(
    dataset: Any,
    rows: list[int],
    size: int | None,
    shape: torch.Size | None,
    columns: tuple[Key | None, Key | None],
    given: PixelRange | None = None,
) -> tuple[Tensor, Tensor, tuple[str, ...] | None, PixelRange | None]:
    r"""Some rows as images (n, C, H, W) uint8 and labels (n,), and the names of the classes where they are known.

    And the pixel range, where it was estimated from these images: others of their kind are read by the same.
    """
    if not rows:
        raise DataError(f"the drill needs training and test images, one of the two is empty: give {HELD_OUT} at least")
    source = open_source(Subset(dataset, rows), *columns)
    if shape is None:
        shape = torch.Size(learn_rows(source, None, None, []).shape)
        shape = torch.Size((shape[0], size, size)) if size else shape
    fit: Shape = (shape[0], shape[1], shape[2])
    images, labels = [], []
    learned = learn_rows(source, given, lambda image: _fitted(image, fit), [])
    for row in learned.in_order(workers=0):
        if row.image is None:
            path = source.path(row.index)
            raise DataError(f"row {rows[row.index]}{f' ({path})' if path else ''} {row.problem}")
        images.append(row.image)
        labels.append(row.label)
    found = learned.pixel_range if learned.pixel_range.source == ESTIMATED else None
    return torch.stack(images), torch.tensor(labels), source.class_names, found


def _fitted(image: Any, shape: Shape) -> Any:
    r"""An image as the others are: their size, and where it is a picture of 8 bits per value their channels."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            return image  # refused with its name, rather than clipped
        image = image.convert("L" if shape[0] == 1 else "RGB")
        return image if image.size == (shape[2], shape[1]) else resized(image, shape)
    values = as_floats(image)
    return image if values.shape[1:] == torch.Size(shape[1:]) else resized(image, shape)


def _digits(rows: int | None, test_rows: int | None, size: int) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    images = (F.interpolate(grey, size=(size, size), mode="bilinear") * 255).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    held = torch.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    names = tuple(map(str, range(10)))
    return Images(
        images[~held][:rows],
        labels[~held][:rows],
        images[held][:test_rows],
        labels[held][:test_rows],
        names,
        flip=False,
    )
