"""Every image of a data set, read once, as pixels in [0, 1]."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Real
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainguard.data.pixels import PixelRange
from trainguard.data.reading import Rows, Transform, learn_rows
from trainguard.data.samples import Key
from trainguard.data.sources import open_source, spread
from trainguard.data.traces import left_as_is
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.progress import Progress
from trainguard.rng import isolated_rng
from trainguard.warning import warn

REPEATED = 4  # rows that are read twice
LONGEST_PROBLEM = 300  # characters of what a report says of an unreadable sample
CACHE_BYTES = 4 << 30  # 1.4 million 32x32 colour images, or 28,000 of 224x224

OnError = Literal["raise", "skip"]
MOST_CLASSES = 100_000  # that a label may be of where nothing else says how many there are


class ImageStore:
    """The images and labels of a data set, in the data set's own index space; made by `open_images`.

    Same index, same pixels, whatever the order. Images are kept as 8 bits per value up to a stated number of bytes;
    those beyond are read from the data set again when asked for.

    Attributes:
        labels: (N,) int64 as given; -1 where a sample could not be read.
        num_classes: number of class names where the data set knows them, else the largest label plus one.
        class_names: names; the numbers as text where unknown.
        pixel_range: how the training pipeline feeds these pixels to a model.
        shape: (C, H, W).
        label_key: the column of the label, where samples have columns and it is known.
        fed_shape: (C, H, W) of what the pipeline makes of them after the data set; None where that is their own.
        unreadable: indices that could not be read (only with `on_error="skip"`), ascending.
        readable: (M,) int64 indices that can be used, ascending.
        fingerprint: of all labels and all pixels.
    """

    def __init__(
        self,
        rows: Rows,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        fingerprint: str,
        cache: Tensor,
        slots: np.ndarray,
        problems: dict[int, str] | None = None,
    ) -> None:
        self.labels = labels
        self.num_classes = len(class_names)
        self.class_names = class_names
        self.pixel_range: PixelRange = rows.pixel_range
        self.shape: tuple[int, int, int] = rows.shape
        self.label_key = rows.source.label_key
        self.fed_shape: tuple[int, int, int] | None = None
        self.readable = np.flatnonzero(labels >= 0)
        self.unreadable: tuple[int, ...] = tuple(np.flatnonzero(labels < 0).tolist())
        self.fingerprint = fingerprint
        self._rows = rows
        self._held = False  # within `left_as_is`
        self._cache = cache  # (cached, C, H, W) uint8
        self._problems = problems or {}  # what is wrong with each unreadable sample
        self._slots = slots  # (N,) where each image lies in the cache, -1 where it does not

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cached_bytes(self) -> int:
        """Memory that decoded images take."""
        return self._cache.numel()

    def batch(self, index: Any, device: torch.device | str | None = None) -> Tensor:
        """Some images.

        Args:
            index: sequence, array or tensor of B positions, in any order, repeats allowed.
            device: where to put them; they travel as bytes.

        Returns:
            (B, C, H, W) float32 in [0, 1].

        Raises:
            DataError: one of them is unreadable.
        """
        index = np.asarray(index, dtype=np.int64).reshape(-1)
        slots = self._slots[index]
        missing = np.flatnonzero(slots < 0)
        if not len(missing):
            images = self._cache[torch.from_numpy(slots)]
        else:
            images = torch.empty((len(index), *self.shape), dtype=torch.uint8)
            held = np.flatnonzero(slots >= 0)
            images[torch.from_numpy(held)] = self._cache[torch.from_numpy(slots[held])]
            with isolated_rng(0, self._rows.generators), self.left_as_is():
                for position in missing.tolist():
                    images[position] = self._read(int(index[position]))
        return images.to(device, non_blocking=True).float().div_(255)

    @contextmanager
    def left_as_is(self) -> Iterator[None]:
        """What reading changes in the data set is put back at the end of this, and not after each batch within."""
        if self._held or self.cached_bytes == len(self) * math.prod(self.shape):
            yield
            return
        self._held = True
        try:
            with self._rows.source.left_as_is():
                yield
        finally:
            self._held = False

    def as_fed(self, index: Any, device: torch.device | str | None = None) -> Tensor:
        """Some images (B, C, H, W) as training feeds them to a model: in its pixel range, and of its shape."""
        images = self.batch(index, device)
        channels, *size = self.fed_shape or self.shape
        if tuple(size) != self.shape[1:]:
            images = interpolate(images, size, mode="bilinear", antialias=True)
        return self.pixel_range.to_model(images).expand(-1, channels, -1, -1)

    def name(self, index: int) -> str:
        """A sample for a person: `row 17 (cats/3.png)`, or `row 17` where the image is in no file."""
        return self._rows.name(int(index))

    def described(self, index: int) -> str:
        """Its name, and what is wrong with a sample that could not be read."""
        problem = self._problems.get(index)
        return f"{self.name(index)} {shorten(problem, LONGEST_PROBLEM)}" if problem else self.name(index)

    def coloured(self) -> ImageStore:
        """The same grey images with three equal channels."""
        store = copy.copy(self)
        store._rows = self._rows.coloured()
        store.shape, store.pixel_range = store._rows.shape, self.pixel_range.for_channels(3)
        store._cache = self._cache.expand(-1, 3, -1, -1)
        return store

    def only(self, index: Any) -> ImageStore:
        """The same store with only some images held in memory; the rest is read from the data set when asked for.

        Args:
            index: positions to hold.
        """
        held = np.asarray(index, dtype=np.int64).reshape(-1)
        held = held[self._slots[held] >= 0]
        smaller = copy.copy(self)
        smaller._held = False
        smaller._cache = self._cache[torch.from_numpy(self._slots[held])]
        smaller._slots = np.full(len(self), -1, dtype=np.int64)
        smaller._slots[held] = np.arange(len(held))
        return smaller

    def _read(self, index: int) -> Tensor:
        row = self._rows[index]
        if row.image is None:
            raise DataError(f"{self.name(index)} {row.problem}")
        return row.image


def open_images(
    dataset: Any,
    *,
    pixel_range: PixelRange | None = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
    transform: Transform | None = None,
    on_error: OnError = "raise",
    cache_bytes: int = CACHE_BYTES,
    workers: int = 0,
    context: Any = None,
    comparable: bool = True,
    progress: Progress | None = None,
) -> ImageStore:
    """Read every sample of a data set once, check it, and keep it decoded.

    The images are those that training starts from, before its augmentation, where the data set lets that be seen
    (Hugging Face data sets, data sets whose last step is their attribute `transform`, such as torchvision's, and those
    with a method `read_raw(index)`), at the size that training uses. Otherwise they are what the data set gives, its
    random augmentation fixed by the sample's index. No random stream of the user's is moved, nor one that the data set
    keeps for itself.

    Args:
        dataset: map-style torch data set giving (image, label) or a dict, subset of one, or Hugging Face `Dataset`.
        pixel_range: where it is known; otherwise found out, see `trainguard.data.pixels`.
        image_column: key or position of the image, needed only where several could be meant.
        label_column: likewise of the label.
        transform: makes the picture to screen out of an image as read (an evaluation transform).
        on_error: `"raise"`, or `"skip"` to list unreadable samples in `unreadable`; an index never shifts.
        cache_bytes: how much memory decoded images may take; 0 keeps none. CIFAR-10 takes 150 MB.
        workers: processes that read, as in a `DataLoader`.
        context: how they are started, its `multiprocessing_context`.
        comparable: refuse what cannot be screened: samples of one class, or a class of one sample.
        progress: shows how far it is.

    Raises:
        DataError: the data set cannot be used; the message names the row or the column and what to do.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"expected on_error='raise' or 'skip', got {on_error!r}")
    if not isinstance(cache_bytes, Real) or not 0 <= cache_bytes < math.inf:
        raise DataError(f"expected cache_bytes= as a number of bytes, 0 or more, got {cache_bytes!r}")
    generators = find_generators(dataset)
    with isolated_rng(0, generators):
        with left_as_is(dataset):
            source = open_source(dataset, image_column, label_column, generators)
            rows = learn_rows(source, pixel_range, transform, generators)
            _warn_of_own_randomness(rows)
        with left_as_is(dataset):  # what was opened above must not be shared with reading processes
            store = _read_all(rows, on_error, int(cache_bytes), workers, context, progress, comparable)
    if comparable:
        _check_comparable(store.labels, store.class_names, rows)
    return store


