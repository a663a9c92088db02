"""One sample taken apart: which part is the image, which the label, and both in the form the store keeps."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainguard.data.pixels import PixelRange
from trainguard.errors import DataError

Key = str | int
LABEL_NAMES = ("label", "labels", "target", "targets", "y")
HARD_LABELS = (
    "screening needs one class number per sample; give the argmax of a one-hot label, and mix labels after the data "
    "set, in collate_fn or on the batch"
)
CHANNELS = (1, 3, 4)
OVERSHOT = 0.02  # of the range, 5 grey levels: what an interpolation overshoots
OUTSIDE = 0.1  # share of an image's values beyond that which contradicts a range that the user gave
ALIKE = 3  # samples of a class that say whether all of them hold the same
SMOOTHED = 1e-3  # what rounding may make of the values of a smoothed label
NOISE = 0.5  # of the range: random erasing with normal noise goes so far beyond it


def find_keys(sample: Any, image_column: Key | None = None, label_column: Key | None = None) -> tuple[Key, Key]:
    """Where image and label are in a sample.

    Args:
        sample: a tuple or list (image first, label second unless named) or a dict.
        image_column: position or key of the image, where it is known.
        label_column: likewise of the label.

    Returns:
        (image key, label key).

    Raises:
        DataError: a part is missing, or more than one could be meant.
    """
    if isinstance(sample, Mapping):
        return _named(sample, image_column, "image"), _named(sample, label_column, "label")
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        shown = (
            f"{type(sample).__name__} of {len(sample)}" if isinstance(sample, (tuple, list)) else type(sample).__name__
        )
        raise DataError(f"expected samples (image, label) or a dict with both, got {shown}: wrap the data set")
    image, label = (_position(sample, column, usual) for column, usual in ((image_column, 0), (label_column, 1)))
    if not is_image(sample[image]):
        if isinstance(sample[image], (Tensor, np.ndarray)):
            raise DataError(
                f"expected an image of shape (H, W) or (C, H, W) as part {image} of a sample, got "
                f"{tuple(sample[image].shape)}: let the data set give images one by one, not flattened"
            )
        raise DataError(
            f"expected an image as part {image} of a sample, got {type(sample[image]).__name__}: "
            "pass image_column= and label_column= with the positions"
        )
    return image, label


def find_label(sample: Any, label_column: Key | None = None) -> Key:
    """Where the label is in a sample as training sees it.

    Args:
        sample: a tuple, a list, or a dict, which a transform may have given other keys than the data set's columns.
        label_column: position or key of the label, where it is known.

    Raises:
        DataError: more than one part could be meant.
    """
    if isinstance(sample, Mapping):
        return _named(sample, label_column if label_column in sample else None, "label")
    if label_column in getattr(sample, "_fields", ()):
        return _position(sample, label_column, 1)
    return label_column % len(sample) if isinstance(label_column, int) else 1


def is_image(value: Any) -> bool:
    """Whether a value can be an image: PIL, or an array or tensor of numbers with 2 or 3 dimensions."""
    if isinstance(value, Image.Image):
        return True
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim in (2, 3)


def as_label(value: Any) -> int:
    """A sample's label as a class number.

    Args:
        value: what the data set gives.

    Raises:
        DataError: the label is soft (a vector), not an integer, or negative.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        if (value.size if isinstance(value, np.ndarray) else value.numel()) != 1:
            raise DataError(f"has a soft label of shape {tuple(value.shape)}: {HARD_LABELS}")
        value = value.item()
    if isinstance(value, (list, tuple)):
        raise DataError(f"has a soft label of {len(value)} values: {HARD_LABELS}")
    if not isinstance(value, (numbers.Integral, np.bool_)):
        came = "no label" if value is None else f"the label {value!r} ({type(value).__name__})"
        raise DataError(f"has {came}: expected a class number, an integer from 0")
    value = int(value)
    if not 0 <= value < 2**63:
        raise DataError(f"has the label {value}, out of range: expected a class number from 0, without large gaps")
    return value


def channels_of(image: Any) -> int:
    """Number of channels that an image will have in the store: 1 for grey and two-level, 3 for other PIL images."""
    if isinstance(image, Image.Image):
        return 1 if image.mode in ("1", "L", "LA") else 3
    return _channels_first(image).shape[0]


