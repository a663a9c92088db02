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

from trainguard.models import UnitPixels
from trainguard.screening.consistency import consistency
from trainguard.screening.identification import Finding, labels_of, orient, sentence, transfers, with_bars
from trainguard.screening.identification import decide as verdict_of
from trainguard.screening.learning import fresh_probe, logits, recipe_for, train
from trainguard.screening.pipeline import Decision, Run
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.separation import LEAST_SIZE, Whitening, refined, split_class
from trainguard.screening.settings import Settings
from trainguard.training import outputs

FITTED = 10_000  # samples that the common spread of features is learned from
NEIGHBOURS = 3  # few: a natural group is tighter than the crowd around it, poison is mixed into it
LEAST_TRUSTED = 15  # samples that a class must keep when its suspected parts are left out
LEFT = 0.15  # share of the class, likewise
COMPARED = 500  # samples of a part whose neighbours are looked up
HELD_OUT = 0.2  # share of a trusted part that the purified probe does not see, to know what agreement to expect
Company = Callable[[np.ndarray, int], np.ndarray]


def decide(run: Run) -> Decision:
    """Screen by separation; see the module's text."""
    store, settings = run.store, run.settings
    index, labels = store.readable, store.labels
    probe = _learned(run)
    divergence = _scored(run, probe)
    with run.stage("partition"):
        predicted = logits(run, probe, index).argmax(1)
        accuracy = float((predicted == labels[index]).mean())
        findings = run.processes.broadcast(_findings(run, probe, divergence))  # ranks may differ in the last bit
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    proposed, purified = labels.copy(), None
    if candidates:
        findings, purified, company = _relearned(run, probe, findings)
    verdict, confidence, reason, poisoned = verdict_of(findings, accuracy, store.num_classes, settings)
    if purified is not None and poisoned:
        findings, poisoned = _sharpened(run, findings, poisoned, purified, company)
        reason = sentence(poisoned, settings)
    score, thresholds, suspect = _by_sample(findings, poisoned, len(labels), store.num_classes, settings)
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
        target_classes=labels_of(poisoned),
        details={"probe_accuracy": accuracy, "findings": [_row(f, run) for f in findings]},
    )


def _learned(run: Run) -> Probe | Trained:
    """A probe that has learned everything: the given model if it was trained on these data, else a small one now."""
    if run.trained is not None:
        return Trained(UnitPixels(run.trained, run.store.pixel_range), run.store.num_classes).to(run.device).eval()
    probe, index = fresh_probe(run, run.seed), run.store.readable
    train(run, "warm-up", probe, index, recipe_for(run, len(index), run.settings.warmup_share))
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


def _findings(run: Run, probe: Probe | Trained, divergence: np.ndarray) -> list[Finding]:
    """Every class in two, in up to four ways; memory: the features of one class at a time."""
    store, settings = run.store, run.settings

    def features(index: np.ndarray) -> np.ndarray:
        return outputs(probe.features, probe, store, index, run.processes)

    rng = np.random.default_rng(run.seed)
    fitted = rng.permutation(store.readable)[:FITTED]
    whitening = Whitening.fit(features(fitted), store.labels[fitted])
    found = []
    for label in range(store.num_classes):
        members = np.flatnonzero(store.labels == label)
        if len(members) < settings.least_members:
            continue
        for split in split_class(whitening(features(members)), run.seed):
            finding = Finding(label, members, split)
            if finding.is_candidate(settings):
                moved = transfers(split, members, label, store, _labels_by(probe, run), run.seed)
                finding = Finding(label, members, orient(split, divergence[members], moved), max(moved))
            found.append(finding)
    return _judgeable(found, settings)


def _judgeable(findings: list[Finding], settings: Settings) -> list[Finding]:
    """Without the candidates, the smallest gap first, that would leave too little of their class to learn it from."""
    left = {finding.label: np.ones(len(finding.members), dtype=bool) for finding in findings}
    kept = []
    for finding in sorted(findings, key=lambda f: -f.split.gap):
        if finding.is_candidate(settings):
            trusted = left[finding.label] & ~finding.doubtful
            if trusted.sum() < max(LEAST_TRUSTED, LEFT * len(trusted)):
                continue
            left[finding.label] = trusted
        kept.append(finding)
    return sorted(kept, key=lambda f: f.label)


