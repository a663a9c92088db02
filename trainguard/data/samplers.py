"""A user's samplers: whether a copy may draw from a view in their place, and what of theirs follows the view."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from itertools import islice
from operator import index
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler

from trainguard.data.traces import left_as_is
from trainguard.data.views import LiveView
from trainguard.data.walk import find_generators
from trainguard.errors import DataError
from trainguard.rng import isolated_rng

PLACE = re.compile(r"_?(start|stop|begin|end|first|last|offset|low|high|lower|upper|lo|hi)(_?(index|idx|row|sample))?")
LIKELY = 20  # times the mean distance of what was drawn: a gap that chance leaves once in 10^9
KNOWN = ("torch", "torchdata", "timm", "accelerate", "lightning", "pytorch_lightning", "transformers")  # libraries
SHORT = 3  # times as few samples in the data set that a sampler is tried on


def is_setting(name: str, value: Any, size: int) -> bool:
    """Is what a sampler holds a plain setting, and no place in a data set of `size`, which a view numbers anew?"""
    if not (value is None or isinstance(value, (bool, int, float, str, torch.Generator))):
        return False
    place = type(value) is int and value != 0 and PLACE.fullmatch(name) is not None
    return not place and not (value == size and name != "batch_size")


def draws_by_itself(sampler: Any) -> bool:
    """Whether a sampler draws by code outside the known libraries."""
    own = getattr(type(sampler).__iter__, "__module__", None) or ""
    return own.split(".")[0] not in KNOWN


def part_of_all(size: int) -> np.ndarray:
    """The samples (M,) of a data set of `size` that a sampler is tried on: the first of them."""
    return np.arange(max(1, size // SHORT))


def follows(sampler: Any, over_few: Callable[[], Any], few: LiveView, population: np.ndarray) -> bool:
    """Does a user's own sampler draw from all samples that it may give, and from no more than another data set has?

    One that holds a number which it once worked out (half of the data set is trained on) passes for one with plain
    settings. So an epoch of a copy is drawn: no stretch of the samples may stay out of it by more than chance. And
    an epoch of one over a part of the data set: all that it gives must lie in that.

    Args:
        sampler: of torch's kind.
        over_few: makes the same over a part of the data set.
        few: a view of that part.
        population: (P,) the samples that it may give.
    """
    size = len(population)
    try:
        drawn = np.searchsorted(np.sort(population), _epoch(sampler, size))
        least = _epoch(over_few(), size)
    except Exception:  # whatever a user's sampler may raise
        return False
    if not len(drawn):
        return True
    gaps = np.diff(np.concatenate([[-1], np.unique(drawn), [size]]))
    return bool(gaps.max() <= 1 + LIKELY * size / len(drawn)) and bool((least < len(few)).all())


def _epoch(sampler: Any, size: int) -> np.ndarray:
    """The positions (n,) that a copy of a sampler gives in an epoch, without a trace of it.

    Raises:
        TypeError: it gives something else than positions, or lists of them.
    """
    trial = copy.copy(sampler)
    if isinstance(vars(trial).get("set_epoch"), Told):
        del trial.set_epoch
    with isolated_rng(0, find_generators(sampler)), left_as_is(sampler):
        if callable(getattr(trial, "set_epoch", None)):  # some draw their order when they are told
            trial.set_epoch(0)
        found = list(islice(iter(trial), 2 * size))  # some never end
    several = (list, tuple) if isinstance(sampler, BatchSampler) else list
    return np.array([index(place) for each in found for place in (each if isinstance(each, several) else [each])], int)


class Told:
    """In the place of a user's `sampler.set_epoch`: the sampler that took its place is told as well, while it lives."""

    def __init__(self, own: Callable[[int], None], live: Any = None) -> None:
        self.own = own
        self.live = (lambda: None) if live is None else weakref.ref(live)

    def __call__(self, epoch: int) -> None:  # noqa: D102  (the class says what it does)
        self.own(epoch)
        if (live := self.live()) is not None:
            live.set_epoch(epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        return Told, (self.own,)


def tell(sampler: Any, live: Any) -> None:
    """Let a sampler's handle, which scripts keep, tell the one that took its place of every new epoch."""
    own = link = getattr(sampler, "set_epoch", None)
    while isinstance(link, Told):
        if link.live() is live:
            return
        link = link.own
    while isinstance(own, Told) and own.live() is None:
        own = own.own
    if callable(own):
        vars(sampler)["set_epoch"] = Told(own, live)


def weights_for(view: LiveView, weights: torch.Tensor) -> torch.Tensor:
    """Sampling weights by position, from weights by sample: a sample that comes n times shares its weight among them.

    Args:
        view: with len(view) positions.
        weights: (N,) float64, one per sample.

    Returns:
        (len(view),) float64.

    Raises:
        DataError: no kept sample has a weight above 0.
    """
    positions = torch.from_numpy(view.positions)
    times = torch.bincount(positions, minlength=len(weights))
    shared = weights.cpu()[positions] / times[positions]
    if not bool((shared > 0).any()):
        raise DataError("every kept sample has the sampling weight 0: there is nothing left to train on")
    return shared


def scaled(count: int, view: LiveView) -> int:
    """A number of samples per epoch, shortened as the view is; at least 1."""
    return max(1, round(count * view.share))
