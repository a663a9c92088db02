"""A screening that flags what it is told to, in place of the real one: hosts have no part in what is flagged."""

import numpy as np

from trainguard.results import ScreenResult

SCREENING = "trainguard.screening.screen.screen_images"  # what a guard calls


def result_for(images, flagged):
    """What a screening that flags the rows `flagged` would give."""
    suspect = np.zeros(len(images), dtype=bool)
    suspect[flagged] = True
    nothing = np.zeros(len(images), np.float32)
    return ScreenResult(
        score=nothing,
        consistency=nothing,
        suspect=suspect,
        keep=np.flatnonzero(~suspect),
        verdict="poisoned" if len(flagged) else "clean",
        confidence=0.9,
        reason="a test says so",
        target_classes=(0,) if len(flagged) else (),
        labels=images.labels,
        proposed=images.labels,
        thresholds=np.full(images.num_classes, np.inf, np.float32),
        unreadable=images.unreadable,
        class_names=images.class_names,
        fingerprint=images.fingerprint,
        settings={},
        timing={},
        history=[],
    )
