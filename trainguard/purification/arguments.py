"""What `purify` and `audit` may be asked for: a number out of range is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from trainguard.purification.finetuning import RADIUS


class Kind(NamedTuple):
    """What an argument has to be.

    Attributes:
        number: its type.
        fits: whether a value of that type will do.
        said: the same in words.
    """

    number: type
    fits: Callable[[Any], bool]
    said: str


COUNT = Kind(Integral, lambda value: value >= 1, "a whole number of at least 1")
NONE_OR_MORE = Kind(Integral, lambda value: value >= 0, "a whole number of at least 0")
SHARE = Kind(Real, lambda value: 0 <= value <= 1, "a share in [0, 1]")
PART = Kind(Real, lambda value: 0 < value <= 1, "a share in (0, 1]")
WEIGHT = Kind(Real, lambda value: 0 <= value < float("inf"), "a weight of at least 0")
RATE = Kind(Real, lambda value: 0 < value < float("inf"), "a number above 0")
SEED = Kind(Integral, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
KINDS = {
    "images": COUNT,
    "rounds": COUNT,
    "shares": PART,
    "adversarial_batches": NONE_OR_MORE,
    "plain_batches": NONE_OR_MORE,
    "attack_steps": COUNT,
    "lr": RATE,
    "batch_size": COUNT,
    "kept": SHARE,
    "mixed": WEIGHT,
    "features": WEIGHT,
    "shared": WEIGHT,
    "patches": NONE_OR_MORE,
    "max_accuracy_loss": SHARE,
    "poison_share": SHARE,
}
BY_ROUND = {"shares", "adversarial_batches", "plain_batches"}
UNIT_PIXELS = Kind(Real, lambda value: 0 < value <= 1, "a radius in (0, 1], in unit pixels: 6/255, not 6")


def check_arguments(norm: str, eps: float | None, seed: int, **given: Any) -> None:
    """Refuse what cannot be meant.

    Args:
        norm: of the perturbation.
        eps: its radius in unit pixels; None for the usual one.
        seed: of everything random.
        **given: further arguments by name, see `KINDS`; None for the usual value.

    Raises:
        ValueError: one of them is out of range; the message names it and says what is expected.
    """
    if norm not in RADIUS:
        raise ValueError(f"expected norm= one of {', '.join(RADIUS)}, got {norm!r}")
    _check("seed", seed, SEED)
    if eps is not None:
        _check("eps", eps, UNIT_PIXELS if norm == "linf" else RATE)
    for name, value in given.items():
        if value is not None and name not in BY_ROUND:
            _check(name, value, KINDS[name])
        elif value is not None:
            _check_each(name, value, KINDS[name])


def _check(name: str, value: Any, kind: Kind) -> None:
    if not (isinstance(value, kind.number) and kind.fits(value)):
        raise ValueError(f"expected {name}= as {kind.said}, got {value!r}")


def _check_each(name: str, values: Any, kind: Kind) -> None:
    """One value for each round, at least one."""
    try:
        rounds = [*values]
    except TypeError:
        rounds = []
    if not rounds or isinstance(values, (str, Mapping, Iterator)):
        raise ValueError(f"expected {name}= as a list, a value for each round, got {values!r}")
    for value in rounds:
        _check(name, value, kind)
