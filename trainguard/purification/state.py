"""What a purification works with, how far it is, and where it was when it was killed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainguard.errors import DataError, StateError
from trainguard.files import writable_folder, write_for_torch
from trainguard.models import UnitPixels, digest_of, held_by, load_tensors
from trainguard.results import ScreenResult

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore
    from trainguard.distributed import Processes
    from trainguard.purification.finetuning import FineTuning
    from trainguard.purification.universal import Worn

Indices = NDArray[np.int64]
Weights = dict[str, torch.Tensor]

HELD_OUT = 0.1  # share of the data that judges accuracy
MOST_HELD_OUT = 2000  # images: the standard error of an accuracy of 0.9 is then below 0.007

MOST_PASSES = 40  # of a step over a small extra set, which would be learned by heart


def round_shares(shares: Sequence[float], rounds: int | None, clean: bool) -> tuple[float, ...]:
    """The size of every round's extra set as a share of the pool: all of it, once, where the data are clean."""
    count = len(shares) if rounds is None else rounds
    return (1.0,) if clean else tuple((*shares, *[shares[-1]] * count)[:count])


@dataclass(frozen=True)
class Plan:
    """What happens in which round, and what may be lost."""

    shares: tuple[float, ...]
    adversarial_batches: tuple[int, ...]
    plain_batches: tuple[int, ...]
    max_accuracy_loss: float
    forgiven: float
    seed: int
    patches: int = 0
    passes: int = 0  # over the extra set in step 2, at least
    least_gain: float = 0.002  # of held-out accuracy: one image in 500
    same_set: float = 0.98  # overlap from which two extra sets count as one

    def batches(self, round: int, step: str, images: int, batch_size: int) -> int:
        """Optimizer steps of one step of one round."""
        adversarial, a_pass = step == "adversarial", -(-images // batch_size)
        wanted = self.adversarial_batches if adversarial else self.plain_batches
        least = 0 if adversarial else self.passes * a_pass
        return min(max(wanted[min(round, len(wanted) - 1)], least), MOST_PASSES * a_pass)


@dataclass
class Run:
    """A purification on its way: what it works with, and how far it is."""

    network: UnitPixels
    infected: UnitPixels
    store: ImageStore
    pool: Indices
    judge: tuple[ImageStore, Indices]
    plan: Plan
    how: FineTuning
    processes: Processes
    classes: int  # outputs of the network, at least as many as the data have classes
    extra: Indices
    suspects: Indices | None = None  # what screening flagged, to be unlearned
    worn: Sequence[Sequence[Worn]] = ()  # patches, and overlays, that break the model, to be unlearned
    callbacks: tuple[Any, ...] = ()
    round: int = 0
    step: int = 0
    before: float = 0.0
    best: Weights | None = None
    best_accuracy: float = 0.0
    last_accuracy: float = 0.0
    previous: NDArray[np.float32] | None = None  # similarity of the pool in the round before
    history: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0  # seconds of runs that were killed, up to the last step that was kept

    @property
    def seconds(self) -> float:
        """Wall seconds so far."""
        return self.earlier + time.perf_counter() - self.started


def split(
    store: ImageStore,
    share: float,
    seed: int,
    *,
    initial: ScreenResult | Sequence[int] | None = None,
    hold_out: bool = True,
) -> tuple[Indices, Indices, Indices]:
    """Who may be fine-tuned on, who judges, and who is the first extra set.

    Args:
        store: the images.
        share: size of a random first extra set, as a share of the pool.
        seed: of the draws.
        initial: indices of the first extra set; or a `ScreenResult` of the same data, which gives its kept images as
            the pool and the least suspicious `share` of every class as the first set.
        hold_out: set images aside to judge accuracy.

    Returns:
        The pool, the judge and the first extra set, all ascending; the judge shares nothing with the other two.

    Raises:
        DataError: `initial` does not fit the data, or too few images are left.
    """
    if len(store.readable) < 2 + hold_out:
        raise DataError(f"purification needs at least {2 + hold_out} readable images, {len(store.readable)} are given")
    rng = np.random.default_rng(seed)
    pool, first = np.asarray(store.readable, dtype=np.int64), np.empty(0, dtype=np.int64)
    if isinstance(initial, ScreenResult):
        if len(initial.labels) != len(store) or not np.array_equal(initial.labels[pool], store.labels[pool]):
            raise DataError("initial= is a screening of other data: pass the data set that was screened")
        pool = np.intersect1d(pool, initial.keep)
    elif initial is not None:
        chosen = np.asarray(initial)
        mask = chosen.dtype == bool and chosen.shape == (len(store),)
        if not mask and not (chosen.ndim == 1 and len(chosen) and np.issubdtype(chosen.dtype, np.integer)):
            raise DataError(
                f"expected initial= as indices, or as {len(store)} values of True and False, got {chosen.dtype} of "
                f"shape {chosen.shape}"
            )
        first = np.unique(np.flatnonzero(chosen) if mask else chosen.astype(np.int64))
        if len(first) == 0 or first[0] < 0 or first[-1] >= len(store):
            raise DataError(f"initial= must hold indices from 0 to {len(store) - 1}")
        first = np.intersect1d(first, pool)
    judge = np.empty(0, dtype=np.int64)
    if hold_out:
        others = np.setdiff1d(pool, first)
        judge = np.sort(rng.permutation(others)[: min(MOST_HELD_OUT, round(HELD_OUT * len(pool)) or 1)])
        pool = np.setdiff1d(pool, judge)
    if isinstance(initial, ScreenResult):
        first = least_suspicious(pool, initial.score, store.labels, share)
    elif initial is None:
        first = np.sort(rng.permutation(pool)[: max(2, round(share * len(pool)))])
    if initial is not None and (len(first) < 2 or (hold_out and len(judge) == 0)):
        raise DataError(
            f"initial= leaves {len(first)} images to start from and {len(judge)} to judge accuracy on: give at least "
            "2, and not all of the data, or validation="
        )
    return pool, judge, first


def least_suspicious(pool: Indices, score: NDArray, labels: NDArray, share: float) -> Indices:
    """The `share` of every class with the lowest score, ascending; at least one image of each class that is there."""
    chosen = []
    for label in np.unique(labels[pool]):
        members = pool[labels[pool] == label]
        order = np.argsort(score[members], kind="stable")
        chosen.append(members[order[: max(1, round(share * len(members)))]])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


class Keeper:
    """Writes the state of a run after every step, and finds it again.

    Args:
        folder: where; None keeps nothing.
        run: the run, as it starts.
    """

    def __init__(self, folder: str | Path | None, run: Run) -> None:
        self.run = run
        self.path = None if folder is None else Path(folder) / "purification.pt"
        if self.path is None:
            return
        run.processes.told(self._prepared)
        identity = {
            "plan": asdict(run.plan),
            "how": asdict(run.how),
            "data": run.store.fingerprint,
            "pixel range": [run.store.pixel_range.low, run.store.pixel_range.high],
            "judge": run.judge[0].fingerprint,
            "first extra set": _digest(run.pool, run.judge[1], run.extra),
            "suspects": 0 if run.suspects is None else _digest(run.suspects),
            "model": digest_of(run.network.net),
        }
        self.identity = json.dumps(identity, default=np.generic.item)

    def save(self) -> None:
        """Write the state, whole or not at all; on the main process."""
        run = self.run
        if self.path is None or not run.processes.is_main:
            return
        state = {
            "identity": self.identity,
            "round": run.round,
            "step": run.step,
            "stopped": run.stopped,
            "history": json.dumps(run.history, default=np.generic.item),
            "timing": json.dumps(run.timing),
            "seconds": run.seconds,
            "extra": torch.from_numpy(run.extra),
            "previous": None if run.previous is None else torch.from_numpy(run.previous),
            "weights": held_by(run.network.net),
            "best": run.best,
            "best_accuracy": run.best_accuracy,
            "last_accuracy": run.last_accuracy,
        }
        write_for_torch(self.path, state)

    def restore(self) -> None:
        """Bring the run to where it was; nothing happens where there is no state yet.

        Raises:
            StateError: the state belongs to a purification with other settings, data or model, or cannot be read.
        """
        run = self.run
        if self.path is None:
            return
        state = run.processes.told(self._read)
        if state is None:
            return
        load_tensors(run.network.net, state["weights"])
        run.round, run.step, run.stopped = state["round"], state["step"], state["stopped"]
        run.history, run.timing = json.loads(state["history"]), json.loads(state["timing"])
        run.earlier = state.get("seconds", 0.0)
        run.extra = state["extra"].numpy()
        run.previous = None if state["previous"] is None else state["previous"].numpy()
        run.best, run.best_accuracy, run.last_accuracy = state["best"], state["best_accuracy"], state["last_accuracy"]

    def _prepared(self) -> None:
        assert self.path is not None
        writable_folder(self.path.parent)

    def _read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = dict(json.loads(state["identity"]))
        except Exception as error:  # torch raises many kinds for a damaged file
            raise StateError(f"cannot read {self.path} ({type(error).__name__}): delete it to start again") from error
        if other := _differing(saved, json.loads(self.identity)):
            raise StateError(
                f"{self.path} belongs to another purification (differs in: {', '.join(other)}): "
                "give another state_dir, or the same arguments"
            )
        return state


def _differing(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of what two identities say differently; of the settings that one holds, their own."""
    names = []
    for name, value in now.items():
        before = saved.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            names += _differing(before, value)
        elif before != value:
            names.append(name)
    return names


def _digest(*arrays: NDArray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes() + b"|")
    return digest.hexdigest()
