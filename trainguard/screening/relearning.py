r"""What a probe thinks of the suspected parts that learned from everything else: the fourth step of `separating`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from trainguard.data.store import ImageStore
from trainguard.screening.bars import KNOWN, MANY
from trainguard.screening.classes import Classes, witness_of
from trainguard.screening.finding import Finding
from trainguard.screening.identification import Trial, kinds_of, tried_on, triggers, with_kin
from trainguard.screening.learning import fresh_probe, is_dominated, logits, recipe_for, shares, train
from trainguard.screening.opinion import Opinion
from trainguard.screening.pipeline import Run
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.resemblance import resemblance
from trainguard.screening.separation import LEAST_SIZE
from trainguard.screening.settings import Settings
from trainguard.screening.undoing import gain, named

ONE_SOURCE = 0.6  # share of a part that is taken for one other class from which it may come from there alone
TRIED = 100  # images of that class that its mean difference is tried on
BY_CHANCE = 0.02  # probability up to which it is not by chance that the purified probe knows what it has not seen
STRANGERS = 40  # samples of a class without a suspected part that are held out, to compare suspected ones with
HELD_OUT = 0.2  # share of a trusted part that the purified probe does not see, to know what agreement to expect


def relearned(
    classes: Classes, findings: list[Finding], crowded_out: Sequence[Finding] = ()
) -> tuple[list[Finding], Opinion]:
    """The findings judged by a probe trained without the suspected parts, and what that probe thinks.

    Where two parts of a class lie far apart and the suspected one's labels are foreign to a probe that learned the
    class from the other, but nothing else speaks for poison, or only what might be said of the rest of a class as well,
    the other one may be the poison: a trigger that Eq. 3's perturbation erases. Then a second such probe, trained
    without these, has the say about them, and the stronger case counts. Where one class keeps its first case and
    another does not, neither probe was trained without both, and a third one is.

    A class may have had so many suspected parts that what was left did not teach the probe what the class is. Then its
    part of the most kinds is heard again alone. So is a part that holds all kinds of images and was crowded out: half
    of its class, beside a small part that lies further apart and is no poison.

    Args:
        classes: what the first probe makes of the samples.
        findings: the parts that are suspected.
        crowded_out: further ones, which would have left too little of their class, see `suspicion.judgeable`.
    """
    settings = classes.run.settings
    judged, opinion = _judged(classes, "relearn", findings)
    poisoned = [f for f in judged if f.strength(settings) > 0.5]
    told = {f.label for f in poisoned if f.tells_sides(settings) or not f.may_be_turned(settings)}
    turned: dict[int, Finding] = {}
    for finding in sorted(judged, key=lambda f: -f.split.gap):
        if finding.label not in told and finding.may_be_turned(settings):
            turned.setdefault(finding.label, finding.turned())
    known = {f.label for f in poisoned}
    heard = _waiting([f for f in crowded_out if f.label not in known], settings)
    heard |= _starved([f for f in judged if f.label not in known], settings) | turned
    if not heard:
        return judged, opinion
    settled = [f for f in poisoned if f.label not in heard]
    again, second = _judged(classes, "relearn again", [*settled, *heard.values()])
    before = {label: max(f.strength(settings) for f in judged if f.label == label) for label in heard}
    found = [f for f in again if f.label in heard and _wins(f, before[f.label], settings)]
    if not found:
        return judged, opinion
    exchanged = {f.label for f in found}
    kept = [f for f in poisoned if f.label in heard.keys() - exchanged]
    if kept:
        _, second = _judged(classes, "relearn at last", [*settled, *kept, *found])
    rest = [f for f in judged if f.label not in exchanged]
    return sorted([*rest, *found], key=lambda f: f.label), second


def _waiting(crowded_out: list[Finding], settings: Settings) -> dict[int, Finding]:
    """Of each class the part of all kinds that lies furthest apart, of those that were crowded out."""
    diverse = [f for f in crowded_out if f.diversity >= settings.diverse and not f.undoing]
    return {f.label: f for f in sorted(diverse, key=lambda f: f.split.gap)}  # the last one of a class


def _starved(judged: list[Finding], settings: Settings) -> dict[int, Finding]:
    """Of each class that was not learned because several of its parts were left out, the part of the most kinds."""
    unknown = [f for f in judged if f.reference < KNOWN and not f.undoing]
    parts = Counter(f.label for f in unknown)
    large = [f for f in unknown if parts[f.label] > 1 and len(f.suspected) >= MANY and f.diversity >= settings.diverse]
    return {f.label: f for f in sorted(large, key=lambda f: f.diversity)}  # the last one of a class


def _wins(finding: Finding, other: float, settings: Settings) -> bool:
    """Is a part poison, rather than the rest of its class, whose case has the strength `other`?"""
    return finding.is_alone(settings) or finding.strength(settings) > max(0.5, other)


def _judged(classes: Classes, name: str, findings: list[Finding]) -> tuple[list[Finding], Opinion]:
    """What a probe trained without the suspected parts thinks of their labels and their company."""
    run, probe, images = classes.run, classes.probe, classes.images
    settings, store, rng = run.settings, run.store, np.random.default_rng(run.seed)
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    doubtful = np.unique(np.concatenate([finding.members[finding.doubtful] for finding in candidates]))
    held: dict[int, np.ndarray] = {}
    for finding in candidates:
        trusted = rng.permutation(np.setdiff1d(finding.members, doubtful))
        held.setdefault(finding.label, trusted[: max(3, round(HELD_OUT * len(trusted)))])
    strangers = _strangers(store, doubtful, held, rng)
    unseen = np.concatenate([*held.values(), strangers])
    index = np.setdiff1d(store.readable, np.concatenate([doubtful, unseen]))
    learned = np.bincount(store.labels[index], minlength=store.num_classes) / len(index)
    purified = fresh_probe(run, run.seed + 1)
    train(run, name, purified, index, recipe_for(run, len(index), settings.relearn_share, settings.shift))
    with run.stage("comparison"):
        often = shares(store, index)  # what it has seen more of it answers more often: taken off, if not in training
        often = np.where(classes.sizes == 0, np.inf, 0.0 if is_dominated(store, index) else often)
        opinion = Opinion.of(run, purified, often)
        second = witness_of(run, purified, images[0])
        judged = [finding for finding in findings if not finding.is_candidate(settings)]
        compared = logits(run, purified, unseen) - often
        skill = _skill(compared, store.labels[unseen])
        exam: list[tuple[int, int, float]] = []
        if len(strangers):
            right = compared.argmax(1)[-len(strangers) :] == store.labels[strangers]
            exam.append((int(right.sum()), len(right), float(learned[store.labels[strangers]].mean())))
        for label, trusted in held.items():
            members = np.flatnonzero(store.labels == label)
            answers, company = opinion(members, label)
            agrees, known = answers.argmax(1) == label, np.isin(members, trusted)
            expected, usual = float(agrees[known].mean()), float(company[known].mean())
            asked = agrees[known | np.isin(members, rng.choice(doubtful, round(HELD_OUT * len(doubtful)), False))]
            exam.append((int(asked.sum()), len(asked), float(learned[label])))
            claimed = np.zeros(len(members), dtype=bool)
            for finding in sorted((f for f in candidates if f.label == label), key=lambda f: -f.split.gap):
                again = claimed[np.searchsorted(members, finding.members)]
                if again.any():  # what an earlier split of the class has claimed is no evidence for this one
                    rest = finding.split.subset(~again)
                    if min(rest.upper.sum(), (~rest.upper).sum()) < LEAST_SIZE:
                        continue
                    finding = dataclasses.replace(finding, members=finding.members[~again], split=rest)
                trial = Trial.of(finding.split, finding.members, label, store, images, run.seed)
                part = np.searchsorted(members, finding.suspected)
                finding = dataclasses.replace(
                    finding,
                    trigger=triggers(trial, classes.witness, second),
                    agreement=float(agrees[part].mean()),
                    reference=expected,
                    company=float(company[part].mean()) / max(usual, 1e-6),
                    scatter=kinds_of(answers[part], label, classes.sizes, run.seed),
                    likeness=trial.likeness,
                    resemblance=resemblance(answers[part], compared, store.labels[unseen], label),
                    skill=skill,
                    beside=bool(claimed.any()),
                    at_source=0.0,  # the other side's, of a part that was turned
                )
                if finding.undoing:
                    undone = opinion.of_undone(finding.suspected, named(finding.undoing, store.shape))
                    gained = float(gain(answers[part], undone).mean())
                    finding = dataclasses.replace(finding, restored=gained)
                elif finding.is_foreign(settings):
                    tried = _at_source(run, finding, answers[part].argmax(1), probe, purified)
                    finding = dataclasses.replace(finding, at_source=tried)
                finding = run.processes.broadcast(finding)  # ranks may differ in the last bit, and must go on alike
                judged.append(finding)
                if finding.strength(settings) > 0.5:
                    claimed[np.searchsorted(members, finding.members[finding.split.suspicion > 0.5])] = True
    informed = run.processes.broadcast(_informed(exam))
    judged = [dataclasses.replace(finding, informed=informed) for finding in with_kin(judged, settings)]
    return sorted(judged, key=lambda f: f.label), opinion


def _strangers(
    store: ImageStore, doubtful: np.ndarray, held: dict[int, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Samples of the classes that have none among `held`, which the purified probe does not see either."""
    found = [np.zeros(0, dtype=np.int64)]
    for label in np.setdiff1d(np.unique(store.labels[store.readable]), list(held)):
        trusted = rng.permutation(np.setdiff1d(np.flatnonzero(store.labels == label), doubtful))
        found.append(trusted[: min(STRANGERS, round(HELD_OUT * len(trusted)))])
    return np.concatenate(found)


