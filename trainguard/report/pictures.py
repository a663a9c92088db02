"""Arrays of pixels as pictures for a page: thumbnails, averages, and where a trigger lies."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainguard.report.parts import percent

LOSSLESS_SIDE = 64  # larger thumbnails are photographs: JPEG at a fifth of the bytes
CLEAR_Z = 4.0  # a pixel moved by 4 standard errors is not chance in a few thousand pixels
FEW = 30  # images that do not tell their own spread
LEAST_KEPT = 10  # kept images from which a local difference is told
LOCAL_SHARE = 0.15  # a trigger on less of the picture than this is called local and framed


def data_uri(pixels: NDArray[np.uint8], lossless: bool = False) -> str:
    """An image as text that fits into `src`.

    Args:
        pixels: (H, W, C) uint8; with one or two channels the first is shown as grey, else the first three as colours.
        lossless: keep every pixel exactly, whatever the size; small images are always kept so.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3])
    buffer = io.BytesIO()
    kind = "png" if lossless or max(image.size) <= LOSSLESS_SIDE else "jpeg"
    options = {"optimize": True} if kind == "png" else {"quality": 88, "subsampling": 0}
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Trace:
    """What flagged samples of one label have in common, as pictures (H, W, C) uint8.

    Attributes:
        flagged: their average.
        kept: the average of kept samples with the labels that they would get.
        difference: the first minus the second around mid-grey, stretched to the full range.
        gain: by how much it was stretched.
        spectrum: (H, W, 1) logarithm of the difference's Fourier amplitude, low frequencies in the middle.
        where: (H, W, 1) how firmly each pixel is fixed or moved in the flagged samples, in standard errors.
        box: (top, left, bottom, right) around a local trigger, as shares of height and width; None if not local.
    """

    flagged: NDArray[np.uint8]
    kept: NDArray[np.uint8]
    difference: NDArray[np.uint8]
    gain: float
    spectrum: NDArray[np.uint8]
    where: NDArray[np.uint8]
    box: tuple[float, float, float, float] | None


def trace(flagged_mean, flagged_var, kept_mean, kept_var, count: int, kept_count: int) -> Trace:
    """Draw the difference between two groups of images from their means and variances.

    Args:
        flagged_mean: (H, W, C) float32 in [0, 1]; the others likewise.
        flagged_var: its variance.
        kept_mean: the mean that the flagged ones should have had.
        kept_var: its variance.
        count: how many images the flagged ones' mean stands on.
        kept_count: how many different ones the other does: one image is no average, however often it is drawn.
    """
    difference = flagged_mean - kept_mean
    gain = 0.5 / max(float(np.quantile(np.abs(difference), 0.995)), 1 / 255)
    spread = np.maximum(kept_var, flagged_var) if kept_count < FEW else kept_var
    error = flagged_var.mean(-1) / max(count, 1) + spread.mean(-1) / max(kept_count, 1)
    z = np.abs(difference).max(-1) / np.sqrt(error + 1e-6)
    amplitude = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(difference, axes=(0, 1)), axes=(0, 1))).mean(-1))
    return Trace(
        flagged=_bytes(flagged_mean),
        kept=_bytes(kept_mean),
        difference=_bytes(0.5 + gain * difference),
        gain=gain,
        spectrum=_stretched(amplitude),
        where=_stretched(np.log1p(z)),
        box=local_box(z) if kept_count >= LEAST_KEPT else None,
    )


def local_box(z: NDArray[np.float32]) -> tuple[float, float, float, float] | None:
    """The frame around the pixels that stand out, if they lie close together.

    A pixel stands out when its value is at least `CLEAR_Z` and half of the strongest. The trigger is local when the
    frame that holds all but the outermost twentieth on each side covers at most `LOCAL_SHARE` of the picture.

    Args:
        z: (H, W) how far each pixel moved, in standard errors.

    Returns:
        (top, left, bottom, right) as shares of height and width, or None.
    """
    strong = np.where(z >= max(CLEAR_Z, z.max() / 2), z, 0.0)
    if not strong.any():
        return None
    (top, bottom), (left, right) = _middle(strong.sum(1)), _middle(strong.sum(0))
    height, width = z.shape
    if (bottom - top) * (right - left) > LOCAL_SHARE * height * width:
        return None
    return top / height, left / width, bottom / height, right / width


def place(box: tuple[float, float, float, float]) -> str:
    """Where a frame lies, in words: `at the bottom right, on 0.9% of the picture`."""
    top, left, bottom, right = box
    vertical, horizontal = _third((top + bottom) / 2, "top", "bottom"), _third((left + right) / 2, "left", "right")
    words = " ".join(word for word in (vertical, horizontal) if word)
    share = percent((bottom - top) * (right - left), 1)
    return f"{'at the ' + words if words else 'in the middle'}, on {share} of the picture"


def _third(middle: float, low: str, high: str) -> str:
    return low if middle < 1 / 3 else high if middle > 2 / 3 else ""


def _middle(weight: NDArray[np.float32]) -> tuple[int, int]:
    """First and one past the last place that hold all but a twentieth of the weight at either end."""
    filled = np.cumsum(weight) / weight.sum()
    return int(np.searchsorted(filled, 0.05, side="right")), int(np.searchsorted(filled, 0.95, side="left")) + 1


def _stretched(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    return _bytes((values - low) / max(high - low, 1e-9))[..., None]


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
