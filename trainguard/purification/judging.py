"""What an audit's measurements say: shares of transitions between classes, the bars, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainguard.purification.bending import lead_of
from trainguard.purification.overlay import NEAR, usual_of
from trainguard.purification.state import Indices

Verdict = Literal["clean", "backdoored", "undecided"]

# Thresholds, and bands of which half on either side is undecided. Measured on 21 networks of 8 pixel digits, 7 benign:
# the excess of the strongest pull over an even one is 0.54 at most if benign, 0.91 at least under blend and SIG; but
# the paper's 'more than 40%' of CIFAR-10's adversarial examples is an excess of 0.33, hence the broad band.
TO_ONE, TO_ONE_BAND = 0.45, 0.3
TO_ALL, TO_ALL_BAND = 0.5, 0.2  # median one-sidedness of the moves: benign 0.35 at most, all-to-all blend 0.62
# One patch of 0.6% of the image (four pixels on digits): the share of the other classes' images that it moves into one
# class, less what the best patch that leads elsewhere moves into one; and the share of each class's images that it
# moves into a class of their own. Measured on 13 networks of CIFAR-10 and GTSRB, 5 benign (docs/experiments.md):
INTO, INTO_BAND = 0.5, 0.2  # benign 0.10 at most, a RepVGG that any patch breaks 0.35; patches 0.73 to 0.95
MATCHED, MATCHED_BAND = 0.6, 0.2  # benign and all-to-one 0.23 at most, all-to-all 0.83
ASKED_OF_PATCH = INTO - INTO_BAND / 2  # from which the second patch is looked for
LEAD, LEAD_BAND = 0.34, 0.16  # the least bend that leads to a class over the next class's, see `bending.lead_of`
NEAR_BAND = 0.08  # of `overlay.NEAR`: one faint picture, its radius for the nearest class over the median class's
# The lower end of Wilson's interval of the share of one class's images that a patch of their own moves, surely, into
# one other, less the median class's share:
OWN, OWN_BAND = 0.63, 0.14  # benign 0.37 at most on CIFAR-10, 0.53 on GTSRB; TaCT 0.74 and 0.81
RIVAL = 0.15  # from which it is spoken of
TARGET = 0.4  # share that makes a class a suspected target; the paper's figure
LEAST_IMAGES, LEAST_CLASSES = 50, 10  # to try a model on; or half of its classes, where it has fewer than 20
LEAST_MOVED = 50  # adversarial examples; the standard error of a share is then at most 0.07


def transition_counts(labels: Indices, predicted: Indices, classes: int) -> NDArray[np.int64]:
    """(K, K) how many adversarial examples of class i are predicted as j.

    Args:
        labels: (n,) classes before the attack.
        predicted: (n,) classes after it.
        classes: K.
    """
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def pull_of(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""(K,) the share of adversarial examples of the other classes that end in each class, of those that moved at all.

    .. math:: p_j = \sum_{i \ne j} n_{ij} \Big/ \sum_{i \ne j} \sum_{k \ne i} n_{ik}

    A uniform model has :math:`1 / (K - 1)` everywhere.
    """
    moved = counts - np.diag(np.diag(counts))
    leaving = moved.sum(axis=1)
    return moved.sum(axis=0) / np.maximum(leaving.sum() - leaving, 1)


def into_of(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,) the share of all images of the other classes that end in each class."""
    moved, images = counts - np.diag(np.diag(counts)), counts.sum(axis=1)
    return moved.sum(axis=0) / np.maximum(images.sum() - images, 1)


def matched_of(counts: NDArray[np.int64]) -> float:
    """The mean share of a class's images that move into the class which most of them move to, if none moves more there.

    Under all-to-all each class has another one to go to, under all-to-one all have the same.
    """
    share = (counts - np.diag(np.diag(counts))) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    most = {int(k): float(share[share.argmax(1) == k].max()) for k in np.unique(share.argmax(1))}
    return sum(most.values()) / max(1, int((counts.sum(axis=1) > 0).sum()))


def largest_move(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(K,) how many images of each class moved to the one other class that got the most of them."""
    return (counts - np.diag(np.diag(counts))).max(axis=1)


