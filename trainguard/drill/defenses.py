r"""What can be done about a poisoned set: nothing, the guard, the paper's variant, relabelling, what an oracle does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

import trainguard
from trainguard.drill.poison import Role
from trainguard.drill.scene import Scene, Tick, UnitImages, begun_in
from trainguard.drill.train import predict
from trainguard.files import write_atomically
from trainguard.purification.results import AuditResult, PurifyResult
from trainguard.results import ScreenResult

DEFENSES = ("none", "oracle", "guard", "guard+relabel", "paper", "paper+relabel")
RELABEL = "+relabel"
LATE = "late.pt"  # the training of what was kept, as it is before its last epochs


@dataclass(frozen=True, eq=False)
class Outcome:
    r"""What a defence made.

    Attributes:
        model: trained.
        flagged: (N,) bool, left out of training, or relabelled.
        result: of the screening; None where there was none.
        screen_seconds: wall seconds of the screening.
        train_seconds: wall seconds of the training, fine-tuning included.
        audit: what an audit of the model said; None where there was none.
        purification: how the model was purified; None where it was not.
    """

    model: nn.Module
    flagged: np.ndarray
    result: ScreenResult | None
    screen_seconds: float
    train_seconds: float
    audit: AuditResult | None = None
    purification: PurifyResult | None = None

    def save(self, folder: Path) -> None:
        r"""Write the model, and the results of screening, audit and purification where there are any."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        with write_atomically(folder / "model.safetensors") as path:
            path.write_bytes(safetensors.torch.save(state))  # its own way of writing has errors of its own
        if self.result is not None:
            self.result.save(folder / "result")
        if self.audit is not None:
            self.audit.save(folder)
        if self.purification is not None:
            self.purification.save(folder / "purified")


def defend(scene: Scene, defense: str, folder: Path, tick: Tick) -> Outcome:
    r"""Choose what to keep, then train on it from the scene's initial weights.

    Args:
        scene: the poisoned data.
        defense: `"none"`, `"oracle"` (the payload is known and removed), `"guard"` or `"paper"`.
        folder: of this cell: an interrupted screening resumes from its `state`, relabelling from its `late.pt`.
        tick: see `scene.Tick`.

    Raises:
        ValueError: another name, such as that of relabelling, which goes on from what `"guard"` left, see `relabel`.
    """
    if defense not in DEFENSES or defense.endswith(RELABEL):
        raise ValueError(f"defence {defense!r} does not train from the start: use none, oracle, guard or paper")
    result: ScreenResult | None = None
    start = time.perf_counter()
    if defense in ("guard", "paper"):
        result = screen(scene, defense, folder / "state")
        keep = result.keep
    elif defense == "oracle":
        keep = np.flatnonzero(scene.role != Role.PAYLOAD)
    else:
        keep = np.arange(len(scene.labels))
    # Of a screening that goes on after a kill, the seconds before it count as well.
    screen_seconds = max(time.perf_counter() - start, result.timing.get("total", 0.0)) if result else 0.0
    model = scene.fresh_model()
    train_seconds = scene.train(model, keep, scene.labels, tick, late=folder / LATE if result else None)
    return Outcome(model, ~np.isin(np.arange(len(scene.labels)), keep), result, screen_seconds, train_seconds)


def screen(scene: Scene, defense: str, state_dir: Path) -> ScreenResult:
    r"""Screen the poisoned set by the public function: `"guard"` as it comes, `"paper"` with the paper's preset."""
    return trainguard.screen(
        UnitImages(scene.images, scene.labels),
        scene.fresh_model(),
        epochs=scene.victim.recipe.epochs,
        budget=scene.victim.budget,
        seed=scene.seed,
        state_dir=state_dir,
        progress=False,
        bounds=(0, 1),
        preset="paper" if defense == "paper" else "default",
    )


def relabel(scene: Scene, folder: Path, seconds: tuple[float, float], tick: Tick) -> Outcome:
    r"""AdvrBD Eq. 5 within a training, as `Guard.relabel` does it: its last tenth learns everything.

    The labels of what was flagged are those of the model as it is by then, which has learned only what was kept.

    Args:
        scene: the poisoned data.
        folder: where the outcome of the defence without relabelling was saved.
        seconds: wall seconds of its screening and of its training.
        tick: see `scene.Tick`.

    Raises:
        StateError: the defence without relabelling did not keep its training.
    """
    result = ScreenResult.load(folder / "result")
    model = scene.fresh_model()
    everything = np.arange(len(scene.labels))
    flagged = ~np.isin(everything, result.keep)
    if not flagged.any():
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return Outcome(model, flagged, result, *seconds)
    start = time.perf_counter()
    begun = begun_in(folder / LATE)
    model.load_state_dict(begun["weights"])
    rows = torch.from_numpy(np.flatnonzero(flagged))
    labels = scene.labels.clone()
    labels[rows] = predict(model, scene.images[rows], device=scene.victim.device)
    scene.train(model, everything, labels, tick, begun=begun)
    return Outcome(model, flagged, result, seconds[0], begun["seconds"] + time.perf_counter() - start)
