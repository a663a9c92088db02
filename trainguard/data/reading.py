"""Samples of a data set by index, as bytes and class numbers, and what must be known before the first is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from trainguard.data.pixels import (
    ESTIMATED,
    PixelRange,
    data_range,
    most_trusted,
    probe_range,
    transform_range,
    usual_range,
)
from trainguard.data.samples import as_bytes, as_floats, as_label, channels_of
from trainguard.data.source import Source
from trainguard.data.sources import SeenSource, spread
from trainguard.errors import DataError
from trainguard.rng import Generator, seed_streams

FIRST_ROWS = 32  # rows looked at to learn size and channels
BOUND_ROWS = 10_000  # rows whose smallest and largest values stand for all, where the range must be estimated
TRUSTED_SIZES = 8  # differing sizes for which the transform is asked whether it evens them out
NEAR_BLACK = 0.05  # up to which the darkest of plain pixels are taken for black
LEVEL = 0.01  # how far a value may lie from one of 256 levels, by rounding
CHUNK = 64  # rows that a reading process hands over at once

Transform = Callable[[Any], Any]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """What reading one sample gave: an image and a label, or a problem.

    Attributes:
        index: of the sample.
        image: (C, H, W) uint8, None where there is a problem.
        label: class number.
        problem: the rest of a sentence that begins with the sample's name.
        fatal: the problem lies in the form of the data set, so that leaving the sample out would not help.
        colour: a picture in colour, where the rows looked at were grey: all must be read again, see `Rows.coloured`.
    """

    index: int
    image: Tensor | None = None
    label: int = -1
    problem: str = ""
    fatal: bool = False
    colour: bool = False


class Rows(Dataset):
    """Every sample as a `Row`; problems are given back and not raised, so that they cross processes.

    Args:
        source: the data set.
        shape: (C, H, W) of all images.
        pixel_range: of the images that training feeds to a model.
        stored_range: of floating-point images as read.
        transform: applied to images as read, in place of scaling them to `shape`.
        generators: random generators that the data set keeps, seeded by index before each read.
    """

    def __init__(
        self,
        source: Source,
        shape: Shape,
        pixel_range: PixelRange,
        stored_range: PixelRange,
        transform: Transform | None,
        generators: list[Generator],
    ) -> None:
        self.source = source
        self.shape = shape
        self.pixel_range = pixel_range
        self.stored_range = stored_range
        self.generators = generators
        self._transform = transform
        self._evened: set[tuple[int, int]] = set()
        self._widened = False  # grey images get three channels
        self._greyed = False  # training makes pictures in colour grey

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, index: int) -> Row:
        seed_streams(index, self.generators)
        try:
            image, label = self.source.read(index)
            if image is None:
                return Row(index, problem="cannot be read: the data set gives nothing")
            if isinstance(image, Image.Image):
                image.load()  # a picture that is opened shows only now that its file is cut off
            if self.shape[0] == 1 and not self._transform and self._stays_in_colour(image, index):
                return Row(index, problem="is in colour, the first images are grey", fatal=True, colour=True)
            image = self._transform(image) if self._transform else self._scaled(image, index)
        except DataError as error:
            return Row(index, problem=str(error), fatal=True)
        except Exception as error:  # a broken file, or a stranger's code that meets it, may raise anything
            return Row(index, problem=f"cannot be read: {shown(error)}")
        if self._widened and not isinstance(image, Image.Image) and channels_of(image) == 1:
            image = as_floats(image).expand(3, -1, -1)
        try:
            return Row(index, as_bytes(image, self.shape, self.stored_range), as_label(label))
        except FloatingPointError as error:
            return Row(index, problem=str(error))
        except DataError as error:
            return Row(index, problem=str(error), fatal=True)

    def coloured(self) -> Rows:
        """The same samples, all in colour."""
        shape, ranges = (3, *self.shape[1:]), (self.pixel_range.for_channels(3), self.stored_range.for_channels(3))
        rows = Rows(self.source, shape, *ranges, self._transform, self.generators)
        rows._widened = True
        return rows

    def name(self, index: int) -> str:
        """`row 17 (cats/3.png)`, or `row 17` where the image is in no file."""
        path = self.source.path(index)
        return f"row {index} ({path})" if path else f"row {index}"

    def in_order(self, workers: int, context: Any = None) -> Iterator[Row]:
        """All rows, first to last, read by `workers` processes (0: this one) that are started as `context` says."""
        loader: DataLoader = DataLoader(
            self,
            batch_size=CHUNK,
            num_workers=workers,
            collate_fn=_packed if workers else list,
            multiprocessing_context=context if workers else None,
        )
        for chunk in loader:
            yield from _unpacked(*chunk) if workers else chunk

    def _stays_in_colour(self, image: Any, index: int) -> bool:
        """Whether a picture is in colour, and training sees it so."""
        if self._greyed or not isinstance(image, Image.Image) or channels_of(image) == 1:
            return False
        seen = self.source.seen(index) if self.source.raw else image
        self._greyed = not (isinstance(seen, Image.Image) and channels_of(seen) == 3)
        return not self._greyed

    def _scaled(self, image: Any, index: int) -> Any:
        """An image from before the training transform at the size that the transform makes; others as they are."""
        if not self.source.raw:
            return image
        size = _size(image)
        if size == self.shape[1:]:
            return image
        if size not in self._evened and len(self._evened) < TRUSTED_SIZES:
            if _size(self.source.seen(index)) != self.shape[1:]:
                return (
                    image  # the transform leaves sizes as they are: reported as what it is, images that differ in size
                )
            self._evened.add(size)
        return resized(image, self.shape)


def learn_rows(
    source: Source, given: PixelRange | None, transform: Transform | None, generators: list[Generator]
) -> Rows:
    """Find out size, channels and pixel range from a few samples.

    Args:
        source: the data set.
        given: the pixel range where it is known.
        transform: applied to images as read; None scales them to what training sees.
        generators: random generators that the data set keeps.

    Raises:
        DataError: none of the rows looked at can be read, or their form is not usable.
    """
    stored, seen = _first_images(source, transform)
    shape: Shape = (_channels(source, seen, given), *_size(seen))
    run = transform or source.probe
    asked = transform is not None or source.transform is not None
    if transform is None and source.raw and not _can_be_kept(stored, shape[0]):
        source, stored, asked = SeenSource(source), seen, False
    probed = probe_range(run, *_size(stored), channels_of(stored)) if asked else None
    seen_by_row = (lambda row: transform(source.read(row)[0])) if transform else source.seen
    said = given
    if said is None and probed is None and not source.raw:  # the data set may hold numbers that others normalise by
        said = transform_range(transform or source.transform)
    if said is not None and _is_float(seen):
        low, high = _bounds(source.size, seen_by_row, shape[0], FIRST_ROWS)
        usual = usual_range(low, high)
        never_black = 0 <= min(low) < NEAR_BLACK and max(high) <= 1 and max(said.low) < 0  # some would be darker
        if usual is None and (never_black or _are_levels(source.size, seen_by_row)):
            usual = PixelRange((0.0,) * shape[0], (1.0,) * shape[0], ESTIMATED)  # though all are dark, or bright
        if usual is not None and usual.low[0] == 0 and not said.for_channels(shape[0]).agrees_with(usual):
            # plain pixels, which something after the data set normalises
            return Rows(source, shape, said.for_channels(shape[0]), usual, transform, generators)
    found = most_trusted([given, transform_range(transform or source.transform), probed], shape[0])
    if found is None and _is_float(seen):
        found = _range_of(source.size, seen_by_row, shape[0])
    found = found or PixelRange((0.0,) * shape[0], (1.0,) * shape[0], "assumed")
    stored_range = found
    if source.raw and transform is None and _is_float(stored):
        own = _range_of(source.size, lambda row: source.read(row)[0], channels_of(stored))
        stored_range = own.for_channels(shape[0]) if own else found
    return Rows(source, shape, found, stored_range, transform, generators)


def resized(image: Any, shape: Shape) -> Any:
    """An image at another height and width, whole: cropping would lose a trigger that sits in a corner.

    Args:
        image: PIL image, array or tensor.
        shape: (C, H, W) wanted; PIL images also get the channels.
    """
    channels, height, width = shape
    if isinstance(image, Image.Image):
        return image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    values = as_floats(image)
    scaled = interpolate(values[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return scaled if values.is_floating_point() else scaled.round_().clamp_(0, 255).to(torch.uint8)


def _packed(rows: list[Row]) -> tuple[Tensor | None, list[Row]]:
    """All images in one tensor: every tensor that crosses processes opens a file of its own."""
    images = [row.image for row in rows if row.image is not None]
    return torch.stack(images) if images else None, [replace(row, image=None) for row in rows]


def _unpacked(images: Tensor | None, rows: list[Row]) -> Iterator[Row]:
    """What `_packed` was given."""
    read = iter(() if images is None else images)
    for row in rows:
        yield row if row.problem else replace(row, image=next(read))


def shown(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_images(source: Source, transform: Transform | None) -> tuple[Any, Any]:
    """One image as read and as training (or `transform`) makes it."""
    problem = ""
    for index in spread(np.arange(source.size), FIRST_ROWS):
        seed_streams(index)
        try:
            stored = source.read(index)[0]
            seen = transform(stored) if transform else source.seen(index)
            if stored is None or seen is None:
                raise ValueError("the data set gives nothing")
            as_floats(seen)
            return stored, seen
        except DataError as error:
            path = source.path(index)
            raise DataError(f"row {index}{f' ({path})' if path else ''}: {error}") from error
        except Exception as error:  # the next row may be readable
            problem = problem or f"row {index} cannot be read: {shown(error)}"
    raise DataError(f"none of {min(FIRST_ROWS, source.size)} rows looked at can be read; the first: {problem}")


def _channels(source: Source, seen: Any, given: PixelRange | None) -> int:
    """Channels of the images; PIL images are grey only where none of the rows looked at has colour, and no range of
    three channels was given."""
    most = channels_of(seen)
    if not isinstance(seen, Image.Image):
        return most
    if given is not None and len(given.low) == 3:
        return 3
    for index in spread(np.arange(source.size), FIRST_ROWS):
        try:
            most = max(most, channels_of(source.seen(index)))
        except Exception:  # unreadable rows are reported when all rows are read
            continue
    return most


def _can_be_kept(stored: Any, channels: int) -> bool:
    """Whether an image from before the transform has a form that the store takes, and the channels of the one after."""
    if isinstance(stored, Image.Image):
        return not stored.mode.startswith(("I", "F")) and channels in (1, 3)
    values = as_floats(stored)
    return values.shape[0] == channels and (values.is_floating_point() or int(values.long().max()) <= 255)


def _range_of(size: int, image_of: Callable[[int], Any], channels: int) -> PixelRange | None:
    """The range by the values of some rows; None where none of them is finite, which is said when all are read."""
    low, high = _bounds(size, image_of, channels)
    return data_range(low, high) if np.isfinite(low).all() else None


def _bounds(
    size: int, image_of: Callable[[int], Any], channels: int, rows: int = BOUND_ROWS
) -> tuple[list[float], list[float]]:
    """Smallest and largest finite value per channel over at most so many rows."""
    low, high = torch.full((channels,), float("inf")), torch.full((channels,), float("-inf"))
    for row in spread(np.arange(size), rows):
        seed_streams(row)
        try:
            values = as_floats(image_of(row)).flatten(1).float()
        except Exception:  # unreadable rows are reported when all rows are read
            continue
        if values.shape[0] == channels and bool(torch.isfinite(values).all()):
            low, high = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))
    return low.tolist(), high.tolist()


def _are_levels(size: int, image_of: Callable[[int], Any]) -> bool:
    """Whether images are made of 256 levels from 0 to 1, odd and even ones: a normalisation by halves keeps to one."""
    seen: set[int] = set()
    for row in spread(np.arange(size), FIRST_ROWS):
        seed_streams(row)
        try:
            levels = as_floats(image_of(row)).float() * 255
        except Exception:  # unreadable rows are reported when all rows are read
            continue
        whole = levels.round()
        if float(whole.min()) < 0 or float(whole.max()) > 255 or float((levels - whole).abs().max()) > LEVEL:
            return False
        seen |= set(whole.unique().int().tolist())
    return len({level % 2 for level in seen}) == 2


def _size(image: Any) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.height, image.width
    return tuple(as_floats(image).shape[1:])  # type: ignore[return-value]


def _is_float(image: Any) -> bool:
    return not isinstance(image, Image.Image) and as_floats(image).is_floating_point()
