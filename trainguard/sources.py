"""What a person names on the command line (a folder, a file, a data set) opened as a Hugging Face data set."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image as PILImage
from PIL.Image import Resampling

from trainguard.errors import DataError
from trainguard.warning import warn

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test", "val", "valid", "validation")
IMAGES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
PALETTES = {"1": "L", "P": "RGB", "PA": "RGBA"}  # of these Pillow takes the nearest pixel, whatever it is asked for
IMAGES += (".gif", ".jfif", ".avif", ".jp2")
FILES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".zip", ".tar", ".gz")  # that no data set's name ends with


def open_data(
    name: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    size: int | None = None,
) -> Dataset:
    """Open an image folder, parquet, or a Hugging Face data set; no network unless `name` is not on this disk.

    Args:
        name: a folder with one folder of images per class; a parquet file or a folder of them; a folder that
            `Dataset.save_to_disk` wrote; or else the name of a data set on the Hugging Face hub.
        split: which split to take where there are several.
        image_column: the column of the images, needed only where there are several. Others are left out.
        label_column: likewise for the labels.
        size: side in pixels that images are scaled to, without cropping: a trigger may sit in a corner.

    Raises:
        DataError: there is nothing of the kind, or the split or a column is not there.
    """
    dataset = _open(str(name), Path(name), split)
    chosen = [column for column in (image_column, label_column) if column is not None]
    for column in chosen:
        if column not in dataset.column_names:
            raise DataError(f"{name} has no column {column!r}: it has {', '.join(dataset.column_names)}")
    kinds = [kind for kind, column in (("Image", image_column), ("ClassLabel", label_column)) if column is not None]
    others = [c for c, feature in dataset.features.items() if c not in chosen and type(feature).__name__ in kinds]
    dataset = dataset.remove_columns(others)
    dataset = _scaled(dataset, size, image_column) if size else dataset
    if Path(name).exists():
        _refuse_addresses(dataset, str(name))
    return dataset


def _refuse_addresses(dataset: Dataset, name: str) -> None:
    """A row may name an address where an image's bytes should be, and reading it would ask the network.

    Raises:
        DataError: one does.
    """
    import pyarrow

    for column, values in zip(dataset.data.column_names, dataset.data.columns, strict=True):
        for chunk in values.chunks:
            while pyarrow.types.is_list(chunk.type) or pyarrow.types.is_large_list(chunk.type):
                chunk = chunk.flatten()
            fields = {field.name for field in chunk.type} if pyarrow.types.is_struct(chunk.type) else set()
            if not {"bytes", "path"} <= fields:
                continue
            paths = chunk.field("path").filter(chunk.field("bytes").is_null()).drop_null()
            named = (path for path in paths.to_pylist() if "://" in path or "::" in path)
            if (address := next((path for path in named if not os.path.exists(path)), None)) is not None:
                raise DataError(
                    f"a row of {name} holds no image in its column {column!r}, but names {address!r}, which is not on "
                    "this disk: get the images first"
                )


def _scaled(dataset: Dataset, size: int, image_column: str | None) -> Dataset:
    """The data set with its images brought to one size as they are read; of a named column, files and bytes as well."""
    import datasets

    if image_column is not None and isinstance(dataset.features[image_column], (datasets.Value, dict)):
        dataset = dataset.cast_column(image_column, datasets.Image())
    if not any(isinstance(feature, datasets.Image) for feature in dataset.features.values()):
        raise DataError(
            f"images that are stored as numbers cannot be scaled to {size} pixels: leave size= out, or scale them first"
            if image_column is not None
            else f"no column holds pictures among {', '.join(dataset.features)}: pass image_column="
        )
    return dataset.with_transform(Resize(size))


class Resize:
    """A transform for a Hugging Face data set that makes all its images one size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Scale every image in a batch of columns; leave the rest."""
        return {name: [self._scaled(value) for value in values] for name, values in batch.items()}

    def _scaled(self, value: Any) -> Any:
        if not isinstance(value, PILImage):
            return value
        if value.mode in PALETTES:
            value = value.convert(PALETTES[value.mode])
        return value.resize((self.size, self.size), Resampling.BILINEAR)


def _open(name: str, path: Path, split: str) -> Dataset:
    import datasets

    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"{path} is not a parquet file: pass a .parquet file or a folder")
        return _tables(path, [path])
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix.lower() in FILES:
        raise DataError(f"{path} does not exist: pass an image folder, a parquet file or a data set's name")
    loud = [logging.getLogger(library) for library in ("datasets", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)  # of a name that is not there, its client would tell of each retry
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds; each means that the name did not open
        raise DataError(f"{name} is neither on this disk nor could it be opened by name: {error}") from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _open_folder(folder: Path, split: str) -> Dataset:
    if (folder / "dataset_dict.json").is_file():
        splits = _from_disk(folder)
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
        return splits[split]
    if (folder / "state.json").is_file():
        return _from_disk(folder)
    tables = sorted(folder.glob("[!.]*.parquet")) or sorted(folder.rglob(f"{split}*.parquet"))
    if tables:
        return _tables(folder, _of_split(folder, tables, split))
    if inside := _tables_of(folder, split):
        return _tables(folder, inside)
    parts = _splits_in(folder, split)
    if (parts or split != "train") and split not in parts:
        raise DataError(f"{folder} has no split {split!r}: it {_has(parts)}")
    return _image_folder(folder / split if parts else folder)


def _splits_in(folder: Path, split: str) -> list[str]:
    """The folders of classes in a folder that are named as splits are.

    Raises:
        DataError: there are other folders with images beside them, so that these may be classes.
    """
    named = [child for child in _folders(folder) if child.name in (split, *SPLITS)]
    parts = [child for child in named if _folders(child)]
    others = [child for child in _folders(folder) if child not in named and any(_images_in(child))] if parts else []
    if others:
        raise DataError(
            f"{folder} holds {parts[0].name}, which looks like a split, beside {others[0].name}, which holds images: "
            f"pass {parts[0]} if it is a split, or give it another name if it is a class"
        )
    return [part.name for part in parts]


def _has(parts: Sequence[str]) -> str:
    """What a place has in the way of splits, in words."""
    return f"has {', '.join(parts)}" if parts else "is one set, without splits"


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder that `open_data` opens has a split of that name; a class may be called so as well."""
    if (folder / "dataset_dict.json").is_file():
        return (folder / split).is_dir()
    if any(_is_of(split, table) for table in folder.rglob(f"{split}*.parquet")) or _tables_of(folder, split):
        return True
    return (folder / split).is_dir() and bool(_folders(folder / split))


