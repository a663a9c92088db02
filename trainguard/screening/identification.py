r"""AdvrBD Sec. V-B3: from what the probes say to which samples are poisoned, and whether the set is at all."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainguard.data.store import ImageStore
from trainguard.results import Verdict
from trainguard.screening.bars import LEFT, ONE_SCENE, TOLD
from trainguard.screening.finding import Finding
from trainguard.screening.separation import Split, shared_direction
from trainguard.screening.settings import Settings
from trainguard.training import at_once

PROBED = 250  # images that the parts' mean differences are tried on
FEW_OTHERS = 0.2  # share of these that are not of the largest class, below which half of them are
TELLS = 3.0  # how much the shares that the two signs of the mean difference move say, beside a log ratio
LEAST_KNOWN = 20  # images that the purified probe must know for a trigger to be tried on them
LEAST_KINDS = 5.0  # effective number of other classes from which diversity says anything
DIVERSE_SIGN = 3.0  # how much a diverse part says in `orient`, beside a log ratio
ODD_SIGN = 3.0  # how much it says there that one part is unlike all other classes' images
AVERAGED, LEAST_AVERAGED = 500, 200  # images of a part that its mean is taken over; the least of large ones
LEFT_OPEN = 0.85  # share of a trigger's bar from which the verdict is left open
STANDS_OUT = 6.0  # Ashman's D from which a difference that half works as a trigger leaves the verdict open
LOOKED = 0.5  # share of the samples that must be in classes large enough to be looked into for a verdict of clean
NO_PICTURE = 0.02  # likeness up to which such parts do so where fine detail tells them; snow had 0.00
NOTHING = 1.25  # accuracy, relative to chance, below which the first probe has learned nothing that could be poison
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]  # see `bystanders`


def diversity(runner_up: NDArray[np.int64], others: NDArray[np.int64], seed: int) -> float:
    """How many kinds of images a part of a class holds, by the label that the probe finds next best for each.

    Images of all classes that carry one poisoned label still look like what they are; the next best labels of a natural
    group, or of a whole class, are the few classes that it resembles.

    Args:
        runner_up: (m,) next best labels of the part's samples.
        others: (K,) samples of each class, 0 for the part's own.
        seed: of the draws that it is compared with.

    Returns:
        The effective number of labels (the exponential of their entropy) relative to that of as many samples of other
        classes, about 0 to 1; 0 where there are too few classes to say anything.
    """
    share = others / max(1, others.sum())
    if _effective(share) < LEAST_KINDS or not len(runner_up):
        return 0.0
    draws = np.random.default_rng(seed).multinomial(len(runner_up), share, size=20)
    found = np.bincount(runner_up, minlength=len(others)) / len(runner_up)
    return _effective(found) / float(np.mean([_effective(draw / len(runner_up)) for draw in draws]))


def kinds_of(answers: NDArray[np.float32], label: int, sizes: NDArray[np.int64], seed: int) -> float:
    """The diversity of samples of a class by the labels that come next best in a probe's logits.

    Args:
        answers: (m, K) logits of the samples.
        label: their own, which does not count.
        sizes: (K,) samples of each class; one without any is nobody's next best.
        seed: see `diversity`.
    """
    others = answers.copy()
    silent = np.arange(answers.shape[1]) == label
    silent[: len(sizes)] |= sizes[: len(silent)] == 0  # a model may have more outputs than there are classes, or fewer
    others[:, silent] = -np.inf
    return diversity(others.argmax(1), np.where(np.arange(len(sizes)) == label, 0, sizes), seed)


def _effective(share: NDArray[np.float64]) -> float:
    positive = share[share > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


class Witness:
    """A probe, and what it says of images that mean differences are tried on.

    It remembers its answers: a part is tried when it is found, and again when it is judged.

    Args:
        predict: from unit images (B, C, H, W) to labels.
        images: (P, C, H, W) bytes, to try on.
    """

    def __init__(self, predict: Callable[[NDArray[np.float32]], NDArray[np.int64]], images: NDArray[np.uint8]) -> None:
        self._predict = predict
        self.before = self._of(_unit(part) for part in _parts(images))
        self._said: dict[bytes, NDArray[np.int64]] = {}

    def after(self, trial: Trial, sign: int) -> NDArray[np.int64]:
        """Its labels (m,) for the images of a trial, with the difference added (1) or taken away (-1)."""
        moved = (sign * trial.difference + 0.0).tobytes()  # + 0.0: no negative zeros, so what is turned is the same
        key = hashlib.blake2b(moved, digest_size=16, person=str(trial.label).encode()).digest()
        if key not in self._said:
            self._said[key] = self._of(trial.moved(sign))
        return self._said[key]

    def _of(self, parts: Iterable[NDArray[np.float32]]) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, dtype=np.int64), *(self._predict(part) for part in parts)])


@dataclass(frozen=True, eq=False)
class Trial:
    """A part's mean difference in pixels on images of other classes.

    Attributes:
        label: the class.
        chosen: (P,) bool, the images of other classes among those to try on.
        truth: (m,) their labels.
        images: (P, C, H, W) bytes, all of those.
        difference: (C, H, W), the mean of the upper part less that of the lower one.
        likeness: of the upper part's images, what they have in common against the lower part (mean squared difference
            of the means) over how they differ among themselves (variance).
    """

    label: int
    chosen: NDArray[np.bool_]
    truth: NDArray[np.int64]
    images: NDArray[np.uint8]
    difference: NDArray[np.float32]
    likeness: float

    @classmethod
    def of(
        cls,
        split: Split,
        members: NDArray[np.int64],
        label: int,
        store: ImageStore,
        tried_on: Images,
        seed: int,
    ) -> Trial:
        """Take the means.

        Args:
            split: the class in two.
            members: (n,) its samples.
            label: the class.
            store: the images.
            tried_on: see `bystanders`.
            seed: of the members that the means are taken over.
        """
        rng = np.random.default_rng(seed)
        most = max(LEAST_AVERAGED, at_once(store.shape, AVERAGED))
        upper, spread = _mean(store, rng.permutation(members[split.upper])[:most])
        lower, _ = _mean(store, rng.permutation(members[~split.upper])[:most])
        likeness = float(((upper - lower) ** 2).mean()) / max(spread, 1e-6)
        images, labels = tried_on
        chosen = labels != label
        return cls(label, chosen, labels[chosen], images, upper - lower, likeness)

    def moved(self, sign: int) -> Iterator[NDArray[np.float32]]:
        """The images (m, C, H, W) of other classes with the difference added (1) or taken away (-1), part by part."""
        for part in _parts(self.images[self.chosen]):
            yield np.clip(_unit(part) + sign * self.difference, 0, 1)


def bystanders(store: ImageStore, seed: int) -> Images:
    """Images (P, C, H, W), as bytes, of all classes, and their labels, that mean differences are tried on.

    Where one class is most of the data, half of them are of the others: what is said of it is said by these.
    """
    order = np.random.default_rng(seed).permutation(store.readable)
    labels = store.labels[order]
    largest = np.bincount(labels[:PROBED]).argmax()
    if (labels[:PROBED] != largest).mean() < FEW_OTHERS:
        others = order[labels != largest][: PROBED // 2]
        order = np.concatenate([others, order[labels == largest]])
    return tried_on(store, order[:PROBED])


def tried_on(store: ImageStore, index: NDArray[np.int64]) -> Images:
    """The samples `index` as `Trial` takes them: (P, C, H, W) bytes, as there may be many large ones, and labels."""
    parts = np.array_split(index, -(-len(index) // at_once(store.shape)))
    images = [(store.batch(part) * 255).round().to(torch.uint8).numpy() for part in parts]
    return np.concatenate(images), store.labels[index]


def _parts(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """As many images (B, C, H, W) at a time as may be held as floats."""
    size = at_once(images.shape[1:])  # type: ignore[arg-type]
    return [images[start : start + size] for start in range(0, len(images), size)]


def _unit(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(255)


def transfers(trial: Trial, witness: Witness) -> tuple[float, float]:
    """Shares of other classes' images that the mean difference moves into the class: added, and taken away."""
    if not trial.chosen.any():
        return 0.0, 0.0
    before = witness.before[trial.chosen] == trial.label
    up, down = (float((witness.after(trial, sign) == trial.label).mean() - before.mean()) for sign in (1, -1))
    return up, down


