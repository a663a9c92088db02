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
from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from trainguard.screening.consistency import consistency
from trainguard.screening.identification import Finding, orient
from trainguard.screening.identification import decide as verdict_of
from trainguard.screening.learning import fresh_probe, logits, recipe_for, train
from trainguard.screening.pipeline import Decision, Run
from trainguard.screening.probe import Probe
from trainguard.screening.separation import Whitening, split_class
from trainguard.screening.settings import Settings
from trainguard.training import outputs

FITTED = 10_000  # samples that the common spread of features is learned from
NEIGHBOURS = 10
COMPARED = 500  # samples of a part whose neighbours are looked up
HELD_OUT = 0.2  # share of a trusted part that the purified probe does not see, to know what agreement to expect


def decide(run: Run) -> Decision:
    """Screen by separation; see the module's text."""
    store, settings = run.store, run.settings
    index, labels = store.readable, store.labels
    probe = fresh_probe(run, run.seed)
    train(run, "warm-up", probe, index, recipe_for(run, len(index), settings.warmup_share))
    divergence = _scored(run, probe)
    with run.stage("partition"):
        predicted = logits(run, probe, index).argmax(1)
        accuracy = float((predicted == labels[index]).mean())
        findings = _findings(run, probe, divergence)
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    proposed, purified = labels.copy(), None
    if candidates:
        findings, purified = _relearned(run, findings)
    findings = _best_of_each_class(findings, settings)
    verdict, confidence, reason, poisoned = verdict_of(findings, accuracy, store.num_classes, settings)
    score, thresholds = np.zeros(len(labels)), np.full(store.num_classes, np.inf)
    suspect = np.zeros(len(labels), dtype=bool)
    for finding in findings:
        weight = 0.1 + 0.9 * finding.strength(settings) if finding.is_candidate(settings) else 0.1
        score[finding.members] = weight * finding.split.probability
        if finding in poisoned:
            suspect[finding.members] = finding.split.upper
            thresholds[finding.label] = 0.5 * weight
    score[list(store.unreadable)] = np.nan
    flagged = np.flatnonzero(suspect)
    if purified is not None and len(flagged):
        proposed[flagged] = logits(run, purified, flagged).argmax(1)
    return Decision(
        score=score,
        consistency=divergence,
        suspect=suspect,
        thresholds=thresholds,
        proposed=proposed,
        verdict=verdict,
        confidence=confidence,
        reason=reason,
        target_classes=tuple(f.label for f in sorted(poisoned, key=lambda f: -int(f.split.upper.sum()))),
        details={"probe_accuracy": accuracy, "findings": [_row(f, run) for f in findings]},
    )


def _scored(run: Run, probe: Probe) -> np.ndarray:
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


def _findings(run: Run, probe: Probe, divergence: np.ndarray) -> list[Finding]:
    """Every class in two, in one or two ways; memory: the features of one class at a time."""
    store, settings = run.store, run.settings

    def features(index: np.ndarray) -> np.ndarray:
        return outputs(probe.features, probe, store, index, run.processes)

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return probe(torch.from_numpy(images).to(run.device)).argmax(1).cpu().numpy()

    rng = np.random.default_rng(run.seed)
    fitted = rng.permutation(store.readable)[:FITTED]
    whitening = Whitening.fit(features(fitted), store.labels[fitted])
    found = []
    probe.eval()
    for label in range(store.num_classes):
        members = np.flatnonzero(store.labels == label)
        if len(members) < settings.least_members:
            continue
        for split in split_class(whitening(features(members)), run.seed):
            finding = Finding(label, members, split)
            if finding.is_candidate(settings):
                split, moved = orient(split, members, label, store, divergence, predict, run.seed)
                finding = Finding(label, members, split, moved)
            found.append(finding)
    return found


def _relearned(run: Run, findings: list[Finding]) -> tuple[list[Finding], Probe]:
    """A probe trained without the suspected parts, and what it thinks of their labels."""
    settings, labels, rng = run.settings, run.store.labels, np.random.default_rng(run.seed)
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    suspected = np.unique(np.concatenate([finding.suspected for finding in candidates]))
    held: dict[int, np.ndarray] = {}
    for finding in candidates:
        trusted = rng.permutation(np.setdiff1d(finding.members, suspected))
        held.setdefault(finding.label, trusted[: max(5, round(HELD_OUT * len(trusted)))])
    index = np.setdiff1d(run.store.readable, np.concatenate([suspected, *held.values()]))
    purified = fresh_probe(run, run.seed + 1)
    train(run, "relearn", purified, index, recipe_for(run, len(index), settings.relearn_share))

    def agreement(part: np.ndarray) -> float:
        return float((logits(run, purified, part).argmax(1) == labels[part]).mean()) if len(part) else 1.0

    with run.stage("comparison"):
        company = _company(run, purified)
        references = {label: (agreement(part), company(part, label)) for label, part in held.items()}
        judged = []
        for finding in findings:
            if finding.is_candidate(settings):
                expected, usual = references[finding.label]
                finding = dataclasses.replace(
                    finding,
                    agreement=agreement(finding.suspected),
                    reference=expected,
                    company=company(finding.suspected, finding.label) / max(usual, 1e-6),
                )
            judged.append(finding)
    return judged, purified


def _company(run: Run, purified: Probe) -> Callable[[np.ndarray, int], float]:
    """A function from samples and a label to the share of their nearest neighbours that have it."""
    store, rng = run.store, np.random.default_rng(run.seed)
    pool = rng.permutation(store.readable)[:FITTED]

    def features(index: np.ndarray) -> np.ndarray:
        deep = outputs(lambda x: purified.maps(x)[-1].float().mean((2, 3)), purified, store, index, run.processes)
        return deep / np.maximum(np.linalg.norm(deep, axis=1, keepdims=True), 1e-9)

    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(pool)), metric="euclidean").fit(features(pool))

    def share(part: np.ndarray, label: int) -> float:
        part = rng.permutation(part)[:COMPARED]
        if not len(part):
            return 1.0
        near = pool[search.kneighbors(features(part), return_distance=False)]
        others = near != part[:, None]  # a sample is no company for itself
        return float(((store.labels[near] == label) & others).sum() / others.sum())

    return share


def _best_of_each_class(findings: list[Finding], settings: Settings) -> list[Finding]:
    """One finding per class: the one that the evidence speaks for most; the widest gap where it is silent."""
    best: dict[int, Finding] = {}
    for finding in sorted(findings, key=lambda f: (f.strength(settings), f.split.gap)):
        best[finding.label] = finding
    return [best[label] for label in sorted(best)]


def _row(finding: Finding, run: Run) -> dict[str, float]:
    return {
        "label": finding.label,
        "members": len(finding.members),
        "suspected": len(finding.suspected),
        "distance": finding.split.distance,
        "valley": finding.split.valley,
        "transfer": finding.transfer,
        "agreement": finding.agreement,
        "reference": finding.reference,
        "company": finding.company,
        "strength": finding.strength(run.settings),
    }
