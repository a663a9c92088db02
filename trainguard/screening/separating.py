r"""trainguard's variant: the steps of AdvrBD, with the parts of each class in place of one threshold for all samples.

1. A probe learns everything, the trigger included.
2. Eq. 3 gives every sample's consistency; the features of the same probe split every class in two.
3. The part that holds still is suspected where the two lie far apart; D_p is the suspected parts, D_c the rest.
4. A purified probe relearns from D_c alone and says whether D_p's labels contradict its images.
5. Sample by sample: the flagged ones are those on the suspected side of a class that counts as poisoned.

Deviation from the paper: partition by features class by class; a purified probe instead of an enhanced one; a verdict.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy.stats import binom
from sklearn.neighbors import NearestNeighbors

from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.evidence import samples_for_map
from trainguard.models import UnitPixels
from trainguard.screening.consistency import consistency
from trainguard.screening.finding import Finding
from trainguard.screening.identification import (
    Trial,
    bystanders,
    kinds_of,
    labels_of,
    sentence,
    tried_on,
    triggers,
    with_kin,
)
from trainguard.screening.identification import decide as verdict_of
from trainguard.screening.learning import fresh_probe, is_dominated, logits, recipe_for, shares, train
from trainguard.screening.pipeline import Decision, Run
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.resemblance import resemblance
from trainguard.screening.separation import LEAST_SIZE
from trainguard.screening.settings import Settings
from trainguard.screening.sharpening import Opinion, sharpened
from trainguard.screening.suspicion import FITTED, Classes, suspicions, witness_of
from trainguard.screening.undoing import gain, named, outputs_of
from trainguard.training import outputs, settle

NEIGHBOURS = 3  # few: a natural group is tighter than the crowd around it, poison is mixed into it
ONE_SOURCE = 0.6  # share of a part that is taken for one other class from which it may come from there alone
TRIED = 100  # images of that class that its mean difference is tried on
BY_CHANCE = 0.02  # probability up to which it is not by chance that the purified probe knows what it has not seen
STRANGERS = 40  # samples of a class without a suspected part that are held out, to compare suspected ones with
STILL_LEARNED = 0.1  # share of the flagged samples that a probe may have learned from that gives them other labels
NO_FIGURES = {"members", "split", "line"}  # of a finding
HELD_OUT = 0.2  # share of a trusted part that the purified probe does not see, to know what agreement to expect


def decide(run: Run) -> Decision:
    """Screen by separation; see the module's text."""
    store, settings = run.store, run.settings
    index, labels = store.readable, store.labels
    probe = _learned(run)
    divergence = _scored(run, probe)
    images = bystanders(store, run.seed)
    with run.stage("partition"):
        answers = logits(run, probe, index)
        if len(broken := index[~np.isfinite(answers).all(1)]):
            raise ModelError(f"the model gives NaN or infinite outputs on {store.name(broken[0])}: check what it does")
        accuracy = float((answers.argmax(1) == labels[index]).mean())
        found, classes = suspicions(run, probe, divergence, answers, images)
        findings = run.processes.broadcast(found)  # ranks may differ in the last bit
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    proposed, purified = labels.copy(), None
    if candidates:
        findings, purified, opinion = _relearned(classes, findings)
    left_out = np.concatenate([f.members[f.doubtful] for f in findings if f.is_candidate(settings)] or [index[:0]])
    sizes = np.bincount(labels[index])[labels[index]]
    looked = float((sizes >= settings.least_members).mean())
    present = int((classes.sizes > 0).sum())  # a part of a data set may keep the names of all its classes
    right = answers.argmax(1) == labels[index]
    known = float(np.mean([right[labels[index] == label].mean() for label in np.flatnonzero(classes.sizes)]))
    verdict, confidence, reason, poisoned = verdict_of(findings, known, present, settings, looked)
    if purified is not None and poisoned:
        with run.stage("sharpening"):  # in one piece: the same objects in both lists
            purer = sharpened(classes, findings, poisoned, opinion, purified)
            findings, poisoned = run.processes.broadcast(purer)
        reason = sentence(poisoned, settings)
    score, thresholds, suspect = _by_sample(findings, poisoned, len(labels), store.num_classes, settings)
    score[list(store.unreadable)] = np.nan
    flagged = np.flatnonzero(suspect)
    if purified is not None and len(flagged):
        proposed[flagged] = _corrected(run, purified, flagged, left_out)
    mapped = samples_for_map(suspect, labels)
    return Decision(
        score=score,
        consistency=divergence,
        suspect=suspect,
        mapped=mapped,
        features=_on_one_scale(outputs(probe.features, probe, store, mapped, run.processes)),
        thresholds=thresholds,
        proposed=proposed,
        verdict=verdict,
        confidence=confidence,
        reason=reason,
        target_classes=labels_of(poisoned),
        details={"probe_accuracy": accuracy, "findings": [_row(f, run) for f in findings]},
    )