def as_floats(image: Any, channels: int | None = None) -> Tensor:
    """An image as a tensor (C, H, W) of the values it came with: 0 to 255 where they are whole numbers.

    Args:
        image: PIL image, array (H, W), (H, W, C) or (C, H, W), or tensor likewise.
        channels: converts PIL images to grey (1) or RGB (3).

    Raises:
        DataError: not an image, or one with 16 or 32 bits per value in a PIL image.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"expected an image of 8 bits per value, got PIL mode {image.mode!r}: convert it to 'L' or 'RGB'"
            )
        image = np.array(image.convert("L" if (channels or channels_of(image)) == 1 else "RGB"))
    if not is_image(image):
        form = f" of shape {tuple(image.shape)}" if isinstance(image, (Tensor, np.ndarray)) else ""
        raise DataError(f"expected an image, got {'nothing' if image is None else type(image).__name__}{form}")
    return _channels_first(image).cpu()


def as_bytes(image: Any, shape: tuple[int, int, int], pixel_range: PixelRange) -> Tensor:
    """An image as the store keeps it: uint8 (C, H, W), 0 black and 255 white.

    Whole numbers are taken as 0 to 255; floats are mapped by `pixel_range` and rounded to the nearest of 256 levels.

    Args:
        image: what the data set gave.
        shape: (C, H, W) that it must have.
        pixel_range: of floating-point images.

    Raises:
        DataError: another shape, or values outside the range.
        FloatingPointError: NaN or infinite values.
    """
    values = as_floats(image, shape[0])
    if tuple(values.shape) != shape:
        if values.shape[1:] == shape[1:]:
            raise DataError(
                f"has {values.shape[0]} channels, the first image {shape[0]}: give all images in grey, or all in colour"
            )
        raise DataError(
            f"has the shape {_shape(values.shape)}, the first image {_shape(shape)}: images must have one size; "
            "resize them in the data set's transform, or with --size on the command line"
        )
    if values.dtype == torch.uint8:
        return values.contiguous()
    if values.dtype == torch.bool:
        return values.to(torch.uint8).mul_(255).contiguous()
    if not values.is_floating_point():
        values = values.long()  # torch has no minimum of unsigned 16 bits
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > 255:
            raise DataError(f"has values from {least} to {most}: expected whole numbers from 0 to 255")
        return values.to(torch.uint8).contiguous()
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        bad = "NaN" if bool(torch.isnan(values).any()) else "infinite"
        raise FloatingPointError(f"has {bad} pixels ({int((~torch.isfinite(values)).sum())} of {values.numel()})")
    unit = pixel_range.to_unit(values[None])[0]
    beyond = torch.maximum(-unit, unit - 1)
    contradicted = pixel_range.source == "given" and float((beyond > OVERSHOT).float().mean()) > OUTSIDE
    if contradicted or float(beyond.max()) > NOISE:
        raise DataError(
            f"has values from {float(values.min()):.3g} to {float(values.max()):.3g}, outside the pixel range "
            f"{pixel_range}: pass mean= and std=, or bounds=, as the pipeline has them"
        )
    return unit.clamp_(0, 1).mul_(255).round_().to(torch.uint8).contiguous()


def find_twins(samples: Iterable[Any], key: Key) -> tuple[Key, ...]:
    """Where else samples hold the same label, as a number or as a vector, see `class_in`.

    Args:
        samples: as training sees them, of several classes: two columns may agree on a few.
        key: where the label is.

    Returns:
        The other keys or positions at which all samples hold it.
    """
    seen: dict[Key, None] | None = None
    labels = set()
    for sample in samples:
        if not isinstance(sample, (Mapping, tuple, list)):
            return ()
        parts: dict[Key, Any] = dict(sample if isinstance(sample, Mapping) else enumerate(sample))
        label = _number_in(parts.pop(key % len(sample) if isinstance(key, int) and key not in parts else key))
        names = parts if seen is None else seen
        seen = {name: None for name in names if name in parts and class_in(parts[name]) == label}
        labels.add(label)
    return tuple(seen or ()) if len(labels - {None}) > 1 else ()


def find_derived(samples: Sequence[Any], key: Key, twins: Sequence[Key] = ()) -> tuple[Key, ...]:
    """Where samples hold what follows from their label: a coarser class, or its name.

    Args:
        samples: as training sees them.
        key: where the label is.
        twins: where it is as well.

    Returns:
        The keys or positions at which all samples of a class hold one number or word, and those of some classes others.
    """
    if not all(isinstance(sample, (Mapping, tuple, list)) for sample in samples):
        return ()
    labels = [class_in(sample[key]) for sample in samples]
    several = {label for label in labels if labels.count(label) >= ALIKE}
    known = [sample for sample, label in zip(samples, labels, strict=True) if label in several]
    if len(several) < 2:
        return ()
    found: list[Key] = []
    for name in samples[0] if isinstance(samples[0], Mapping) else range(len(samples[0])):
        if name in (key, *twins) or not all(_is_plain_in(sample, name) for sample in known):
            continue
        values = {(class_in(sample[key]), sample[name]) for sample in known}
        if len(values) == len(several) and len({value for _, value in values}) > 1:
            found.append(name)
    return tuple(found)


def _is_plain_in(sample: Any, name: Key) -> bool:
    """Whether a sample holds a number or a word there; some have fewer parts than others."""
    try:
        return isinstance(sample[name], (numbers.Integral, str))
    except LookupError:
        return False


def relabelled(sample: Any, key: Key, label: int, twins: Sequence[Key] = ()) -> Any:
    """A copy of a sample with another label, of the type the old one had.

    Args:
        sample: tuple, list, named tuple or dict; not changed.
        key: where the label is.
        label: the new one.
        twins: where it is as well, see `find_twins`.
    """
    for twin in twins:
        sample = with_label(sample, twin, label_like(sample[twin], label))
    return with_label(sample, key, label_like(sample[key], label))


def label_like(old: Any, label: int) -> Any:
    """A class number in the form of another label: a number, an array of one, or a vector with a place per class.

    In a vector the new class changes places with the old one, so that one that is smoothed stays so.
    """
    if isinstance(old, (Tensor, np.ndarray)):
        new: Any = old.clone() if isinstance(old, Tensor) else old.copy()
        if old.ndim == 1 and len(old) > 1:
            before = int(np.asarray(old.tolist()).argmax())  # torch has none of truth values
            new[before], new[label] = old[label], old[before]
        else:
            new[...] = label
        return new
    if isinstance(old, (list, tuple)) and len(old) > 1:
        moved, before = list(old), max(range(len(old)), key=old.__getitem__)
        moved[before], moved[label] = old[label], old[before]
        return type(old)(moved)
    if isinstance(old, (bool, float)) and not isinstance(old, np.generic):
        return type(old)(label)
    return old.dtype.type(label) if isinstance(old, np.generic) else label


def with_label(sample: Any, key: Key, new: Any) -> Any:
    """A copy of a sample, or of a column of several, with something else where the label is."""
    if isinstance(sample, Mapping):
        changed: Any = copy.copy(sample) if isinstance(sample, MutableMapping) else dict(sample)
        changed[key] = new
        return changed
    parts: list[Any] = list(sample)
    parts[key] = new  # type: ignore[index]
    if hasattr(sample, "_fields"):
        return type(sample)(*parts)
    return type(sample)(parts)


def _named(sample: Mapping[Key, Any], column: Key | None, what: str) -> Key:
    if column is not None:
        if column not in sample:
            raise DataError(f"a sample has no {what} {column!r}: it has {', '.join(map(repr, sample))}")
        return column
    if what == "image":
        found = [key for key, value in sample.items() if is_image(value)]
    else:
        found = [key for key in sample if key in LABEL_NAMES]
        found = found or [key for key, value in sample.items() if _is_number(value)]
    if len(found) != 1:
        count = (
            f"{len(found)} could be it: {', '.join(map(repr, found))}"
            if found
            else f"it has {', '.join(map(repr, sample))}"
        )
        raise DataError(f"expected one {what} in a sample, but {count}; pass {what}_column=")
    return found[0]


def _position(sample: tuple | list, column: Key | None, usual: int) -> int:
    if column is None:
        return usual
    if column in getattr(sample, "_fields", ()):
        return sample._fields.index(column)  # type: ignore[union-attr]
    if not isinstance(column, int) or not -len(sample) <= column < len(sample):
        raise DataError(f"a sample is a {type(sample).__name__} of {len(sample)}, it has no part {column!r}")
    return column


def _number_in(value: Any) -> int | None:
    """A label as a number; None where it is none."""
    try:
        return as_label(value)
    except DataError:
        return None


def class_in(value: Any) -> int | None:
    """The class that a number names, or a vector with a 1 at its place and 0 elsewhere; None for anything else.

    Or a smoothed one, with one larger value and all others alike, 1 in all. A number may be a whole one among floats,
    as a loss on one output wants it.
    """
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        return _number_in(int(value) if isinstance(value, (float, np.floating)) and value.is_integer() else value)
    try:
        places = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # uneven lists, tensors elsewhere
        return None
    if places.size == 1 and places.dtype.kind == "f":
        return class_in(places.item())
    if places.ndim != 1 or len(places) < 2 or places.dtype.kind not in "iufb":
        return _number_in(value)
    places = places.astype(np.float64)
    largest = int(places.argmax())
    others = np.delete(places, largest)
    smooth = len(places) > 2 and abs(float(places.sum()) - 1) < SMOOTHED  # of two, one may be a mixture
    whole = smooth if others.any() else places[largest] == 1
    alike = others.min() >= 0 and others.max() - others.min() <= SMOOTHED and places[largest] > others.max() + SMOOTHED
    return largest if whole and alike else None


def _is_number(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return isinstance(value, numbers.Integral)


def _channels_first(image: Tensor | np.ndarray) -> Tensor:
    """(C, H, W); where both ends could be channels, an array has them last and a tensor first, by custom.

    Where neither is a usual number of channels (several spectral bands), an array has them at the end that its other
    sides, if they are equal, leave, or else at the shorter end.
    """
    if isinstance(image, np.ndarray) and (min(image.strides) < 0 or not image.flags.writeable):
        image = image.copy()  # turned by a view, or a file that is read as it goes: torch takes neither
    if image.ndim == 2:
        return torch.as_tensor(image)[None]
    first, last = image.shape[0] in CHANNELS, image.shape[-1] in CHANNELS
    if isinstance(image, np.ndarray) and not first and not last:
        high, wide, deep = image.shape
        last = high == wide if (high == wide) != (wide == deep) else deep < high
    if last and (isinstance(image, np.ndarray) or not first):
        return torch.as_tensor(image).permute(2, 0, 1)
    return torch.as_tensor(image)


def _shape(shape: Any) -> str:
    return "x".join(str(int(side)) for side in shape)
