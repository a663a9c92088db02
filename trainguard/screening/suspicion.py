r"""Which part of which class is suspected: every class in two, in several ways.

In the features of the first probe, in the pixels, and in the fine detail of the images.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trainguard.screening.bars import LEAST_TRUSTED, LEFT
from trainguard.screening.classes import Classes, over
from trainguard.screening.finding import Finding
from trainguard.screening.identification import Images, Trial, orient, transfers
from trainguard.screening.pipeline import Run
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.separation import shared_direction
from trainguard.screening.settings import Settings

LEFT_BY_SEVERAL = 0.4  # share of the class that a second suspected part and further ones must leave
LEFT_AT_LEAST = 0.2  # the same of parts that nothing else is like, however crowded the class


def suspicions(
    run: Run, probe: Probe | Trained, divergence: np.ndarray, images: Images
) -> tuple[list[Finding], list[Finding], Classes]:
    """Every class in two, in several ways, its suspected part the upper one; and what they were read from.

    Second come those for which others have left too little of their class, see `judgeable`.

    A trigger that serves many targets points the same way in all of them. So what the parts of several classes have in
    common is looked for in the others as well: small heaps there are found that no guess of their own leads to.

    Args:
        run: the screening.
        probe: that learned everything.
        divergence: (N,) of Eq. 3.
        images: see `bystanders`.
    """
    store, settings = run.store, run.settings
    classes = Classes.of(run, probe, images)
    labels = [label for label in range(store.num_classes) if classes.sizes[label] >= settings.least_members]
    parts = classes.splits(labels)
    lines = [(label, part.line) for label in labels for part in parts[label] if part.is_candidate(settings)]
    common, sharing = run.processes.broadcast(shared_direction(lines))  # ranks read the same classes, in one order
    if common is not None:
        parts |= classes.splits([label for label in labels if label not in sharing], common)
    found = []
    for finding in (finding for label in labels for finding in parts[label]):
        if finding.is_candidate(settings):
            members, label = finding.members, finding.label
            trial = Trial.of(finding.split, members, label, store, images, run.seed)
            finding = dataclasses.replace(finding, likeness=trial.likeness)
            moved = transfers(trial, classes.witness)
            kinds = finding.diversity, classes.kinds(label, ~finding.split.upper)
            diverse = kinds[0] >= settings.diverse, kinds[1] >= settings.diverse
            odd = finding.is_odd, finding.turned().is_odd
            split = orient(finding.split, divergence[members], moved, diverse, odd, finding.left)
            turned = split is not finding.split
            finding = dataclasses.replace(
                finding,
                split=split,
                transfer=max(moved),
                diversity=kinds[int(turned)],
                variety=over(kinds[int(turned)], kinds[int(not turned)]),
                firmness=classes.firmness(label, split.upper),
                disbelief=classes.disbelief(label),
                elsewhere=1 - finding.elsewhere if turned else finding.elsewhere,
                finished=run.trained is not None,
            )
        found.append(finding)
    return *judgeable([*found, *classes.undone.findings(classes.answers, labels)], settings), classes


def judgeable(findings: list[Finding], settings: Settings) -> tuple[list[Finding], list[Finding]]:
    """The findings that can be judged together, and the candidates that could be without the others of their class.

    These, the last ones, would leave too little of it to learn it from; what leaves too little even alone is neither.
    First come parts that lie far apart, the widest gap first. What a change has made others of has no gap to speak of,
    and goes before all parts that do not lie so far apart; but not in a crowded class, most of which may be images of
    others. It hardly ever speaks by chance, except where a trigger lies far apart: of half a class with a patch in a
    corner nothing is left of the trigger once an image is turned.
    """
    crowded = {finding.label for finding in findings if finding.left < LEFT}
    left = {finding.label: np.ones(len(finding.members), dtype=bool) for finding in findings}

    def turn(finding: Finding) -> tuple[bool, bool, float]:
        changed = bool(finding.undoing) and finding.label not in crowded
        return not finding.is_far_apart, not changed, -finding.split.gap

    kept, crowded_out = [], []
    for finding in sorted(findings, key=turn):
        if finding.is_candidate(settings):
            before = left[finding.label]
            trusted = before & ~finding.doubtful
            several = LEFT_BY_SEVERAL
            if finding.is_far_apart and finding.is_odd:  # patches in several places, on most of a crowded class
                several = max(LEFT_AT_LEAST, LEFT_BY_SEVERAL * finding.left / LEFT)
            share = finding.left if before.all() else several
            if not _enough(trusted, share):
                if _enough(~finding.doubtful, finding.left):
                    crowded_out.append(finding)
                continue
            left[finding.label] = trusted
        kept.append(finding)
    return sorted(kept, key=lambda f: f.label), crowded_out


def _enough(trusted: np.ndarray, share: float) -> bool:
    """Is what is trusted of a class (n,) as much of it as there must be?"""
    return bool(trusted.sum() >= max(LEAST_TRUSTED, share * len(trusted)))
