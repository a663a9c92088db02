"""A screening's result as tensors and plain values, which every checkpoint format takes without running code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from trainguard.errors import StateError
from trainguard.results import ScreenResult
from trainguard.screening.settings import PRESETS


def pack_result(result: ScreenResult) -> dict[str, Any]:
    """A result without its pictures, as a dict of tensors, lists, dicts, strings and numbers."""
    return {field.name: _packed(getattr(result, field.name)) for field in fields(result) if field.name != "evidence"}


def unpack_result(packed: dict[str, Any]) -> ScreenResult:
    """The result that `pack_result` packed.

    Raises:
        StateError: it was packed by a version whose results hold something else.
    """
    values: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in packed.items()
    }
    try:
        for name in ("target_classes", "unreadable", "class_names"):
            values[name] = tuple(values[name])
        return ScreenResult(**values)
    except (KeyError, TypeError) as error:
        raise StateError(f"the saved state is of another version ({error}): screen again without it") from None


def check_fingerprint(saved: str, present: str) -> None:
    """Make sure that a saved state is about the data at hand.

    Raises:
        StateError: it is about others; names both fingerprints.
    """
    if saved != present:
        raise StateError(
            f"the saved state is about the data set {saved}, the loader has {present}: images, labels or their "
            "order changed, or their size did; load the right data, or screen again without the state"
        )


def check_made_by(result: ScreenResult, preset: str) -> None:
    """Make sure that a saved result is of the variant that is asked for now.

    Raises:
        StateError: it was made by another one.
    """
    made, asked = result.settings.get("variant"), PRESETS[preset].variant
    if made not in (None, asked):
        raise StateError(
            f"the saved state is of a screening of the variant {made!r}, preset={preset!r} asks for {asked!r}: "
            "ask for what it was made by, or screen again without the state"
        )


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(name): _packed(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(inner) for inner in value]
    return value
