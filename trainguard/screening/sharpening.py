r"""The poison of a class drawn as one, once some of it is known: by what the purified probe says, in all directions.

A class was parted along a few directions, because nobody knew its parts yet, and its poison may be in several of them.
Whatever trigger it carries, it differs from the rest of the class in the same few figures: how little the purified
probe believes the label, whose company it keeps, and how far it leans towards the poison that is known, in each view.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trainguard.screening.classes import Classes
from trainguard.screening.finding import Finding
from trainguard.screening.identification import labels_of
from trainguard.screening.opinion import Opinion
from trainguard.screening.resemblance import margins
from trainguard.screening.separation import POSSIBLE, Split, drawn, leaning
from trainguard.screening.settings import Settings
from trainguard.screening.undoing import gain, named

ROUNDS = 3  # times that it is drawn, each time from what the last line makes possible
BLUR = 1.0  # of company, see `_drawn_as_one`; 0.25 is too little on 50,000 images
GROWS = 4  # times as many samples as were known that a line without two parts may make possible
WHOLE = 0.95  # share of the known poison from which another part of the class holds it whole


def sharpened(
    classes: Classes, findings: list[Finding], poisoned: list[Finding], opinion: Opinion
) -> tuple[list[Finding], list[Finding]]:
    """The findings, and those of them that count as poisoned: one for each class whose labels contradict its images.

    Args:
        classes: of the first probe.
        findings: of all classes.
        poisoned: those of them that count as poisoned.
        opinion: of the purified probe.
    """
    settings = classes.run.settings
    for label in labels_of(poisoned):
        parts = [f for f in poisoned if f.label == label and f.contradicts(settings)]
        split = _drawn_as_one(classes, label, parts, opinion) if parts else None
        if split is None:
            continue
        surest = max(parts, key=lambda f: f.strength(settings))
        if _is_two(split, settings):
            proven, members = surest.strength(settings), classes.members(label)
            whole = dataclasses.replace(surest, members=members, split=split, proven=proven)
            findings, poisoned = ([whole, *(f for f in those if f not in parts)] for those in (findings, poisoned))
    return sorted(findings, key=lambda f: f.label), poisoned


def _is_two(split: Split, settings: Settings) -> bool:
    """Whether a line still parts the class in two."""
    return split.distance >= settings.diverse_distance and split.valley <= settings.diverse_valley


def _drawn_as_one(classes: Classes, label: int, parts: list[Finding], opinion: Opinion) -> Split | None:
    """The class in two, its upper part the one that holds the suspected `parts`; None where no line tells them.

    Company is counted among three or four, so it has few values, and a line that leans on it reads needles with any gap
    between them: in a large class it then parts sure images from unsure ones. Blurred, it is one figure among others.

    Where a change has made the poison, what it shows once that is undone tells as well. Such a class has no gap, so the
    next line is drawn from what the last one holds, not from all that it makes possible.
    """
    seed, members = classes.run.seed, classes.members(label)
    undoings = {f.undoing for f in parts if f.undoing}
    known = [f.suspected if f.undoing else f.members[f.split.suspicion > 0.5] for f in parts]
    part = np.isin(members, np.concatenate(known))
    answers, company = opinion(members, label)
    company = company + BLUR * np.random.default_rng(seed).uniform(-0.5, 0.5, len(company))
    told = -np.column_stack([margins(answers, label)[0], company])
    off = [((told - told[side].mean(0)) ** 2 / (told.var(0) + 1e-9)).sum(1) for side in (part, ~part)]
    more, split = drawn(off[0] < off[1], told, seed), None
    wider = more is not None and more.gap > max(f.split.gap for f in parts) and not undoings
    if more is not None and wider and more.upper[part].mean() >= WHOLE:
        part = more.upper
    views = classes.views_of(members)
    for undoing in sorted(undoings):
        change = named(undoing, classes.run.store.shape)
        undone = opinion.of_undone(members, change)
        told = np.column_stack([told, -margins(undone, label)[0], gain(answers, undone)])
        views.append(classes.undone.view(members, change))
    for _ in range(ROUNDS):
        again = drawn(part, np.column_stack([told, *(leaning(view, part, seed) for view in views)]), seed)
        if again is None:
            break
        possible = again.upper if undoings else again.probability > POSSIBLE
        if not undoings and not _is_two(again, classes.run.settings) and possible.sum() > GROWS * part.sum():
            break  # the next line would be drawn from most of the class
        split, part = again, possible
    if split is not None and undoings:  # nor is all that it makes possible flagged
        return dataclasses.replace(split, probability=split.probability * split.upper)
    return None if split is None else dataclasses.replace(split, whole=True)
