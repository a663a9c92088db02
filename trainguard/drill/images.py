r"""The drill's data: images held as uint8 in memory, from a data set on disk or from scikit-learn's digits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainguard.data.samples import Key, as_label, find_keys
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
        size: side in pixels that images are scaled to; None for the size of the first one.
        flip: whether training may mirror images; None for yes. Digits are never mirrored.
        image_column: key or position of the image in a sample, needed only where several could be meant.
        label_column: likewise of the label.

    Raises:
        DataError: no such data, or columns that cannot be told apart.
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
    train, labels = _decode(train_set, list(train_rows)[:rows], size, None, columns)
    held, held_labels = _decode(test_set, list(held_rows)[:test_rows], size, train.shape[1:], columns)
    count = int(max(labels.max(), held_labels.max())) + 1
    names = _class_names(train_set, label_column) or tuple(map(str, range(count)))
    return Images(train, labels, held, held_labels, names, flip is None or flip)


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


def _class_names(dataset: Any, label_column: Key | None) -> tuple[str, ...]:
    for column, feature in getattr(dataset, "features", {}).items():
        if getattr(feature, "names", None) and label_column in (None, column):
            return tuple(feature.names)
    return tuple(getattr(dataset, "classes", ()))


def _decode(
    dataset: Any,
    rows: list[int],
    size: int | None,
    shape: torch.Size | None,
    columns: tuple[Key | None, Key | None],
) -> tuple[Tensor, Tensor]:
    if not rows:
        raise DataError("the drill needs training and test images, one of the two is empty: raise rows= or test_rows=")
    images, labels = [], []
    image_key, label_key = find_keys(dataset[rows[0]], *columns)
    for row in rows:
        sample = dataset[row]
        try:
            labels.append(as_label(sample[label_key]))
        except DataError as error:
            raise DataError(f"row {row} {error}") from None
        image = _picture(sample[image_key], row)
        if shape is None:
            grey = image.mode in ("L", "1", "I", "I;16", "F")
            shape = torch.Size((1 if grey else 3, *((size, size) if size else image.size[::-1])))
        image = image.convert("L" if shape[0] == 1 else "RGB")
        if image.size != (shape[2], shape[1]):
            image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).view(shape[1], shape[2], shape[0]).permute(2, 0, 1))
    return torch.stack(images), torch.tensor(labels)


def _picture(value: Any, row: int) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.dtype != np.uint8:
        raise DataError(f"row {row} is an array of {array.dtype}: the drill takes pictures or uint8 arrays (H, W, C)")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


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