def _warn_of_own_randomness(rows: Rows) -> None:
    """Say so where a sample read twice on the same random streams is not the same."""
    for index in spread(np.arange(len(rows)), REPEATED):
        once, again = rows[index].image, rows[index].image
        if once is not None and again is not None and not torch.equal(once, again):
            warn(
                f"{rows.name(index)} is another image when it is read again: the data set draws random numbers that "
                "are not torch's, numpy's or python's own, such as those of np.random.default_rng(). Neither a saved "
                "state nor another process will know these data again; keep the generator in the data set"
            )
            return


def _read_all(
    rows: Rows,
    on_error: OnError,
    cache_bytes: int,
    workers: int,
    context: Any,
    progress: Progress | None,
    comparable: bool,
) -> ImageStore:
    """Every sample, first to last; once more from the first where a picture in colour follows grey ones."""
    size = len(rows)
    labels, slots = np.full((2, size), -1, dtype=np.int64)
    cache = torch.empty((min(size, cache_bytes // math.prod(rows.shape)), *rows.shape), dtype=torch.uint8)
    digest = hashlib.blake2b(repr((size, rows.shape)).encode(), digest_size=16)
    used, problems, colour = 0, dict[int, str](), False
    with progress.stage("reading images", size) if progress else nullcontext() as stage:
        for row in rows.in_order(workers, context):
            if row.image is None and row.colour:
                colour = True
                break
            if stage:
                stage.advance(1)
            if row.image is None:
                problem = f"{rows.name(row.index)} {row.problem}"
                if row.fatal:
                    raise DataError(problem)
                if on_error == "raise":
                    raise DataError(f"{problem}; repair it, leave it out, or pass on_error='skip'")
                problems[row.index] = row.problem
                continue
            labels[row.index] = row.label
            digest.update(row.image.numpy().data)
            if used < len(cache):
                cache[used], slots[row.index], used = row.image, used, used + 1
    if colour:
        del cache, labels, slots  # as much is needed again
        return _read_all(rows.coloured(), on_error, cache_bytes, workers, context, progress, comparable)
    if (labels < 0).all():
        first, problem = next(iter(problems.items()))
        raise DataError(f"none of the {size} images can be read; the first: {rows.name(first)} {problem}")
    # A few images of a model's many classes may have any of its labels; to be compared they must be numbered closely.
    class_names = _checked_classes(labels, rows.source.class_names, rows, len(labels) if comparable else MOST_CLASSES)
    digest.update(labels.data)
    return ImageStore(rows, labels, class_names, digest.hexdigest(), cache[:used], slots, problems)


def _checked_classes(labels: np.ndarray, class_names: tuple[str, ...] | None, rows: Rows, most: int) -> tuple[str, ...]:
    """The names of the classes, after a check that all labels have one, or are below `most` where none has."""
    largest = int(labels.max())
    where = rows.name(int(labels.argmax()))
    if class_names is None:
        if largest >= max(2, most):
            raise DataError(
                f"{where} has the label {largest}, out of range: expected class numbers from 0 without large gaps"
            )
        class_names = tuple(map(str, range(largest + 1)))
    if largest >= len(class_names):
        raise DataError(
            f"{where} has the label {largest}, out of range: the data set names {len(class_names)} classes, 0 to "
            f"{len(class_names) - 1}"
        )
    return class_names


def _check_comparable(labels: np.ndarray, class_names: tuple[str, ...], rows: Rows) -> None:
    """Screening needs two classes, and two samples of each."""
    counts = np.bincount(labels[labels >= 0])
    present = np.flatnonzero(counts)
    if len(present) == 1:
        only = class_names[present[0]]
        raise DataError(
            f"all {counts.sum()} samples have the label {present[0]} ({only!r}): screening needs at least two classes"
        )
    if (counts == 1).any():
        single = int(np.flatnonzero(counts == 1)[0])
        row = rows.name(int(np.flatnonzero(labels == single)[0]))
        raise DataError(
            f"class {single} ({class_names[single]!r}) has a single sample, {row}: screening compares the samples of "
            "a class with each other; add samples or leave the class out"
        )