def triggers(trial: Trial, first: Witness, purified: Witness) -> float:
    """Share of other classes' images that the parts' mean difference moves as a trigger would.

    A trigger moves an image into the class only for a probe that has learned it; the other still sees what it is. What
    a natural group looks like (a track of traffic signs, a dark background) covers the image for both.

    Args:
        trial: the difference.
        first: the probe that learned everything.
        purified: the one that never saw the suspected part.

    Returns:
        Of the images that the purified probe knows, the share that the difference moves for the first probe alone; the
        larger one of the two signs, 0 where it knows too few.
    """
    known = purified.before[trial.chosen] == trial.truth
    if known.sum() < LEAST_KNOWN:
        return 0.0
    still = known & (first.before[trial.chosen] != trial.label)
    best = 0.0
    for sign in (1, -1):
        won = still & (first.after(trial, sign) == trial.label)
        if won.sum() / known.sum() > best:  # else it cannot be the larger one
            best = max(best, float((won & (purified.after(trial, sign) == trial.truth)).sum() / known.sum()))
    return best


def orient(
    split: Split,
    divergence: NDArray[np.float32],
    moved: tuple[float, float],
    kinds: tuple[bool, bool] = (False, False),
    odd: tuple[bool, bool] = (False, False),
    left: float = LEFT,
) -> Split:
    """Decide which part of a class is the suspected one.

    Five signs are added up, because each of them fails on some attack (docs/experiments.md): AdvrBD's observation, the
    poisoned part's predictions hold still under Eq. 3's perturbation (not for triggers made fragile); the part whose
    mean difference in pixels, added to images of other classes, moves more of them into the class (not for sinusoids,
    whose negative works as well, nor for triggers that differ from image to image); the part that holds all kinds of
    images (not for clean-label attacks, nor where each class has its own target); the part whose fine detail is unlike
    that of other classes' images (not for triggers that change little of it, nor where the classes differ more); and
    poison tends to be the minority (not in small classes). A part that is nearly all of its class leaves nothing to be
    compared with: then it is the other one.

    Args:
        split: the class in two.
        divergence: (n,) of Eq. 3, for its samples.
        moved: see `transfers`.
        kinds: whether the upper part is diverse, and whether the lower one is.
        odd: whether the upper part is unlike them, and whether the lower one is.
        left: share of the class that the suspected part must leave.

    Returns:
        The split with the suspected part as its upper one.
    """
    still = [float(np.median(divergence[part])) + 1e-3 for part in (split.upper, ~split.upper)]
    share = float(split.upper.mean())
    sign = float(np.clip(np.log(still[1] / still[0]), -2, 2))
    sign += TELLS * (moved[0] - moved[1]) + DIVERSE_SIGN * (int(kinds[0]) - int(kinds[1]))
    sign += ODD_SIGN * (int(odd[0]) - int(odd[1]))
    sign += 0.5 * float(np.log((1 - share) / share))
    other = sign < 0
    if (1 - share if other else share) > 1 - left:
        other = not other
    return split.turned() if other else split


