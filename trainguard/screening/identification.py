r"""AdvrBD Sec. V-B3: from what the probes say to which samples are poisoned, and whether the set is at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainguard.data.store import ImageStore
from trainguard.results import Verdict
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings

PROBED = 200  # images of other classes that a part's mean difference is tried on
TELLS = 3.0  # how much the shares that the two signs of the mean difference move say, beside a log ratio
DOUBTFUL = 0.05  # probability of the suspected part from which a sample is kept from the purified probe
KNOWN = 0.2  # agreement with trusted samples of a class from which the purified probe may judge its labels
MOVES_MOST = 0.7  # transfer that counts whatever other classes do; tracks of traffic signs reached 0.60
SURE_TRIGGER = 0.5  # transfer from which a class need not fall into two parts far apart
AVERAGED = 500  # images of a part that its mean is taken over
STANDS_OUT = 6.0  # Ashman's D from which a difference that half works as a trigger leaves the verdict open


@dataclass(frozen=True, eq=False)
class Finding:
    """What is known of one class and its suspected part.

    Attributes:
        label: the class.
        members: (n,) int64, its samples.
        split: in two; the upper part is the suspected one.
        transfer: share of other classes' images that the suspected part's mean difference moves into the class, for the
            probe that learned everything.
        echo: the same share for the purified probe. What the class looks like works on both; a trigger on the first.
        transfer_bar: share that must be passed, see `with_bars`.
        agreement: share of the suspected part that the purified probe, trained without it, puts into the class.
        reference: the same share for samples of the trusted part that were held out likewise.
        company: share of the suspected part's nearest neighbours, in the purified probe's features, that have its
            label, relative to the same share for held-out trusted samples. Poisoned images mix with those of their
            true class; a natural group keeps to itself, wherever the probe puts it.
    """

    label: int
    members: NDArray[np.int64]
    split: Split
    transfer: float = 0.0
    agreement: float = 1.0
    reference: float = 1.0
    company: float = 1.0
    echo: float = 0.0
    transfer_bar: float = 0.0

    def is_candidate(self, settings: Settings) -> bool:
        """True where the two parts lie far enough apart for a closer look."""
        return self.split.distance >= settings.candidate_distance and self.split.valley <= settings.candidate_valley

    @property
    def suspected(self) -> NDArray[np.int64]:
        """The samples of the upper part."""
        return self.members[self.split.upper]

    @property
    def doubtful(self) -> NDArray[np.bool_]:
        """(n,) True for members that may belong to the suspected part: nothing is learned from them about it."""
        return self.split.probability > DOUBTFUL

    @property
    def relative_agreement(self) -> float:
        """`agreement` over `reference`: near 1 for a natural group, near 0 for images that carry a foreign label.

        1 where the purified probe does not know the class at all, and so cannot contradict a label.
        """
        return self.agreement / self.reference if self.reference >= KNOWN else 1.0

    @property
    def trigger(self) -> float:
        """How much of the transfer is owed to the suspected samples."""
        return self.transfer - self.echo

    def contradicts(self, settings: Settings) -> bool:
        """True where the suspected part's labels contradict its images."""
        return self.relative_agreement < settings.conflict and self.company < settings.company

    def strength(self, settings: Settings) -> float:
        """How strongly the evidence speaks for poison, in [0, 1]; above 0.5 counts as poisoned.

        Two kinds of evidence count, each in how far it passes its bar: labels that contradict the images (poisoned
        labels), and a mean difference that works as a trigger on other images (clean-label attacks).
        """
        if not self.is_candidate(settings):
            return 0.0
        contradiction = min(
            _passes(settings.conflict - self.relative_agreement, 0.05), _passes(settings.company - self.company, 0.1)
        )
        # A difference that moves nearly everything needs no gap to be a trigger.
        bar = settings.transfer_distance if self.trigger < SURE_TRIGGER else settings.candidate_distance
        far = _passes(self.split.distance - bar, 0.5)
        minor = float(self.split.upper.mean() <= settings.transfer_share)
        trigger = minor * min(_passes(self.trigger - max(settings.transfer, self.transfer_bar), 0.1), far)
        return max(contradiction, trigger)


def transfers(
    split: Split,
    members: NDArray[np.int64],
    label: int,
    store: ImageStore,
    predict: Callable[[NDArray[np.float32]], NDArray[np.int64]],
    seed: int,
) -> tuple[float, float]:
    """Share of other classes' images that the parts' mean difference in pixels moves into the class.

    Args:
        split: the class in two.
        members: (n,) its samples.
        label: the class.
        store: the images.
        predict: a probe: from unit images (B, C, H, W) to labels.
        seed: of the images that are drawn.

    Returns:
        The share for upper minus lower part added, and for lower minus upper.
    """
    rng = np.random.default_rng(seed)
    others = rng.permutation(store.readable[store.labels[store.readable] != label])[:PROBED]
    images = store.batch(others).numpy()
    upper = _mean(store, rng.permutation(members[split.upper])[:AVERAGED])
    lower = _mean(store, rng.permutation(members[~split.upper])[:AVERAGED])
    before = float((predict(images) == label).mean())
    up, down = (
        float((predict(np.clip(images + sign * (upper - lower), 0, 1)) == label).mean()) - before for sign in (1, -1)
    )
    return up, down