def _on_one_scale(features: np.ndarray) -> np.ndarray:
    """Features (M, D) about their mean, in units of their largest deviation, so that half precision holds them."""
    centred = features - features.mean(0) if len(features) else features
    return centred / max(float(np.abs(centred).max(initial=0)), 1e-12)


def _learned(run: Run) -> Probe | Trained:
    """A probe that has learned everything: the given model if it was trained on these data, else a small one now."""
    if run.trained is not None:
        network = UnitPixels(run.trained, run.store.pixel_range).to(run.device).eval()
        run.processes.align(network)
        few = run.store.batch(run.store.readable[:1], run.device)
        width = settle(network, few).shape[1]
        return Trained(network, width, few)  # a delivered model may know more classes than these data have
    probe, index = fresh_probe(run, run.seed), run.store.readable
    recipe = recipe_for(run, len(index), run.settings.warmup_share, run.settings.warmup_shift)
    train(run, "warm-up", probe, index, recipe)
    return probe


def _scored(run: Run, probe: Probe | Trained) -> np.ndarray:
    settings, saved = run.settings, run.state.load("consistency")
    if saved is not None:
        return saved["divergence"].numpy()
    side = max(1, round(settings.patch_side * min(run.store.shape[1:])))
    with run.stage("scoring"), run.progress.stage("scoring", len(run.store.readable)) as shown:
        divergence = consistency(
            probe,
            run.store,
            side=side,
            eps=settings.eps,
            steps=settings.attack_steps,
            seed=run.seed,
            processes=run.processes,
            stage=shown,
        )
    run.state.save("consistency", {"divergence": divergence})
    return divergence


def _relearned(classes: Classes, findings: list[Finding]) -> tuple[list[Finding], Probe, Opinion]:
    """The findings judged by a probe trained without the suspected parts, that probe, and its opinion.

    Where two parts of a class lie far apart and the suspected one's labels are foreign to a probe that learned the
    class from the other, but nothing else speaks for poison, or only what might be said of the rest of a class as well,
    the other one may be the poison: a trigger that Eq. 3's perturbation erases. Then a second such probe, trained
    without these, has the say about them, and the stronger case counts. Where one class keeps its first case and
    another does not, neither probe was trained without both, and a third one is.
    """
    settings = classes.run.settings
    judged, purified, opinion = _judged(classes, "relearn", findings)
    poisoned = [f for f in judged if f.strength(settings) > 0.5]
    told = {f.label for f in poisoned if f.tells_sides(settings) or not f.may_be_turned(settings)}
    turned: dict[int, Finding] = {}
    for finding in sorted(judged, key=lambda f: -f.split.gap):
        if finding.label not in told and finding.may_be_turned(settings):
            turned.setdefault(finding.label, finding.turned())
    if not turned:
        return judged, purified, opinion
    settled = [f for f in poisoned if f.label not in turned]
    again, second, its_opinion = _judged(classes, "relearn again", [*settled, *turned.values()])
    before = {label: max(f.strength(settings) for f in judged if f.label == label) for label in turned}
    found = [f for f in again if f.label in turned and _wins(f, before[f.label], settings)]
    if not found:
        return judged, purified, opinion
    exchanged = {f.label for f in found}
    kept = [f for f in poisoned if f.label in turned.keys() - exchanged]
    if kept:
        _, second, its_opinion = _judged(classes, "relearn at last", [*settled, *kept, *found])
    rest = [f for f in judged if f.label not in exchanged]
    return sorted([*rest, *found], key=lambda f: f.label), second, its_opinion


def _wins(finding: Finding, other: float, settings: Settings) -> bool:
    """Is a part poison, rather than the rest of its class, whose case has the strength `other`?"""
    return finding.is_alone(settings) or finding.strength(settings) > max(0.5, other)