def _skill(answers: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy (averaged over classes) of logits (n, K) on labels (n,), 0 for chance and 1 for all right."""
    right, chance = answers.argmax(1) == labels, 1 / max(2, int(np.isfinite(answers).any(0).sum()))
    return (float(np.mean([right[labels == label].mean() for label in np.unique(labels)])) - chance) / (1 - chance)


def _informed(exam: list[tuple[int, int, float]]) -> bool:
    """Does the purified probe know the labels of samples that it has not seen more often than by chance?

    Asked of held-out samples of both parts of each class that has two: where labels are drawn at random, a probe that
    learned them from one part alone knows them better there, and worse on the other. And of the other classes': half of
    a class alone may be more than it can tell from the rest, though it knows these well.

    Args:
        exam: for each class that was looked at, and for all others together, how many samples it knows, of how many,
            and the share that the class had of what it learned from.
    """
    right, asked, shares = np.array(exam).T
    return bool(binom.sf(right.sum() - 1, asked.sum(), (asked * shares).sum() / asked.sum()) < BY_CHANCE)


def _at_source(run: Run, finding: Finding, taken: np.ndarray, probe: Probe | Trained, purified: Probe) -> float:
    """What `triggers` says of a part's mean difference on images of the class that it comes from.

    Args:
        run: the screening.
        finding: the part.
        taken: (n,) the labels that the purified probe gives to its images.
        probe: that learned everything.
        purified: that learned nothing from the part.
    """
    store, source = run.store, int(np.bincount(taken).argmax())
    if source == finding.label or (taken == source).mean() < ONE_SOURCE:
        return 0.0
    chosen = np.random.default_rng(run.seed).permutation(np.flatnonzero(store.labels == source))[:TRIED]
    images = tried_on(store, chosen)
    trial = Trial.of(finding.split, finding.members, finding.label, store, images, run.seed)
    return triggers(trial, witness_of(run, probe, images[0]), witness_of(run, purified, images[0]))