def orient(split: Split, divergence: NDArray[np.float32], moved: tuple[float, float]) -> Split:
    """Decide which part of a class is the suspected one.

    Three signs are added up, because each of them fails on some attack (docs/experiments.md): AdvrBD's observation, the
    poisoned part's predictions hold still under Eq. 3's perturbation (not for triggers made fragile); the part whose
    mean difference in pixels, added to images of other classes, moves more of them into the class (not for sinusoids,
    whose negative works as well, nor for triggers that differ from image to image); and poison tends to be the
    minority (not in small classes).

    Args:
        split: the class in two.
        divergence: (n,) of Eq. 3, for its samples.
        moved: see `transfers`.

    Returns:
        The split with the suspected part as its upper one.
    """
    still = [float(np.median(divergence[part])) + 1e-3 for part in (split.upper, ~split.upper)]
    share = float(split.upper.mean())
    sign = float(np.clip(np.log(still[1] / still[0]), -2, 2))
    sign += TELLS * (moved[0] - moved[1]) + 0.5 * float(np.log((1 - share) / share))
    return split.turned() if sign < 0 else split


def with_bars(findings: Sequence[Finding]) -> list[Finding]:
    """Tell each finding how far mean differences work as triggers in the other classes, where they should not.

    In a data set whose classes are made of a few tight groups (the tracks of traffic signs), any group's difference
    moves some images. A trigger has to stand out from that: the bar lies four robust standard deviations above the
    median of the other classes' best, but never above what moves most images: every class may carry poison.
    """
    best: dict[int, float] = {}
    for finding in findings:
        best[finding.label] = max(best.get(finding.label, 0.0), finding.trigger)
    barred = []
    for finding in findings:
        others = np.array([value for label, value in best.items() if label != finding.label] or [0.0])
        middle = float(np.median(others))
        bar = min(MOVES_MOST, middle + 4 * 1.4826 * float(np.median(np.abs(others - middle))))
        barred.append(dataclasses.replace(finding, transfer_bar=bar))
    return barred


def decide(
    findings: Sequence[Finding], accuracy: float, num_classes: int, settings: Settings
) -> tuple[Verdict, float, str, list[Finding]]:
    """The verdict on the whole set.

    Args:
        findings: of all classes that were looked into; several per class where it splits in several ways.
        accuracy: of the warm probe on the data.
        num_classes: K.
        settings: the bars.

    Returns:
        Verdict, confidence in [0, 1], the reason in one sentence, and the findings that count as poisoned.
    """
    strengths = [finding.strength(settings) for finding in findings]
    poisoned = [f for f, s in zip(findings, strengths, strict=True) if s > 0.5]
    if poisoned:
        sure = float(max(strengths))
        return "poisoned", sure, sentence(poisoned, settings), poisoned
    chance = 1 / max(2, num_classes)
    if accuracy < min(settings.learned * chance, 0.5 * (1 + chance)):
        reason = (
            f"the probe learned too little to tell (accuracy {accuracy:.2f}, chance {chance:.2f}): "
            "give screening more epochs or more data"
        )
        return "undecided", 0.0, reason, []
    open_cases = [
        f
        for f in findings
        if f.split.distance >= STANDS_OUT
        and f.split.valley < 0.1
        and f.trigger >= max(settings.transfer / 2, f.transfer_bar)
    ]
    if open_cases:
        case = max(open_cases, key=lambda f: f.split.distance)
        reason = (
            f"class {case.label} falls into two parts far apart (D = {case.split.distance:.1f}), and their "
            f"difference moves {case.transfer:.0%} of other images into it: look at its samples"
        )
        return "undecided", 0.3, reason, []
    doubt = max(strengths, default=0.0)
    widest = max((f.split.distance for f in findings), default=0.0)
    reason = f"no class holds a part that is set apart and contradicts its label (widest distance D = {widest:.1f})"
    return "clean", float(1 - doubt), reason, []


def sentence(poisoned: Sequence[Finding], settings: Settings) -> str:
    """Why the set counts as poisoned."""
    first = max(poisoned, key=lambda f: f.strength(settings))
    count = int((first.split.suspicion > 0.5).sum())
    if first.contradicts(settings):
        because = f"a probe trained without them puts {first.agreement:.0%} of them into that class"
    else:
        because = f"their mean difference moves {first.transfer:.0%} of other images into that class"
    others = len(labels_of(poisoned)) - 1
    more = f"; {others} more {'class' if others == 1 else 'classes'} likewise" if others else ""
    return (
        f"{count} samples labelled {first.label} are set apart from their class (D = {first.split.distance:.1f}), and "
        f"{because}{more}"
    )


def labels_of(poisoned: Sequence[Finding]) -> tuple[int, ...]:
    """The classes of the findings, the one with the most suspected samples first."""
    largest = sorted(poisoned, key=lambda finding: -len(finding.suspected))
    return tuple(dict.fromkeys(finding.label for finding in largest))


def _passes(margin: float, width: float) -> float:
    """0.5 at a margin of zero, towards 1 above and 0 below, in units of `width`."""
    return float(1 / (1 + np.exp(-np.clip(margin / width, -30, 30) * 2)))


def _mean(store: ImageStore, index: NDArray[np.int64]) -> NDArray[np.float32]:
    return store.batch(index).mean(0).numpy()