def _relearned(run: Run, probe: Probe | Trained, findings: list[Finding]) -> tuple[list[Finding], Probe, Company]:
    """A probe trained without the suspected parts, what it thinks of their labels, and their company."""
    settings, labels, rng = run.settings, run.store.labels, np.random.default_rng(run.seed)
    candidates = [finding for finding in findings if finding.is_candidate(settings)]
    doubtful = np.unique(np.concatenate([finding.members[finding.doubtful] for finding in candidates]))
    held: dict[int, np.ndarray] = {}
    for finding in candidates:
        trusted = rng.permutation(np.setdiff1d(finding.members, doubtful))
        held.setdefault(finding.label, trusted[: max(3, round(HELD_OUT * len(trusted)))])
    index = np.setdiff1d(run.store.readable, np.concatenate([doubtful, *held.values()]))
    purified = fresh_probe(run, run.seed + 1)
    train(run, "relearn", purified, index, recipe_for(run, len(index), settings.relearn_share))

    def agreement(part: np.ndarray) -> float:
        return float((logits(run, purified, part).argmax(1) == labels[part]).mean()) if len(part) else 1.0

    with run.stage("comparison"):
        company = _company(run, purified)

        def share(part: np.ndarray, label: int) -> float:
            return float(company(rng.permutation(part)[:COMPARED], label).mean()) if len(part) else 1.0

        def moved_by(finding: Finding, by: Probe | Trained) -> float:
            predict = _labels_by(by, run)
            moved = transfers(finding.split, finding.members, finding.label, run.store, predict, run.seed)
            return run.processes.broadcast(max(moved))

        references = {label: (agreement(part), share(part, label)) for label, part in held.items()}
        known = [
            dataclasses.replace(f, echo=moved_by(f, purified)) if f.is_candidate(settings) else f for f in findings
        ]
        known = with_bars(known)  # before any split claims its samples: a claim must not lose its evidence afterwards
        judged = [finding for finding in known if not finding.is_candidate(settings)]
        claimed = np.zeros(len(labels), dtype=bool)
        for finding in sorted((f for f in known if f.is_candidate(settings)), key=lambda f: -f.split.gap):
            again = claimed[finding.members]
            if again.any():  # what an earlier split of the class has claimed is no evidence for this one
                rest = finding.split.subset(~again)
                if min(rest.upper.sum(), (~rest.upper).sum()) < LEAST_SIZE:
                    continue
                finding = dataclasses.replace(finding, members=finding.members[~again], split=rest)
                moved, echo = moved_by(finding, probe), moved_by(finding, purified)
                finding = dataclasses.replace(finding, transfer=moved, echo=echo)
            expected, usual = references[finding.label]
            finding = dataclasses.replace(
                finding,
                agreement=agreement(finding.suspected),
                reference=expected,
                company=share(finding.suspected, finding.label) / max(usual, 1e-6),
            )
            judged.append(finding)
            if finding.strength(settings) > 0.5:
                claimed[finding.members[finding.split.suspicion > 0.5]] = True
    return sorted(judged, key=lambda f: f.label), purified, company


def _labels_by(probe: Probe | Trained, run: Run) -> Callable[[np.ndarray], np.ndarray]:
    """A function from unit images (B, C, H, W) to the labels that the probe gives them."""

    def predict(images: np.ndarray) -> np.ndarray:
        probe.eval()
        with torch.no_grad():
            return probe(torch.from_numpy(images).to(run.device)).argmax(1).cpu().numpy()

    return predict


def _company(run: Run, purified: Probe) -> Company:
    """A function from (n,) samples and a label to the share of each one's nearest neighbours that have it, (n,)."""
    store, rng = run.store, np.random.default_rng(run.seed)
    pool = rng.permutation(store.readable)[:FITTED]

    def features(index: np.ndarray) -> np.ndarray:
        deep = outputs(lambda x: purified.maps(x)[-1].float().mean((2, 3)), purified, store, index, run.processes)
        return deep / np.maximum(np.linalg.norm(deep, axis=1, keepdims=True), 1e-9)

    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(pool)), metric="euclidean").fit(features(pool))

    def share(part: np.ndarray, label: int) -> np.ndarray:
        near = pool[search.kneighbors(features(part), return_distance=False)]
        others = near != part[:, None]  # a sample is no company for itself
        return ((store.labels[near] == label) & others).sum(1) / np.maximum(1, others.sum(1))

    return share


def _sharpened(
    run: Run, findings: list[Finding], poisoned: list[Finding], purified: Probe, company: Company
) -> tuple[list[Finding], list[Finding]]:
    """Poisoned findings whose labels contradict the images, drawn again with what the purified probe says of each."""
    sharp = {}
    for finding in poisoned:
        if finding.contradicts(run.settings):
            label = logits(run, purified, finding.members)
            given = label[:, finding.label].copy()
            label[:, finding.label] = -np.inf
            columns = np.column_stack([label.max(1) - given, -company(finding.members, finding.label)])
            sharp[id(finding)] = dataclasses.replace(finding, split=refined(finding.split, columns, run.seed))
    return [sharp.get(id(f), f) for f in findings], [sharp.get(id(f), f) for f in poisoned]


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


def _row(finding: Finding, run: Run) -> dict[str, float]:
    return {
        "label": finding.label,
        "members": len(finding.members),
        "suspected": len(finding.suspected),
        "distance": finding.split.distance,
        "valley": finding.split.valley,
        "transfer": finding.transfer,
        "echo": finding.echo,
        "bar": finding.transfer_bar,
        "agreement": finding.agreement,
        "reference": finding.reference,
        "company": finding.company,
        "strength": finding.strength(run.settings),
    }
