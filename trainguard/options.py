"""What options of the `trainguard` command may say, and those about images, which several of its commands take."""

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


def share_or_none(text: str) -> float:
    """A share in [0, 1]."""
    return _read(float, text, "a share from 0 to 1", lambda value: 0 <= value <= 1)


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


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What every command that reads images takes."""
    parser.add_argument("--split", default="train", help="split of a data set that has several (default: %(default)s)")
    parser.add_argument("--image-column", help="column of the images, where there are several")
    parser.add_argument("--label-column", help="column of the labels, where there are several")
    parser.add_argument("--size", type=at_least_one, help="scale images to SIZE x SIZE pixels; needed if sizes differ")
    parser.add_argument("--mean", type=numbers, help="of the model's normalisation, in [0, 1] pixels: 0.49,0.48,0.44")
    parser.add_argument("--std", type=numbers, help="likewise; without both, the model is given pixels from 0 to 1")
    parser.add_argument("--bounds", type=numbers, help="in their place: the model's inputs of black and white: -1,1")
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="what to do about unreadable images"
    )


def given(arguments: argparse.Namespace, *options: str) -> dict[str, Any]:
    """Of some options those that were given."""
    values = {name: getattr(arguments, name) for name in options}
    return {name: value for name, value in values.items() if value is not None}


def columns(arguments: argparse.Namespace) -> dict[str, Any]:
    """The columns that were named."""
    return given(arguments, "image_column", "label_column")


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options say of how images are read, as `screen`, `purify` and `audit` take it."""
    if arguments.bounds is not None and len(arguments.bounds) != 2:
        raise ValueError(f"expected two numbers as --bounds, got {len(arguments.bounds)}")
    return given(arguments, "mean", "std", "bounds") | columns(arguments) | {"on_error": arguments.on_error}


def _read(kind: Callable[[str], Any], text: str, what: str, fits: Callable[[Any], bool] = lambda value: True) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text}")
    return value
