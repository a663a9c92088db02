"""Parts of a data set: a live view, whose samples and labels change while workers run, and one for hosts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from trainguard.data.samples import LABEL_NAMES, Key, label_like, relabelled, with_label
from trainguard.errors import DataError
from trainguard.warning import warn

Relabelled = tuple[np.ndarray, np.ndarray]  # samples (R,) and their labels (R,), int64
SCREEN_FIRST = "screen first: result = trainguard.screen(dataset, model), and build the loader on result.apply(dataset)"
WAY_OUT = f"use one of torch's samplers, or {SCREEN_FIRST}"


# Methods of a Hugging Face data set that give no samples; the others would give those that are left out as well.
HARMLESS = {"cleanup_cache_files", "list_indexes", "reset_format", "set_format", "set_transform", "unique"}


class LiveView(Dataset):
    """A data set behind a loader, with positions and labels that can be changed between epochs.

    What can change lies in shared memory: persistent workers see it, forked or spawned. A change never moves a sample
    that is kept to another position, and is made at once, so that batches on their way keep their meaning.

    Other attributes are read from and set on the data set itself. Those that list one value per sample are given and
    taken in the view's order, so that samplers may use them.

    Args:
        dataset: map-style data set of N samples.
        label_key: position or key of the label in a sample.
        population: positions that the loader may give at all (P,); all N unless told.
        twins: other keys under which a sample holds the same label.

    Attributes:
        follower: the loader over the view, and its samplers, see `following.Follower`; lives as long as the view.
    """

    # None that a data set might have itself: torchvision's keep what they know in `_labels`.
    _NAMES = ("dataset", "label_key", "population", "positions", "count", "labels", "aligned", "twins", "grown")
    _OWN = frozenset({"follower"}.union("_view_" + name for name in _NAMES))

    def __init__(
        self, dataset: Any, label_key: Key, population: np.ndarray | None = None, twins: Sequence[Key] = ()
    ) -> None:
        size = len(dataset)
        self._view_dataset = dataset
        self._view_label_key = label_key
        self._view_twins = tuple(twins)
        own = np.arange(size) if population is None else np.asarray(population, dtype=np.int64)
        self._view_population = own
        with torch.inference_mode(False):  # a user may be in it, and relabel later; or have another default device
            self._view_positions = torch.from_numpy(own.copy()).share_memory_()  # (P,) sample at each position
            self._view_count = torch.tensor([len(own)], device="cpu").share_memory_()  # positions in use
            labels = torch.full((size,), -1, device="cpu")  # (N,) label put in place, -1 for none
            self._view_labels = labels.share_memory_()
        self._view_aligned: dict[str, Any] = {}
        self._view_grown = False  # whether that was said
        self.follower: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "follower": None}  # workers that are spawned read, and lead nobody

    def __len__(self) -> int:
        more = len(self._view_dataset) - len(self._view_labels)
        if more and not self._view_grown:
            self._view_grown = True
            warn(
                f"the data set has {abs(more)} samples {'more' if more > 0 else 'fewer'} than were screened, and those "
                "that were are what training is given: protect the loader anew"
            )
        return int(self._view_count)

    def __getitem__(self, position: Any) -> Any:
        """A sample; several at once, or a column, where the data set itself gives them so."""
        if isinstance(position, str):
            return self._in_view_order(
                self._view_dataset[position], position in (self._view_label_key, *self._view_twins)
            )
        if isinstance(position, (slice, list, range)) or getattr(position, "ndim", 0) == 1:
            return self._several(position)
        sample = self._sample(position)
        return self._with_label(self._view_dataset[sample], sample)

    def __getitems__(self, positions: list[int]) -> list[Any]:
        """Several samples at once, fetched as the data set itself would fetch them."""
        samples = [self._sample(position) for position in positions]
        fetch = getattr(self._view_dataset, "__getitems__", None)
        fetched = fetch(samples) if callable(fetch) else [self._view_dataset[sample] for sample in samples]
        return [self._with_label(content, sample) for content, sample in zip(fetched, samples, strict=True)]

    @property
    def positions(self) -> np.ndarray:
        """(len,) int64: the sample at each position."""
        return self._view_positions[: len(self)].numpy().copy()

    @property
    def share(self) -> float:
        """Length of the view over the length of the population, in (0, 1]."""
        return len(self) / len(self._view_population)

    def keep(self, kept: np.ndarray, again: Relabelled | None = None) -> None:
        """Show the kept samples, and after them those that come again.

        Args:
            kept: (M,) int64 samples, in any order.
            again: samples that were left out (R,) and class numbers (R,), both int64: they come under these labels.

        Raises:
            DataError: nothing of the population is kept.
        """
        here = self._is_kept(kept)
        self._show(self._view_population[here], again)

    def refill(self, kept: np.ndarray, seed: int, again: Relabelled | None = None) -> None:
        """Keep the length: where a sample is left out and does not come again, a kept one comes once more.

        Over one pass each kept sample comes equally often, give or take one, as long as none comes again.

        Args:
            kept: (M,) int64 samples, in any order.
            seed: decides which samples come once more.
            again: see `keep`; each at its own position.

        Raises:
            DataError: nothing of the population is kept.
        """
        here = self._is_kept(kept)
        positions = self._view_population.copy()
        positions[~here] = evenly(self._view_population[here], int((~here).sum()), np.random.default_rng(seed))
        self._show(positions, again)

    def __getattr__(self, name: str) -> Any:
        if name in LiveView._OWN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        value = getattr(self._view_dataset, name)
        if hasattr(self._view_dataset, "add_column"):  # a Hugging Face data set
            if name == "num_rows":
                return len(self)
            if callable(value) and name not in HARMLESS and not name.startswith("_"):
                return _refuses(name)
        if isinstance(value, tuple) and value and all(self._is_listed(part) for part in value):  # of a TensorDataset
            return tuple(self._in_view_order(part, key == self._view_label_key) for key, part in enumerate(value))
        if not self._is_listed(value):
            return value
        if getattr(value, "ndim", 1) > 1:  # the images themselves, too many to keep twice
            return self._in_view_order(value, False)
        if name not in self._view_aligned:
            self._view_aligned[name] = self._in_view_order(value, name in LABEL_NAMES)
        return self._view_aligned[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LiveView._OWN:
            super().__setattr__(name, value)
        else:
            self._view_aligned.pop(name, None)
            setattr(self._view_dataset, name, self._in_own_order(name, value))

    def _is_listed(self, value: Any) -> bool:
        """Whether an attribute of the data set holds a value per sample."""
        return _is_list(value) and len(value) == len(self._view_labels)

    def _in_own_order(self, name: str, value: Any) -> Any:
        """What is set in the view's order as the data set lists it, with its own values for the samples left out."""
        before: Any = getattr(self._view_dataset, name, None)
        if not _is_list(value) or len(value) != len(self) or not self._is_listed(before):
            return value
        old = np.asarray(before) if isinstance(value, (np.ndarray, Tensor)) else before
        own = torch.as_tensor(old).clone() if isinstance(value, Tensor) else copy.copy(old)
        own = own if isinstance(own, (np.ndarray, Tensor)) else list(own)
        for place, sample in enumerate(self.positions):
            if self._view_labels[sample] < 0:  # of those that came back, the new label is the view's
                own[sample] = value[place]
        return tuple(own) if isinstance(value, tuple) else own

    def _is_kept(self, kept: np.ndarray) -> np.ndarray:
        here = np.isin(self._view_population, kept)
        if not here.any():
            raise DataError(f"none of the loader's {len(here)} samples is kept: there is nothing left to train on")
        return here

    def _show(self, positions: np.ndarray, again: Relabelled | None) -> None:
        labels = torch.full_like(self._view_labels, -1)
        if again is not None:
            samples, new = again
            labels[torch.from_numpy(samples)] = torch.from_numpy(new)
            back = np.isin(self._view_population, samples)
            if len(positions) == len(self._view_population):
                positions = np.where(back, self._view_population, positions)
            else:
                positions = np.concatenate([positions, self._view_population[back]])
        # Workers read meanwhile: what does not change is written as it was, and the number of positions comes last.
        self._view_labels.copy_(labels)
        self._view_positions[: len(positions)] = torch.from_numpy(positions)
        self._view_count.fill_(len(positions))
        self._view_aligned.clear()

    def _sample(self, position: int) -> int:
        count = int(self._view_count)  # each sample is asked for here: nothing else
        if not -count <= position < count:
            raise IndexError(
                f"position {position} is outside the {count} samples of the protected data set: a sampler with "
                f"a count of its own cannot leave samples out, {WAY_OUT}"
            )
        return int(self._view_positions[position % count])

    def _several(self, positions: Any) -> Any:
        """What the data set gives for a list, a slice or an array of positions, its labels as they are now."""
        samples = self.positions[positions if isinstance(positions, slice) else np.asarray(positions)]
        content = self._view_dataset[samples.tolist()]
        new = self._view_labels[torch.from_numpy(samples)]
        if bool((new < 0).all()):
            return content
        one_by_one = isinstance(content, list) and len(content) == len(samples)
        if one_by_one and isinstance(content[0], (tuple, Mapping)):
            return [self._with_label(each, int(sample)) for each, sample in zip(content, samples, strict=True)]
        for key in (*self._view_twins, self._view_label_key):
            column = content[key]
            changed: Any = copy.deepcopy(column) if isinstance(column, (Tensor, np.ndarray)) else list(column)
            for place in torch.nonzero(new >= 0).flatten().tolist():
                changed[place] = label_like(changed[place], int(new[place]))
            content = with_label(content, key, changed)
        return content

    def _with_label(self, content: Any, sample: int) -> Any:
        label = int(self._view_labels[sample])
        return content if label < 0 else relabelled(content, self._view_label_key, label, self._view_twins)

    def _in_view_order(self, value: Any, is_label: bool) -> Any:
        positions = self.positions
        arrays = isinstance(value, (np.ndarray, Tensor))
        # A Hugging Face column is no list, and read as it goes.
        ordered: Any = value[positions] if arrays else [value[int(position)] for position in positions]
        if is_label:
            new = self._view_labels.numpy()[positions]
            for place in np.flatnonzero(new >= 0).tolist():
                ordered[place] = label_like(ordered[place], int(new[place]))
        return tuple(ordered) if isinstance(value, tuple) else ordered


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim > 0)


def _refuses(name: str) -> Any:
    """In the place of a method that would give the samples that are left out as well."""

    def refused(*_: Any, **__: Any) -> None:
        raise DataError(
            f"{name}() of a protected data set would give the flagged samples as well: call it before the loader is "
            f"protected, or {SCREEN_FIRST}"
        )

    return refused


class Kept(Subset):
    """Some samples of a data set whose transform a host reads and sets from outside, as timm does."""

    @property
    def transform(self) -> Any:
        """Of the data set itself."""
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value  # type: ignore[attr-defined]


def evenly(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of `items` at random so that the numbers of draws of two items differ by one at most.

    Args:
        items: (M,) what to draw from, M at least 1.
        count: how many, may be more than M.
        rng: decides the order.

    Returns:
        (count,) draws.
    """
    rounds = -(-count // len(items))
    draws = [rng.permutation(items) for _ in range(rounds)]
    return np.concatenate(draws)[:count] if draws else items[:0]
