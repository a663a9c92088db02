"""What the options of the `trainguard` command may say; whatever is wrong is said in words."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = "names with commas between them"


def at_least_one(text: str) -> int:
    """A whole number from 1."""
    return _read(int, text, "a whole number of at least 1", lambda value: value >= 1)


def seed(text: str) -> int:
    """A whole number that seeds every generator."""
    return _read(int, text, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return _read(float, text, "a number above 0", lambda value: 0 < value < float("inf"))


def share(text: str) -> float:
    """A share in (0, 1]."""
    return _read(float, text, "a share above 0 and up to 1", lambda value: 0 < value <= 1)


def path(text: str) -> Path:
    """A path; `~` is found where no shell has."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(text).expanduser()


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected {NAMES}")
    return found


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(_read(float, name, "numbers with commas between them") for name in names(text))


def seeds(text: str) -> tuple[int, ...]:
    """Seeds with commas between them."""
    return tuple(seed(name) for name in names(text))


def _read(kind: Callable[[str], Any], text: str, what: str, fits: Callable[[Any], bool] = lambda value: True) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text}")
    return value