def _tables_of(folder: Path, split: str) -> list[Path]:
    """The parquet files in a folder that is named as the split, as the hub lays out its own copies."""
    return sorted((folder / split).glob("[!.]*.parquet"))


def _of_split(folder: Path, tables: list[Path], split: str) -> list[Path]:
    """The tables of one split; all, where no name says of which they are."""
    mine = [table for table in tables if _is_of(split, table)]
    named = [table.name for table in tables if any(_is_of(each, table) for each in SPLITS)]
    if not mine and (named or split != "train"):
        raise DataError(f"{folder} has no split {split!r}: it {_has(named)}")
    places = sorted({str(table.parent) for table in mine})
    if len(places) > 1:
        raise DataError(f"{folder} holds several data sets, in {', '.join(places)}: pass one of these folders")
    return mine or tables


def _is_of(split: str, table: Path) -> bool:
    """Whether a table is named as those of a split: `train.parquet`, `train-00000-of-00002.parquet`, not `training`."""
    return re.match(rf"{re.escape(split)}(?![A-Za-z])", table.name) is not None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, links to folders included, in the order of their names; hidden ones left out."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_folder(root: Path) -> Dataset:
    """One class per folder in `root`, with all images below it, in the order of torchvision's `ImageFolder`."""
    import datasets

    classes = _folders(root)
    if not classes:
        raise DataError(f"{root} has no folder per class and no parquet file: pass the folder above the class folders")
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = list(_images_in(folder))
        if not found and any(files for _, _, files in os.walk(folder)):  # an empty folder may be a class without images
            raise DataError(f"{folder} holds files but no image, so it is no class: move it out of {root}")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{root} holds no image in its folders {', '.join(folder.name for folder in classes[:5])}")
    loose = sum(child.is_file() and _is_image(child.name) for child in root.iterdir())
    if loose:
        warn(f"{loose} images in {root} lie in no class folder and are left out")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[folder.name for folder in classes])}
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=datasets.Features(features))


def _images_in(folder: Path) -> Iterator[str]:
    """The paths of all images below a folder, in torchvision's order; a link to a folder above it is not followed."""
    places: list[tuple[str, list[str]]] = []
    for place, below, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(up) for up in (Path(place), *Path(place).parents)}
        below[:] = [name for name in below if os.path.realpath(os.path.join(place, name)) not in above]
        places.append((place, sorted(files)))
    for place, files in sorted(places):
        for name in filter(_is_image, files):
            path = os.path.join(place, name)
            try:
                path.encode()
            except UnicodeEncodeError:
                raise DataError(f"{os.fsencode(path)!r} is no name in UTF-8: rename the file") from None
            yield path


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGES


def _from_disk(folder: Path) -> Any:
    """What `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged file of its own ends in whatever reading it raises
        raise DataError(f"{folder} cannot be read as a saved data set: {type(error).__name__}: {error}") from error


def _tables(place: Path, tables: Sequence[Path]) -> Dataset:
    """Parquet files, as one data set.

    The library knows a file that it has read before by its path and its time, which one that is put in its place may
    share. So its name for them also says what nobody can set.
    """
    known = [(found.st_size, found.st_ino, found.st_ctime_ns) for found in (table.stat() for table in tables)]
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    return _loaded(place, "parquet", name=name, data_files=[escape(str(table)) for table in tables])


def _loaded(place: Path, kind: str, **where: Any) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(kind, split="train", **where)
    except Exception as error:  # the library has kinds of its own for damaged files, and wraps those of others
        reason = str(error.__cause__ or error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"{place} cannot be read as {kind}: {reason[0]}") from error
