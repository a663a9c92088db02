r"""The steps of a screening in their order, each resumable: learn, score, partition, relearn or enhance, identify."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from trainguard.data.reading import shown
from trainguard.data.store import ImageStore
from trainguard.distributed import Processes
from trainguard.errors import StateError
from trainguard.evidence import collect_evidence
from trainguard.files import plain
from trainguard.models import digest_of, shapes_of
from trainguard.progress import Progress
from trainguard.results import ScreenResult
from trainguard.screening.settings import Settings
from trainguard.screening.state import State
from trainguard.versions import versions
from trainguard.warning import warn


@dataclass
class Run:
    """What every step of one screening needs.

    Attributes:
        store: the images.
        model: a copy of the user's model in model input space, or None.
        trained: likewise, of a model that has learned the data already; None where nobody has.
        settings: what decides.
        spend: epoch-equivalents of forward and backward passes that may be used.
        seed: of everything random.
        processes: the ranks.
        device: where the probes live.
        state: finished steps on disk.
        progress: the terminal.
        callbacks: the user's.
        timing: wall seconds by stage, filled as they end.
        history: a row per probe epoch.
        cut: whether a callback has ended a probe early.
    """

    store: ImageStore
    model: nn.Module | None
    trained: nn.Module | None
    settings: Settings
    spend: float
    seed: int
    processes: Processes
    device: torch.device
    state: State
    progress: Progress
    callbacks: Sequence[Any]
    timing: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False

    def tell(self, hook: str, *args: Any, **figures: Any) -> bool:
        """Call a hook on every callback that has it; True where one of them says so."""
        methods = [getattr(callback, hook, None) for callback in self.callbacks]
        return True in [method(*args, **figures) for method in methods if method is not None]

    def report(self, hook: str, *args: Any, **figures: Any) -> None:
        """Call a hook when the work is done: that one fails, such as a tracker's, is no reason to lose it."""
        for callback in self.callbacks:
            try:
                getattr(callback, hook, lambda *_, **__: None)(*args, **figures)
            except Exception as error:  # whatever a user's code may raise
                said = f"{type(callback).__name__}.{hook} failed, which changes nothing in the result: {shown(error)}"
                warn(said)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        self.tell("on_stage_start", name)
        start = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - start

    def epoch_done(self, **row: Any) -> bool:
        """Note a probe epoch and tell the callbacks; True where one of them wants no more of that probe's."""
        self.history.append(row)
        ends = self.processes.broadcast(self.tell("on_probe_epoch_end", **row))
        self.cut |= ends
        return ends


@dataclass(frozen=True)
class Decision:
    """What a variant found: arrays over all N samples, ready for a `ScreenResult`, and (P, D) features of some."""

    score: np.ndarray
    consistency: np.ndarray
    suspect: np.ndarray
    thresholds: np.ndarray
    proposed: np.ndarray
    verdict: Any
    confidence: float
    reason: str
    target_classes: tuple[int, ...]
    details: dict[str, Any]
    mapped: np.ndarray | None = None
    features: np.ndarray | None = None


