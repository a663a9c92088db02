r"""Triggers that make of an image what might be another one: turned, mirrored, its colours exchanged or inverted.

They leave no picture and no fine detail behind, and a probe of a few epochs has hardly learned them. But they can be
undone, and there are few of them. Undone, a poisoned image is an ordinary one of another class, and there are all kinds
of them in one class; an image of the class itself becomes an odd one of it. And the change moves other classes' images
into that class, as no other change does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainguard.screening.finding import Finding
from trainguard.screening.identification import kinds_of
from trainguard.screening.pipeline import Run
from trainguard.screening.resemblance import margins
from trainguard.screening.separation import LEAST_SIZE, POSSIBLE, drawn, leaning
from trainguard.screening.whitening import Whitening
from trainguard.training import outputs

TRIED = 400  # images that every change is tried on
SURE = 0.8  # probability from which an undone image is taken for one of another class
MOVES = 0.12  # share of other classes' images that a change must move into the class
ROUNDS = 2  # times that a part is drawn, as in `sharpening`


@dataclass(frozen=True)
class Change:
    """A change that can be undone.

    Attributes:
        name: in words, of the poisoned image.
        undo: from the changed images (B, C, H, W) to what they were.
        inverse: the name of the change that does what undoing this one does; its own where that is the same.
    """

    name: str
    undo: Callable[[Tensor], Tensor]
    inverse: str


def changes_for(shape: tuple[int, int, int]) -> list[Change]:
    """What may have been done to images of a shape (C, H, W)."""
    channels, height, width = shape

    def own(name: str, undo: Callable[[Tensor], Tensor]) -> Change:
        return Change(name, undo, name)

    found = [
        own("mirrored", lambda x: x.flip(3)),
        own("upside down", lambda x: x.flip(2)),
        own("turned by half", lambda x: x.flip(2, 3)),
        own("inverted", lambda x: 1 - x),
    ]
    if height == width:
        left, right = "turned to the left", "turned to the right"
        found.append(Change(left, lambda x: x.rot90(-1, (2, 3)), right))
        found.append(Change(right, lambda x: x.rot90(1, (2, 3)), left))
    if channels == 3:
        found.append(own("with red and blue exchanged", lambda x: x[:, [2, 1, 0]]))
        found.append(own("with red and green exchanged", lambda x: x[:, [1, 0, 2]]))
        found.append(own("with green and blue exchanged", lambda x: x[:, [0, 2, 1]]))
        on, back = "with colours moved on", "with colours moved back"
        found.append(Change(on, lambda x: x[:, [1, 2, 0]], back))
        found.append(Change(back, lambda x: x[:, [2, 0, 1]], on))
    return found


@dataclass(frozen=True, eq=False)
class Undone:
    """The first probe's eye for undone images.

    Attributes:
        run: the screening.
        probe: that learned everything.
        whitening: of its features.
        sizes: (K,) readable samples of each class.
    """

    run: Run
    probe: nn.Module
    whitening: Whitening
    sizes: NDArray[np.int64]

    def findings(self, answers: NDArray[np.float32], labels: Sequence[int]) -> list[Finding]:
        """A part for each of the classes `labels` that a change has made, where there is one.

        Args:
            answers: (M, K) the probe's logits for the readable samples.
            labels: the classes to look into.
        """
        store, changes = self.run.store, changes_for(self.run.store.shape)
        places = np.sort(np.random.default_rng(self.run.seed).permutation(len(store.readable))[:TRIED])
        some, before = store.readable[places], answers[places].argmax(1)
        given = store.labels[some]
        after = {change.name: outputs_of(self.run, self.probe, some, change).argmax(1) for change in changes}
        found = []
        for label in labels:
            others = given != label
            parts = []
            for change in changes:
                now = after[change.inverse][others] == label
                moved = float(now.mean() - (before[others] == label).mean()) if len(now) else 0.0
                if moved >= MOVES:
                    part = self._part(answers, label, change, moved)
                    parts += [] if part is None else [part]
            found += sorted(parts, key=lambda f: -f.transfer * f.diversity * len(f.suspected))[:1]
        return found

    def _part(self, answers: NDArray[np.float32], label: int, change: Change, moved: float) -> Finding | None:
        """A class in two: what is surely of another class once it is undone, and the rest."""
        store, seed = self.run.store, self.run.seed
        members = np.flatnonzero(store.labels == label)
        undone = outputs_of(self.run, self.probe, members, change)
        sure = _taken_for_others(undone, label)
        if sure.sum() < LEAST_SIZE or kinds_of(undone[sure], label, self.sizes, seed) < self.run.settings.diverse:
            return None
        as_is = answers[store.labels[store.readable] == label]
        told = np.column_stack([-margins(undone, label)[0], gain(as_is, undone)])
        views = [self.view(members), self.view(members, change)]
        part, split = sure, None
        for _ in range(ROUNDS):
            again = drawn(part, np.column_stack([told, *(leaning(view, part, seed) for view in views)]), seed)
            if again is None:
                break
            split, part = again, again.probability > POSSIBLE
        if split is None or (sure & split.upper).sum() < LEAST_SIZE:
            return None
        # The next probe must learn what the class is: left out is only what more likely belongs to the part than not.
        chosen = np.where(sure, split.probability, 0.5) * split.upper
        kinds = kinds_of(undone[sure & split.upper], label, self.sizes, seed)
        split = dataclasses.replace(split, probability=chosen)
        return Finding(label, members, split, transfer=moved, diversity=kinds, undoing=change.name)

    def view(self, members: NDArray[np.int64], change: Change | None = None) -> NDArray[np.float64]:
        """(n, D) the probe's features of samples, undone, whitened as those of all samples are."""
        undo = change.undo if change else (lambda x: x)

        def features(images: Tensor) -> Tensor:
            return self.probe.features(_laid_out(undo(images))).float()  # type: ignore[operator]

        return self.whitening(outputs(features, self.probe, self.run.store, members, self.run.processes))


def outputs_of(run: Run, model: nn.Module, index: NDArray[np.int64], change: Change) -> NDArray[np.float32]:
    """(n, K) a model's logits for samples, undone."""
    return outputs(lambda images: model(_laid_out(change.undo(images))), model, run.store, index, run.processes)


def named(name: str, shape: tuple[int, int, int]) -> Change:
    """The change of a finding."""
    return next(change for change in changes_for(shape) if change.name == name)


def gain(as_is: NDArray[np.float32], undone: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,) how much surer a probe is of undone images than of the same ones as they are, from its logits (n, K) each.

    In logarithms of the probability of the class that it takes an image for.
    """
    return _sureness(undone) - _sureness(as_is)


def _sureness(answers: NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.from_numpy(answers).double().log_softmax(1).max(1).values.numpy()


def _taken_for_others(answers: NDArray[np.float32], label: int) -> NDArray[np.bool_]:
    """(n,) True where logits (n, K) are sure of another class."""
    return (answers.argmax(1) != label) & (_sureness(answers) > np.log(SURE))


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
