r"""The drill's data: images held as uint8 in memory, from a data set on disk or from scikit-learn's digits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from trainguard.data.reading import Shape, learn_rows, resized
from trainguard.data.samples import Key, as_floats
from trainguard.data.sources import open_source
from trainguard.errors import DataError

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
        data: `"digits"`; a Hugging Face data set with an image and a label column; or what `sources.open_data` opens:
            an image folder, a parquet file or folder, a data set's name.
        test: the same for the test set. Without it, the split `test` on the disk beside `data`, else every fifth row.
        rows: the first so many training images; None for all.
        test_rows: the first so many test images; None for all.
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
        return _digits(rows, test_rows, size or 16)
    train_set, test_set = _open(data, test)
    train_rows: Iterable[int] = range(len(train_set))
    held_rows: Iterable[int] = range(len(train_set) if test_set is None else len(test_set))
    if test_set is None:
        test_set = train_set
        train_rows = [i for i in train_rows if i % HELD_OUT != HELD_OUT - 1]
        held_rows = [i for i in held_rows if i % HELD_OUT == HELD_OUT - 1]
    columns = image_column, label_column
    train, labels, names = _decode(train_set, list(train_rows)[:rows], size, None, columns)
    held, held_labels, held_names = _decode(test_set, list(held_rows)[:test_rows], size, train.shape[1:], columns)
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


def _open(data: Any, test: Any) -> tuple[Any, Any]:
    from trainguard.sources import open_data

    if not isinstance(data, str | Path):
        return data, test
    if test is None:
        test = _test_name(Path(data))
    return open_data(data), open_data(test, split="test") if isinstance(test, str | Path) else test


def _test_name(path: Path) -> Path | None:
    r"""Where the test split of a data set on disk lies, if it has one."""
    if path.is_file():
        beside = path.with_name(path.name.replace("train", "test"))
        return beside if beside != path and beside.exists() else None
    if path.is_dir():
        return path if (path / "test").is_dir() or any(path.rglob("test*.parquet")) else None
    return None


def _decode(
    dataset: Any,
    rows: list[int],
    size: int | None,
    shape: torch.Size | None,
    columns: tuple[Key | None, Key | None],
) -> tuple[Tensor, Tensor, tuple[str, ...] | None]:
    r"""Some rows as images (n, C, H, W) uint8 and labels (n,), and the names of the classes where they are known."""
    if not rows:
        raise DataError("the drill needs training and test images, one of the two is empty: raise rows= or test_rows=")
    source = open_source(Subset(dataset, rows), *columns)
    if shape is None:
        shape = torch.Size(learn_rows(source, None, None, []).shape)
        shape = torch.Size((shape[0], size, size)) if size else shape
    fit: Shape = (shape[0], shape[1], shape[2])
    images, labels = [], []
    for row in learn_rows(source, None, lambda image: _fitted(image, fit), []).in_order(workers=0):
        if row.image is None:
            path = source.path(row.index)
            raise DataError(f"row {rows[row.index]}{f' ({path})' if path else ''} {row.problem}")
        images.append(row.image)
        labels.append(row.label)
    return torch.stack(images), torch.tensor(labels), source.class_names


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