def screen_images(
    store: ImageStore,
    model: nn.Module | None = None,
    *,
    settings: Settings | None = None,
    epochs: float | None = None,
    budget: float = 0.5,
    seed: int = 0,
    processes: Processes | None = None,
    device: torch.device | None = None,
    state_dir: str | os.PathLike | None = None,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    trained: bool = False,
) -> ScreenResult:
    """Screen opened images.

    Args:
        store: the images and labels.
        model: a copy of the user's model that may be trained (only the paper's variant does); None for the probe alone.
        settings: what decides; None for the defaults.
        epochs: length of the protected run; None for `settings.default_epochs`.
        budget: share of the protected run's passes that the probes get, see `learning.recipe_for`.
        seed: of everything random.
        processes: the ranks; None for one.
        device: where to work; None for a GPU where there is one.
        state_dir: folder that a killed screening resumes from.
        progress: show it on the terminal.
        callbacks: objects with any of `on_stage_start(stage)`, `on_probe_epoch_end(**row)`, `on_scores(score=...,
            consistency=...)`, `on_result(result)`.
        trained: `model` has learned the data already and takes the first probe's place.

    Returns:
        The result, equal on every rank.

    Raises:
        StateError: `state_dir` holds a state of other data or settings, or cannot be written.
    """
    from trainguard.screening import paper, separating

    settings = settings or Settings()
    processes = processes or Processes()
    spend = budget * (settings.default_epochs if epochs is None else epochs)
    made_with = settings.to_dict() | {"seed": seed, "epochs": epochs, "budget": budget, "spend": spend}
    made_with["classes"] = store.num_classes
    if trained and model is not None:
        made_with["trained"] = digest_of(model)
    if settings.variant == "paper" and model is not None:
        made_with["network"] = shapes_of(model)
    if model is not None and (trained or settings.variant == "paper"):  # what it is fed decides what it says
        made_with["pixels"] = [list(store.pixel_range.low), list(store.pixel_range.high)]
    key = {"fingerprint": store.fingerprint, "samples": len(store), "trainguard": versions()["trainguard"]} | made_with
    run = Run(
        store=store,
        model=model,
        trained=model if trained else None,
        settings=settings,
        spend=spend,
        seed=seed,
        processes=processes,
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        state=State(state_dir, key, processes),
        progress=Progress(progress),
        callbacks=callbacks,
    )
    found = _decided(run, paper.decide if settings.variant == "paper" else separating.decide)
    run.report("on_scores", score=found.score.copy(), consistency=found.consistency.copy())
    with run.stage("evidence"):
        evidence = collect_evidence(
            store,
            found.score,
            found.suspect,
            store.labels,
            found.proposed,
            thresholds=found.thresholds,
            mapped=found.mapped,
            features=found.features,
        )
    readable = store.labels >= 0
    result = ScreenResult(
        score=found.score.astype(np.float32),
        consistency=found.consistency.astype(np.float32),
        suspect=found.suspect,
        keep=np.flatnonzero(readable & ~found.suspect).astype(np.int64),
        verdict=found.verdict,
        confidence=found.confidence,
        reason=found.reason,
        target_classes=found.target_classes,
        labels=store.labels.astype(np.int64),
        proposed=found.proposed.astype(np.int64),
        thresholds=found.thresholds.astype(np.float32),
        unreadable=store.unreadable,
        class_names=store.class_names,
        fingerprint=store.fingerprint,
        settings=made_with | {"versions": versions()} | found.details,
        timing=run.timing | {"total": run.state.seconds},
        history=run.history,
        evidence=evidence,
    )
    run.report("on_result", result)
    return result


def _decided(run: Run, variant: Callable[[Run], Decision]) -> Decision:
    """What a variant finds, or has found: a screening that came to its end is not made again."""
    saved = run.state.load("decision")
    if saved is not None:
        may_end = run.processes.broadcast(any(hasattr(each, "on_probe_epoch_end") for each in run.callbacks))
        if saved.pop("cut", False) and not may_end:
            raise StateError(
                "the screening in this state_dir was ended early by a callback, and this one has none that could: pass "
                "the same callbacks, or another folder"
            )
        run.timing.update(saved.pop("timing"))
        run.history.extend(saved.pop("history"))
        saved["target_classes"] = tuple(saved["target_classes"])
        values: dict[str, Any] = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
        return Decision(**values)
    found: Decision = run.processes.broadcast(variant(run))
    values = {one.name: getattr(found, one.name) for one in fields(found)}
    values |= {"timing": run.timing, "history": run.history, "cut": run.cut}
    run.state.save("decision", {k: v if isinstance(v, np.ndarray) else plain(v) for k, v in values.items()})
    return found
