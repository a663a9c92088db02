"""The pixel range of a pipeline: which model inputs are black and white, and how that is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainguard.data.walk import walk
from trainguard.errors import DataError
from trainguard.warning import warn

PROBES = 40  # black and white images sent through a random transform; their median was exact wherever it was tried
ASSUMED = (
    "the model is given pixels from 0 (black) to 1 (white), as nothing in the data says more: pass mean= and std=, or "
    "bounds="
)
ESTIMATED = "estimated from the data"
LEAST_OF_255 = 10.0  # standard deviation of pixels from 0 to 255; that of pixels from 0 to 1 is at most 1
AGREE = 0.02  # ranges closer than this share of their width are the same


@dataclass(frozen=True)
class PixelRange:
    """The model inputs that stand for black and for white, per channel.

    Attributes:
        low: the value of black, one per channel.
        high: the value of white, one per channel.
        source: where they come from: `given`, `loader`, `transform`, `probe`, `estimated from the data` or `assumed`.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not self.low:
            raise DataError(f"expected as many black as white values, got {len(self.low)} and {len(self.high)}")
        bad = [(a, b) for a, b in zip(self.low, self.high, strict=True) if not np.isfinite([a, b]).all() or a == b]
        if bad:
            raise DataError(f"expected two different finite values for black and white, got {bad[0]}")

    def to_unit(self, x: Tensor) -> Tensor:
        """Model inputs (B, C, H, W) as pixels in [0, 1]; linear, so what lies outside the range stays outside."""
        low, high = self._like(x)
        return (x - low) / (high - low)

    def to_model(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] as the model wants them; the inverse of `to_unit`."""
        low, high = self._like(x)
        return x * (high - low) + low

    @classmethod
    def from_mean_std(cls, mean: Sequence[float], std: Sequence[float], source: str = "given") -> PixelRange:
        """The range of `(x - mean) / std`, with mean and std in [0, 1] pixels, one per channel.

        Raises:
            DataError: not as many means as standard deviations, or one of these is not above 0.
        """
        if len(mean) != len(std) or any(not float(s) > 0 for s in std):
            raise DataError(f"expected as many values for mean as for std, which are above 0, got {mean} and {std}")
        return cls(
            tuple(-float(m) / float(s) for m, s in zip(mean, std, strict=True)),
            tuple((1 - float(m)) / float(s) for m, s in zip(mean, std, strict=True)),
            source,
        )

    def for_channels(self, channels: int) -> PixelRange:
        """The same range for `channels` channels; what is the same for all of its own is repeated.

        Raises:
            DataError: the range has another number of channels, and they differ.
        """
        if len(self.low) == channels:
            return self
        if len(set(zip(self.low, self.high, strict=True))) == 1:
            return PixelRange(self.low[:1] * channels, self.high[:1] * channels, self.source)
        raise DataError(
            f"the pixel range ({self.source}) has {len(self.low)} channels, the images have {channels}: "
            "pass mean= and std=, or bounds=, with one value per channel"
        )

    def agrees_with(self, other: PixelRange) -> bool:
        """Whether both ranges are the same but for rounding and the tails of a probe."""
        width = np.abs(np.subtract(self.high, self.low))
        apart = np.maximum(np.abs(np.subtract(self.low, other.low)), np.abs(np.subtract(self.high, other.high)))
        return bool((apart <= AGREE * width).all())

    def __str__(self) -> str:
        values = (", ".join(f"{value:.3g}" for value in ends) for ends in (self.low, self.high))
        return "[{}] to [{}] ({})".format(*values, self.source)

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            torch.tensor(ends, dtype=x.dtype, device=x.device).view(-1, 1, 1) for ends in (self.low, self.high)
        )
        return low, high


def given_range(
    pixel_range: PixelRange | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    bounds: tuple[float, float] | None = None,
) -> PixelRange | None:
    """What the user said about the pixels, in any of three ways, as a range; None where nothing was said.

    Args:
        pixel_range: the range itself.
        mean: per channel, in [0, 1] pixels; together with `std`.
        std: per channel, in [0, 1] pixels; together with `mean`.
        bounds: the model inputs of black and of white, equal for all channels.

    Raises:
        DataError: more than one way at once, a mean without its std, or both of pixels from 0 to 255.
    """
    if (mean is None) != (std is None):
        raise DataError("expected mean= and std= together, got one of them: pass both")
    if sum(way is not None for way in (pixel_range, mean, bounds)) > 1:
        raise DataError("expected one of pixel_range=, mean= with std=, or bounds=, got several: pass one")
    means, deviations, ends = _numbers("mean", mean), _numbers("std", std), _numbers("bounds", bounds)
    if means is not None and deviations is not None:
        if max(means) > 1 or max(deviations) > 2:  # pixels in [0, 1] deviate by a half at most, and 1 is for none
            raise DataError(f"expected mean= and std= of pixels from 0 to 1, got {mean} and {std}: divide them by 255")
        return PixelRange.from_mean_std(means, deviations)
    if ends is not None:
        if len(ends) != 2:
            raise DataError(f"expected bounds= as the two model inputs of black and of white, got {bounds!r}")
        return PixelRange((ends[0],), (ends[1],), "given")
    if pixel_range is not None and not isinstance(pixel_range, PixelRange):
        raise DataError(f"expected pixel_range= as a PixelRange, got {pixel_range!r}: pass bounds= for two numbers")
    return pixel_range


def _numbers(name: str, given: Any) -> list[float] | None:
    """What was given as a number or several, tensors and arrays among them, as a list; None where nothing was."""
    if given is None:
        return None
    try:
        return np.atleast_1d(np.asarray(given, dtype=np.float64)).ravel().tolist()
    except (TypeError, ValueError):
        raise DataError(f"expected {name}= as numbers, got {given!r}") from None


def loader_range(loader: Any) -> PixelRange | None:
    """The range by a loader's own `mean` and `std`, as timm's `PrefetchLoader` has them (times 255)."""
    mean, std = _numbers_at(loader, "mean"), _numbers_at(loader, "std")
    if mean is None or std is None or len(mean) != len(std):
        return None
    return PixelRange.from_mean_std(*_in_unit(mean, std), "loader")


def transform_range(*roots: Any) -> PixelRange | None:
    """The range by the first normalisation found in a pipeline: an object with numbers as `mean` and `std`.

    Knows torchvision's v1 and v2 `Normalize`, albumentations' and timm's, and Hugging Face image processors by their
    attributes alone. What says in its name that it normalises comes first. Noise, which has a mean and a standard
    deviation too, does not count, nor do the layers of a model that the pipeline happens to hold, nor what undoes a
    normalisation so that images can be shown. `F.normalize` inside a function of the user's is not seen; the black and
    white probe sees it.
    """
    holders = [found for found in walk(*roots, networks=False) if "noise" not in type(found).__name__.lower()]
    for found in sorted(holders, key=lambda found: "normali" not in type(found).__name__.lower()):
        for mean_name, std_name in (("mean", "std"), ("image_mean", "image_std")):
            mean, std = _numbers_at(found, mean_name), _numbers_at(found, std_name)
            if mean is None or std is None or len(mean) != len(std) or min(std) <= 0 or _undoes(mean, std):
                continue
            if getattr(found, "do_normalize", True):
                return PixelRange.from_mean_std(*_in_unit(mean, std), "transform")
    return None


def _undoes(mean: list[float], std: list[float]) -> bool:
    """Whether this makes pixels of normalised values: no pixels have such a mean, or such a deviation."""
    return min(mean) < 0 or (max(mean) <= 1 and 1 < max(std) < LEAST_OF_255)


def _in_unit(mean: list[float], std: list[float]) -> tuple[list[float], list[float]]:
    """Mean and std in [0, 1] pixels, where they may be of pixels from 0 to 255."""
    scale = 255.0 if max(*std, *mean) > 1 else 1.0
    return [m / scale for m in mean], [s / scale for s in std]


def probe_range(run: Callable[[Image.Image], Any], height: int, width: int, channels: int) -> PixelRange | None:
    """The range by what a transform makes of black and of white images.

    Per channel the median of each output, then the smallest and the largest over some 40 images: exact under colour
    jitter, random erasing and crops with padding, where a fit over greys is biased.

    Args:
        run: one PIL image through the transform; may use global random numbers.
        height: of the images to send.
        width: of the images to send.
        channels: of the images to send.

    Returns:
        The range, or None where the transform does not take such an image or does not give a floating-point tensor.
    """
    ends = []
    for value in (0, 255):
        image = Image.new("L" if channels == 1 else "RGB", (width, height), value if channels == 1 else (value,) * 3)
        outputs = []
        for _ in range(PROBES):
            try:
                output = torch.as_tensor(run(image))
            except Exception:  # a user's transform may refuse a flat image in any way; then this source says nothing
                return None
            if not output.is_floating_point() or output.ndim != 3:
                return None
            outputs.append(output.flatten(1).float().median(dim=1).values)
        ends.append(torch.stack(outputs))
    low, high = ends[0].amin(0), ends[1].amax(0)
    if not bool(torch.isfinite(low + high).all()) or bool((low >= high).any()):
        return None
    return PixelRange(tuple(low.tolist()), tuple(high.tolist()), "probe")


def data_range(low: Sequence[float], high: Sequence[float]) -> PixelRange:
    """The range by the data's own smallest and largest values, the last resort.

    Where the values fit a usual range tightly, [0, 1], [-1, 1] or [0, 255], that one is taken.

    Args:
        low: smallest value per channel over the data.
        high: largest value per channel over the data.
    """
    widened = [b if b > a else a + 1.0 for a, b in zip(low, high, strict=True)]
    return usual_range(low, high) or PixelRange(tuple(map(float, low)), tuple(map(float, widened)), ESTIMATED)


def usual_range(low: Sequence[float], high: Sequence[float]) -> PixelRange | None:
    """The usual range that values fit tightly: [0, 1], [-1, 1] or [0, 255]; None where they fit none.

    Args:
        low: smallest value per channel over the data.
        high: largest value per channel over the data.
    """
    least, most = min(low), max(high)
    for black, white in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        width = white - black
        tight = least <= black + 0.25 * width and most >= white - 0.25 * width
        if black <= least and most <= white and tight:
            return PixelRange((black,) * len(low), (white,) * len(low), ESTIMATED)
    return None


def fitted_range(unit: Tensor, fed: Tensor) -> PixelRange | None:
    """The range by which images (B, C, H, W) in [0, 1] became what is fed to a model, of the same shape.

    None where that is no line, one for each channel, or the images hardly vary.
    """
    x, y = (images.double().transpose(0, 1).flatten(1) for images in (unit, fed))
    varied = x - x.mean(1, keepdim=True)
    spread = varied.square().mean(1)
    slope = (varied * y).mean(1) / spread
    low = y.mean(1) - slope * x.mean(1)
    off = (low[:, None] + slope[:, None] * x - y).abs().amax(1)
    if bool((spread < AGREE**2).any()) or not bool((off < AGREE * slope.abs()).all()):
        return None
    return PixelRange(tuple(low.tolist()), tuple((low + slope).tolist()), "loader")


def most_trusted(ranges: Iterable[PixelRange | None], channels: int) -> PixelRange | None:
    """The first range that says something, with a warning where a later one contradicts it.

    Args:
        ranges: in order of trust; what a probe of other channels says is no word about these images.
        channels: of the images.
    """
    heard = [found for found in ranges if found is not None]
    said = [found.for_channels(channels) for found in heard if found.source != "probe" or len(found.low) == channels]
    if not said:
        return None
    for other in said[1:]:
        if not said[0].agrees_with(other):
            warn(
                f"the pixel range is not certain: {said[0]} is used, but another source says {other}; "
                "pass mean= and std=, or bounds=, to say which is right"
            )
            break
    return said[0]


def _numbers_at(found: Any, name: str) -> list[float] | None:
    """An attribute that holds numbers, as a flat list; None for anything else, a method `mean()` included."""
    try:
        value = getattr(found, name, None)
        if value is None or callable(value) or isinstance(value, (str, bytes)):
            return None
        if isinstance(value, Tensor):  # numpy knows neither other devices nor bf16
            value = value.detach().cpu().double()
        numbers = np.asarray(value, dtype=np.float64).reshape(-1).tolist()
    except Exception:  # a property of a stranger's object may raise anything; it is not the number looked for
        return None
    return numbers if 0 < len(numbers) <= 16 and np.isfinite(numbers).all() else None
