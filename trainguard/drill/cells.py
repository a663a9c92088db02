r"""What one cell of the drill measured: an attack, a defence and a seed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from trainguard.drill.defenses import Outcome
from trainguard.drill.machine import commit
from trainguard.drill.poison import Role, plan_test, triggered_test
from trainguard.drill.scene import Scene
from trainguard.drill.train import predict
from trainguard.errors import StateError
from trainguard.files import read_record, write_atomically


@dataclass(frozen=True)
class Cell:
    r"""The figures. Shares are in [0, 1], times in seconds of the wall clock.

    Attributes:
        attack: name of the attack, `"clean"` for none.
        defense: name of the defence.
        seed: seed of poison, initial weights, order and augmentation.
        acc: accuracy on the clean test set.
        asr: share of triggered test images that get the attack's label; None for the clean set.
        untriggered: share of the same images that get it without the trigger; None where it was not measured.
        payload: payload samples in the training set.
        cover: cover samples in the training set.
        flagged: samples that were left out or relabelled.
        tpr: share of the payload that was flagged. Cover samples count neither here nor in `fpr`.
        fpr: share of the untouched samples that were flagged.
        auroc: of the score, payload against untouched samples.
        worst_class_loss: largest share of a class's untouched samples that was flagged.
        verdict: of the screening or the audit.
        confidence: of the verdict.
        reason: what the verdict rests on.
        target_classes: as screening named them.
        true_targets: labels of the payload.
        screen_seconds: of the screening, or of mending or auditing the finished model.
        train_seconds: of the training, fine-tuning included.
        peak_mb: largest memory in MiB, see `machine.peak_memory`.
        screening: seconds of the screening's stages.
        commit: of trainguard, where it is a git checkout.
    """

    attack: str
    defense: str
    seed: int
    acc: float
    asr: float | None
    payload: int
    cover: int
    flagged: int
    tpr: float | None
    fpr: float | None
    auroc: float | None
    worst_class_loss: float | None
    verdict: str | None
    confidence: float | None
    reason: str | None
    target_classes: tuple[int, ...]
    true_targets: tuple[int, ...]
    screen_seconds: float
    train_seconds: float
    peak_mb: int
    screening: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    untriggered: float | None = None

    @property
    def seconds(self) -> float:
        r"""Wall seconds of screening and training."""
        return self.screen_seconds + self.train_seconds

    def to_dict(self) -> dict[str, Any]:
        r"""Plain JSON values."""
        return asdict(self)

    def save(self, folder: Path) -> None:
        r"""Write `cell.json`, whole or not at all: its presence says that the cell is finished."""
        with write_atomically(folder / "cell.json") as path:
            path.write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Cell | None:
        r"""The finished cell in a folder, or None."""
        path = folder / "cell.json"
        if not path.is_file():
            return None
        values = read_record(path, StateError)
        try:
            tuples = {name: tuple(values[name]) for name in ("target_classes", "true_targets")}
            return cls(**(values | tuples))
        except (KeyError, TypeError) as error:
            raise StateError(f"{path} is no finished cell of this version ({error}): remove its folder") from None


def measure(scene: Scene, defense: str, outcome: Outcome, peak_mb: int) -> Cell:
    r"""Every figure of a finished cell.

    Args:
        scene: the poisoned data.
        defense: its name.
        outcome: what it made.
        peak_mb: largest memory while it did, in MiB.
    """
    data, result, flagged = scene.data, outcome.result, outcome.flagged
    judged = result or outcome.audit
    payload, untouched = scene.role == Role.PAYLOAD, scene.role == Role.CLEAN
    truth = data.train_labels.numpy()
    guessed = predict(outcome.model, data.test, device=scene.victim.device)
    return Cell(
        attack=scene.attack.name,
        defense=defense,
        seed=scene.seed,
        acc=_share(guessed.numpy() == data.test_labels.numpy()),
        asr=_success_rate(scene, outcome),
        payload=int(payload.sum()),
        cover=int((scene.role == Role.COVER).sum()),
        flagged=int(flagged.sum()),
        tpr=_share(flagged[payload]) if result and payload.any() else None,
        fpr=_share(flagged[untouched]) if result and untouched.any() else None,
        auroc=_auroc(result.score, payload, untouched) if result and payload.any() and untouched.any() else None,
        worst_class_loss=max(
            (_share(flagged[untouched & (truth == k)]) for k in np.unique(truth[untouched])), default=None
        )
        if result
        else None,
        verdict=judged.verdict if judged else None,
        confidence=float(judged.confidence) if judged else None,
        reason=judged.reason if judged else None,
        target_classes=tuple(map(int, judged.target_classes)) if judged else (),
        true_targets=tuple(map(int, np.unique(scene.labels.numpy()[payload]))),
        screen_seconds=outcome.screen_seconds,
        train_seconds=outcome.train_seconds,
        peak_mb=peak_mb,
        screening=dict(result.timing) if result else {},
        commit=commit(),
        untriggered=_untriggered(scene, guessed.numpy()),
    )


def _success_rate(scene: Scene, outcome: Outcome) -> float | None:
    if not scene.attack.test:
        return None
    images, _, targets = triggered_test(scene.data.test, scene.data.test_labels, scene.attack, scene.seed)
    guessed = predict(outcome.model, images, device=scene.victim.device)
    return _share(guessed.numpy() == targets.numpy())


def _untriggered(scene: Scene, guessed: np.ndarray) -> float | None:
    if not scene.attack.test:
        return None
    rules = plan_test(scene.data.test_labels.numpy(), scene.attack, scene.seed)
    return _share(np.concatenate([guessed[index] == target for _, index, target in rules]))


def _auroc(score: np.ndarray, payload: np.ndarray, untouched: np.ndarray) -> float:
    judged = (payload | untouched) & np.isfinite(score)  # an unreadable sample has no score
    return float(roc_auc_score(payload[judged], score[judged]))


def _share(hits: np.ndarray) -> float:
    return float(np.mean(hits))