def decide(
    findings: Sequence[Finding], accuracy: float, num_classes: int, settings: Settings, looked: float = 1.0
) -> tuple[Verdict, float, str, list[Finding]]:
    """The verdict on the whole set. What could not be looked into takes from the confidence that it is clean.

    Args:
        findings: of all classes that were looked into; several per class where it splits in several ways.
        accuracy: of the warm probe on the data, averaged over classes.
        num_classes: of which there are samples.
        settings: the bars.
        looked: share of the samples that are in classes large enough to be looked into.

    Returns:
        Verdict, confidence in [0, 1], the reason in one sentence, and the findings that count as poisoned.
    """
    strengths = [finding.strength(settings) for finding in findings]
    poisoned = [f for f, s in zip(findings, strengths, strict=True) if s > 0.5]
    chance = 1 / max(2, num_classes)
    least = min(settings.learned * chance, 0.5 * (1 + chance))
    if accuracy < (NOTHING * chance if poisoned else least):
        reason = (
            f"the probe learned too little to tell (accuracy {accuracy:.2f}, chance {chance:.2f}): "
            "give screening more epochs or more data"
        )
        return "undecided", 0.0, reason, []
    if poisoned and not any(f.informed for f in poisoned):
        reason = (
            "a probe knows no more than by chance of samples that it has not seen, so nothing can be said of their "
            "labels: give screening more data or more epochs, or see whether the images tell the labels at all"
        )
        return "undecided", 0.0, reason, []
    if poisoned:
        sure = float(max(strengths))
        return "poisoned", sure, sentence(poisoned, settings), poisoned
    open_cases = [f for f in findings if f.is_candidate(settings) and _is_open(f, settings)]
    if open_cases:
        case = max(open_cases, key=lambda f: f.split.distance)
        because = f"their difference moves {case.transfer:.0%} of other images into it"
        if case.likeness <= NO_PICTURE:
            because = "they look alike on average, as under a trigger that is elsewhere in each image"
        reason = (
            f"class {case.label} falls into two parts far apart (D = {case.split.distance:.1f}), and {because}: "
            "look at its samples"
        )
        return "undecided", 0.3, reason, []
    if looked < LOOKED:
        reason = (
            f"{1 - looked:.0%} of the samples are in classes of fewer than {settings.least_members}, which are too "
            "small to be looked into: add samples, or join classes"
        )
        return "undecided", 0.0, reason, []
    doubt = max(strengths, default=0.0)
    widest = max((f.split.distance for f in findings), default=0.0)
    reason = f"no class holds a part that is set apart and contradicts its label (widest distance D = {widest:.1f})"
    if looked < 1:
        reason += f"; {1 - looked:.1%} of the samples, in classes of fewer than {settings.least_members}, not looked at"
    return "clean", float((1 - doubt) * looked), reason, []


