r"""trainguard's variant: the steps of AdvrBD, with the parts of each class in place of one threshold for all samples.

1. A probe learns everything, the trigger included.
2. Eq. 3 gives every sample's consistency; the features of the same probe split every class in two.
3. The part that holds still is suspected where the two lie far apart; D_p is the suspected parts, D_c the rest.
4. A purified probe relearns from D_c alone and says whether D_p's labels contradict its images (`relearning`, `case`).
5. Sample by sample: the flagged ones are those on the suspected side of a class that counts as poisoned.

Deviation from the paper: partition by features class by class; a purified probe instead of an enhanced one; a verdict.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trainguard.evidence import samples_for_map
from trainguard.models import UnitPixels
from trainguard.screening.consistency import consistency
from trainguard.screening.finding import Finding
from trainguard.screening.identification import bystanders, labels_of, sentence
from trainguard.screening.identification import decide as verdict_of
from trainguard.screening.learning import fresh_probe, logits, recipe_for, train
from trainguard.screening.pipeline import Decision, Run
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.relearning import relearned
from trainguard.screening.settings import Settings
from trainguard.screening.sharpening import sharpened
from trainguard.screening.suspicion import suspicions
from trainguard.training import outputs, settle

STILL_LEARNED = 0.1  # share of the flagged samples that a probe may have learned from that gives them other labels
NO_FIGURES = {"members", "split", "line"}  # of a finding


def decide(run: Run) -> Decision:
    """Screen by separation; see the module's text."""
    store, settings = run.store, run.settings
    index, labels = store.readable, store.labels
    probe = _learned(run)
    divergence = _scored(run, probe)
    images = bystanders(store, run.seed)
    with run.stage("partition"):
        *found, classes = suspicions(run, probe, divergence, images)
        findings, crowded_out = run.processes.broadcast(found)  # ranks may differ in the last bit
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    proposed, opinion = labels.copy(), None
    if candidates:
        findings, opinion = relearned(classes, findings, crowded_out)
    left_out = np.concatenate([f.members[f.doubtful] for f in findings if f.is_candidate(settings)] or [index[:0]])
    sizes = np.bincount(labels[index])[labels[index]]
    looked = float((sizes >= settings.least_members).mean())
    present = int((classes.sizes > 0).sum())  # a part of a data set may keep the names of all its classes
    right = classes.answers.argmax(1) == labels[index]
    known = float(np.mean([right[labels[index] == label].mean() for label in np.flatnonzero(classes.sizes)]))
    verdict, confidence, reason, poisoned = verdict_of(findings, known, present, settings, looked)
    if opinion is not None and poisoned:
        with run.stage("sharpening"):  # in one piece: the same objects in both lists
            purer = sharpened(classes, findings, poisoned, opinion)
            findings, poisoned = run.processes.broadcast(purer)
        reason = sentence(poisoned, settings)
    score, thresholds, suspect = _by_sample(findings, poisoned, len(labels), store.num_classes, settings)
    score[list(store.unreadable)] = np.nan
    flagged = np.flatnonzero(suspect)
    if opinion is not None and len(flagged):
        proposed[flagged] = _corrected(run, opinion.probe, flagged, left_out)
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
        details={"probe_accuracy": float(right.mean()), "findings": [_row(f, run) for f in findings]},
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