def _judged(classes: Classes, name: str, findings: list[Finding]) -> tuple[list[Finding], Probe, Opinion]:
    """A probe trained without the suspected parts, what it thinks of their labels, and their company."""
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
        opinion = _opinion(run, purified, often)
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
                )
                if finding.undoing:
                    undone = outputs_of(run, purified, finding.suspected, named(finding.undoing, store.shape)) - often
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
    return sorted(judged, key=lambda f: f.label), purified, opinion


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


def _opinion(run: Run, purified: Probe, often: np.ndarray) -> Opinion:
    """A function from (n,) samples and a label to the purified probe's logits (n, K) and their company (n,).

    A sample's company is the share of its nearest neighbours in the probe's features that have the label.

    Args:
        run: the screening.
        purified: the probe.
        often: (K,) the logarithm of each class's share of what it learned from, taken off its logits (logit adjustment,
            Menon et al. 2021): else it would give few samples the label of a rare class, whatever they show.
    """
    store, rng = run.store, np.random.default_rng(run.seed)
    pool = rng.permutation(store.readable)[:FITTED]

    def both(images: torch.Tensor) -> torch.Tensor:
        deepest = purified.maps(images)[-1]
        return torch.cat([purified.answer(deepest).float(), deepest.float().mean((2, 3))], 1)

    def look(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = outputs(both, purified, store, index, run.processes)
        answers, deep = found[:, : store.num_classes] - often, found[:, store.num_classes :]
        return answers, deep / np.maximum(np.linalg.norm(deep, axis=1, keepdims=True), 1e-9)

    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(pool)), metric="euclidean").fit(look(pool)[1])

    def opinion(part: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
        answers, deep = look(part)
        near = pool[search.kneighbors(deep, return_distance=False)]
        others = near != part[:, None]  # a sample is no company for itself
        return answers, ((store.labels[near] == label) & others).sum(1) / np.maximum(1, others.sum(1))

    return opinion


def _corrected(run: Run, purified: Probe, flagged: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Labels (n,) for flagged samples, by a probe that has not learned theirs.

    Where much of the poison is known only since it was drawn as one, the purified probe has learned that much of it,
    and another one must learn without.
    """
    if len(np.setdiff1d(flagged, left_out)) > STILL_LEARNED * len(flagged):
        purified, index = fresh_probe(run, run.seed + 2), np.setdiff1d(run.store.readable, flagged)
        recipe = recipe_for(run, len(index), run.settings.relearn_share, run.settings.shift)
        train(run, "relearn for labels", purified, index, recipe)
    return logits(run, purified, flagged).argmax(1)


def _by_sample(
    findings: list[Finding], poisoned: list[Finding], samples: int, classes: int, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N,), thresholds by class (K,), and what is flagged (N,): all that any poisoned finding holds."""
    score, thresholds = np.zeros(samples), np.full(classes, np.inf)
    weight = {label: max(_weight(f, settings) for f in poisoned if f.label == label) for label in labels_of(poisoned)}
    for finding in findings:
        if finding.label not in weight:
            own = _weight(finding, settings) * finding.split.suspicion
        elif finding in poisoned:
            own = weight[finding.label] * finding.split.suspicion
        else:
            continue
        score[finding.members] = np.maximum(score[finding.members], own)
    suspect = np.zeros(samples, dtype=bool)
    for finding in poisoned:
        thresholds[finding.label] = 0.5 * weight[finding.label]
        suspect[finding.members[finding.split.suspicion > 0.5]] = True
    return score, thresholds, suspect


def _weight(finding: Finding, settings: Settings) -> float:
    return 0.1 + 0.9 * finding.strength(settings) if finding.is_candidate(settings) else 0.1


def _row(finding: Finding, run: Run) -> dict[str, float | bool | str]:
    """A finding in numbers: the sizes and the gap of its parts, all that is known of them, and its strength."""
    split, size = finding.split, len(finding.members)
    parts = {"members": size, "suspected": len(finding.suspected), "distance": split.distance, "valley": split.valley}
    fields = [field.name for field in dataclasses.fields(finding) if field.name not in NO_FIGURES]
    known = {name: getattr(finding, name) for name in fields}
    return {"label": finding.label} | parts | known | {"strength": finding.strength(run.settings)}