def _is_open(finding: Finding, settings: Settings) -> bool:
    """Do the parts of a class stand so far apart that what nearly speaks for poison leaves the verdict open?"""
    half = finding.trigger >= LEFT_OPEN * settings.transfer and finding.likeness <= ONE_SCENE and not finding.is_common
    apart = finding.split.distance >= STANDS_OUT and finding.split.valley < 0.1
    # Turned copies of one photograph, and outlines of hands, look as much alike, but not because of their fine detail.
    elsewhere = finding.likeness <= NO_PICTURE and finding.told >= TOLD
    return apart and (half or elsewhere)


def with_kin(judged: Sequence[Finding], settings: Settings) -> list[Finding]:
    """The findings, those of other classes compared with what the poisoned parts of several classes share."""
    apart = [f for f in judged if not f.undoing]  # what a change has made lies nowhere in particular
    common, sharing = shared_direction([(f.label, f.way) for f in apart if f.strength(settings) > 0.5])
    if common is None:
        return list(judged)
    length = float(np.linalg.norm(common))
    kin = {id(f): float(f.way @ common) / length for f in apart if f.label not in sharing}
    return [dataclasses.replace(f, kinship=kin[id(f)]) if id(f) in kin else f for f in judged]


def sentence(poisoned: Sequence[Finding], settings: Settings) -> str:
    """Why the set counts as poisoned."""
    first = max(poisoned, key=lambda f: f.strength(settings))
    count = int((first.split.suspicion > 0.5).sum())
    if first.undoing:
        because = f"are images of other classes, {first.undoing}"
    elif first.contradicts(settings):
        because = f"a probe trained without them puts {first.agreement:.0%} of them into that class"
    elif first.is_alone(settings):
        because = "have fine detail that no other class's images have"
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


def _mean(store: ImageStore, index: NDArray[np.int64]) -> tuple[NDArray[np.float32], float]:
    """The mean image (C, H, W), and the variance about it, averaged over pixels."""
    index = np.sort(index)  # in one order whichever part is the upper one, so that the mean is the same
    parts = np.array_split(index, -(-len(index) // at_once(store.shape, AVERAGED)))
    means, spread = [], 0.0
    for part in parts:
        images = store.batch(part)
        means.append(images.mean(0).numpy())
        spread += float(images.var(0, correction=0).mean()) * len(part) / len(index)
    if len(parts) == 1:
        return means[0], spread
    shares = np.array([len(part) for part in parts]) / len(index)
    mean = np.average(means, axis=0, weights=shares).astype(np.float32)
    between = np.average([((each - mean) ** 2).mean() for each in means], weights=shares)
    return mean, spread + float(between)
