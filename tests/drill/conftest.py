"""A screening that knows the truth, so that the drill's own part can be tested in seconds."""

import numpy as np
import pytest

from trainguard.drill import defenses
from trainguard.drill.poison import Role
from trainguard.results import ScreenResult


def all_but_one(scene, defense, state_dir):
    """Flags the payload but for one sample, and one clean sample."""
    payload, clean = np.flatnonzero(scene.role == Role.PAYLOAD), np.flatnonzero(scene.role == Role.CLEAN)
    suspect = np.zeros(len(scene.labels), bool)
    suspect[payload[1:]] = suspect[clean[0]] = len(payload) > 0
    labels = scene.labels.numpy()
    return ScreenResult(
        score=suspect.astype(np.float32),
        consistency=np.zeros(len(labels), np.float32),
        suspect=suspect,
        keep=np.flatnonzero(~suspect),
        verdict="poisoned" if suspect.any() else "clean",
        confidence=0.9,
        reason="the stand-in knows",
        target_classes=tuple(np.unique(labels[payload]).tolist()),
        labels=labels,
        proposed=labels,
        thresholds=np.full(3, 0.5, np.float32),
        timing={"probe": 0.1},
    )


@pytest.fixture
def screened(monkeypatch):
    monkeypatch.setattr(defenses, "screen", all_but_one)