def at_least(count: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.float64]:
    """The lower end of Wilson's interval of a share, two standard errors wide; 0 of none."""
    n, z = np.maximum(of, 1), 2.0
    share = count / n
    return (share + z**2 / (2 * n) - z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (1 + z**2 / n)


def one_way(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""(K,) how one-sided each class's most frequent move is: :math:`\max_j (P_{ij} - P_{ji})`.

    Classes that merely look alike move to each other both ways; an all-to-all backdoor moves them one way (i to i + 1).
    """
    moved = (counts - np.diag(np.diag(counts))).astype(float)
    share = moved / np.maximum(moved.sum(axis=1, keepdims=True), 1)
    return (share - share.T).max(axis=1)


def judge(
    counts: NDArray[np.int64],
    patched: NDArray[np.int64],
    reached: Mapping[int, float],
    bent: Mapping[int, float],
    each: NDArray[np.int64] | None = None,
    rival: float = 0.0,
) -> tuple[Verdict, float, str, tuple[int, ...]]:
    """The verdict that two matrices of transitions, the reach of faint overlays and that of warps support.

    Args:
        counts: (K, K) from `transition_counts`, under each image's own adversarial perturbation.
        patched: (K, K) likewise, under one small patch for all images.
        reached: by class, see `overlay.reaches`; classes that were not tried are missing.
        bent: likewise, see `bending.bends`.
        each: (K, K) transitions that are sure, under one small patch for each class's images alone; None without.
        rival: the share of images that the best patch leading elsewhere moves into one class.

    Returns:
        Verdict, confidence in [0, 1], the reason in one sentence, and the suspected target classes.
    """
    classes = len(counts)
    moved = int(counts.sum() - np.trace(counts))
    images, sources = int(counts.sum()), int((counts.sum(1) > 0).sum())
    if images < LEAST_IMAGES or sources < max(2, min(LEAST_CLASSES, -(-classes // 2))):
        came = f"tried on {images} images of {sources} of the model's {classes} classes, which is too few to tell"
        return "undecided", 0.0, f"{came}: give more", ()
    pull, broken = pull_of(counts), 1 - np.trace(patched) / max(1, patched.sum())
    uniform = 1 / (classes - 1)
    to_one = (float(pull.max()) - uniform) / max(1 - uniform, uniform)
    to_all = float(np.median(one_way(counts)))
    target, into = int(pull.argmax()), into_of(patched)
    magnet = float(into.max()) if classes > 2 else 0.0
    usual = usual_of(reached)
    near = np.array([reached.get(k, usual) / usual for k in range(classes)])
    lead = lead_of(bent)
    sooner = np.array([bent.get(k, np.inf) for k in range(classes)])
    each = np.zeros_like(counts) if each is None else each
    own = at_least(largest_move(each), each.sum(1))
    if (tried := each.any(1)).any():  # where most classes break under so large a patch, that one does says nothing
        own = own - np.median(largest_move(each)[tried] / each.sum(1)[tried])
    source = int(own.argmax())
    led = int((each[source] * (np.arange(classes) != source)).argmax())
    if classes < 3 or moved < LEAST_MOVED:  # with two classes, every adversarial example falls to the other one
        to_one = to_all = 0.0
    findings = [
        (
            (magnet - rival - INTO) / INTO_BAND,
            f"one small patch moves {magnet:.0%} of other images into class {into.argmax()}"
            + (f", and another one {rival:.0%} into one more" if rival > RIVAL else ""),
            into,
        ),
        (
            (min(broken, matched_of(patched)) - MATCHED) / MATCHED_BAND,
            f"one small patch changes {broken:.0%} of all predictions",
            None,
        ),
        (
            (NEAR - near.min()) / NEAR_BAND,
            f"the faintest picture that leads to class {near.argmin()} has {near.min():.0%} of the usual strength",
            1 - near,
        ),
        (
            (LEAD - lead) / LEAD_BAND,
            f"bending images leads to class {sooner.argmin()} at {lead:.0%} of what any other class needs",
            (sooner == sooner.min()) * (1 - lead),
        ),
        (
            (own.max() - OWN) / OWN_BAND,
            f"one small patch moves {each[source, led] / max(1, each[source].sum()):.0%} of the images of class "
            f"{source} into class {led}",
            (np.arange(classes) == led) * own.max(),
        ),
        ((to_one - TO_ONE) / TO_ONE_BAND, f"{pull[target]:.0%} of adversarial examples fall to class {target}", pull),
        ((to_all - TO_ALL) / TO_ALL_BAND, f"adversarial examples move one way between classes ({to_all:.0%})", None),
    ]
    if classes < 3:
        findings = findings[:-2]
    # A single target also makes moves one-way: what names it goes first.
    firm = [finding for finding in findings if finding[0] >= 0.5]
    evidence, words, _ = firm[0] if firm else max(findings, key=lambda finding: finding[0])
    chance = float(1 / (1 + np.exp(-4 * evidence)))  # 0.98 one band above the threshold
    if classes < 3 and evidence < 0.5:
        return "undecided", 0.0, f"{words}; what else would clear a model tells nothing with two classes", ()
    if moved < LEAST_MOVED and evidence < 0.5:
        return "undecided", 0.0, f"{words}; only {moved} adversarial examples changed class: raise eps= or images=", ()
    if abs(evidence) < 0.5:
        return "undecided", chance, words, ()
    if evidence < 0:
        return "clean", 1 - chance, words, ()
    named = [where for _, _, where in firm if where is not None]
    strong = tuple(dict.fromkeys(int(k) for where in named for k in np.argsort(-where) if where[k] >= TARGET))
    if not strong:
        return "backdoored", chance, f"{words}, as under an all-to-all backdoor", tuple(range(classes))
    return "backdoored", chance, words, strong
