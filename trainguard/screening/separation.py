r"""Does a class fall into two parts, and how far apart are they? Looked for in the features of the warm probe.

A trigger is one more direction in feature space, shared by every poisoned sample and by nobody else with that label. So
inside the target class the samples lie in two heaps with a gap between them, while a clean class is one cloud, however
long. AdvrBD looks for the poison with one number per sample (Eq. 3); the features that the same forward pass computes
say more (measured, see docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import FastICA
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]

SAME_WAY = 0.3  # cosine from which directions in two classes count as one
SHARED_BY = 3  # classes, for a direction to be one that poison may have in others too
DIRECTIONS = 100  # principal directions of a class that the discriminant may use
KEPT = 10  # splits of one class that are given
ROUNDING = 1e-4  # of the largest value: what copies of one image differ by
STARTS = 6  # widest directions that first guesses are taken from
ENDS = (0.05, 0.1, 0.2)  # shares of a class at either end of such a direction, likewise
SETTLES = 20  # rounds in which a guess of a fixed share may settle
INDEPENDENT = (10, 30)  # widest directions in which independent components are looked for
ENOUGH = 2_000  # samples of a class to find these components in
SPIKED, FLAT = 2, 2  # of these components, how many of the highest and the lowest kurtosis give a guess
LEAST_SHARE = 0.03  # of a class, for a part to count: below it stand single odd images
LEAST_SIZE = 15  # samples, likewise
ALIKE = 0.7  # correlation of two splits from which they count as one
FAR_OUT = 3.0  # robust standard deviations above the lower part's median
POSSIBLE = 0.1  # probability of the upper part
RIDGE = 0.1  # of the discriminant's covariance towards a sphere
FOLDS = 4
BOAST = 2.0  # how much further than the other folds' a line may put apart what it was drawn from; then it is shortened
ROUNDS = 3
EM_ROUNDS = 100  # most rounds of a mixture along a line
EM_GAIN = 1e-3  # in mean log-likelihood, below which they end


@dataclass(frozen=True)
class Split:
    """One class in two parts.

    Attributes:
        position: (n,) float64, where each sample lies on the line that separates the parts best; a sample's own place
            is never used to draw its line.
        probability: (n,) float64 in [0, 1], of belonging to the upper part.
        distance: Ashman's D of the two parts: their means' distance in units of their widths.
        valley: density between the two means over the lower of the densities at them, in [0, 1].
        whole: the upper part holds all poison of the class that is known, so that the lower one's tail is its own.
    """

    position: Array
    probability: Array
    distance: float
    valley: float
    whole: bool = False

    @property
    def gap(self) -> float:
        """How clearly there are two: the distance, less where the valley is shallow."""
        return self.distance * (1 - min(1.0, self.valley))

    @property
    def upper(self) -> NDArray[np.bool_]:
        """(n,) True for the upper part."""
        return self.probability > 0.5

    @property
    def suspicion(self) -> Array:
        """(n,) in [0, 1], above 0.5 for whatever does not clearly belong to the lower part.

        Poison that stays in costs more than a clean sample that is relabelled. So the line is drawn at the place that
        is far out for the lower part, or where the upper part becomes possible, whichever comes first. How wide the
        lower part is, its middle says, for there may be more poison in its tail; where there is none, its tail as well.
        """
        low = self.position[~self.upper]
        middle = float(np.median(low))
        width = 1.4826 * float(np.median(np.abs(low - middle))) + 1e-9
        width = max(width, float(low.std())) if self.whole else width
        possible = self.position[self.probability > POSSIBLE]
        line = min(middle + FAR_OUT * width, float(possible.min()) - 1e-9 * width)
        return 1 / (1 + np.exp(-np.clip((self.position - line) / width, -30, 30)))

    @property
    def smaller(self) -> NDArray[np.bool_]:
        """(n,) the part that has fewer samples."""
        return self.upper if self.upper.mean() <= 0.5 else ~self.upper

    def differs_from(self, other: Split) -> bool:
        """True unless the two cut the class in nearly the same way."""
        return bool(abs(np.corrcoef(self.upper, other.upper)[0, 1]) < ALIKE)

    def subset(self, chosen: NDArray[np.bool_]) -> Split:
        """The same split of the samples `chosen`, (n,)."""
        return replace(self, position=self.position[chosen], probability=self.probability[chosen])

    def direction(self, whitened: Array) -> Array:
        """(D,) from the larger part's mean to the smaller one's, of length 1, in (n, D) whitened features."""
        apart = whitened[self.smaller].mean(0) - whitened[~self.smaller].mean(0)
        return apart / (np.linalg.norm(apart) + 1e-12)

    def turned(self) -> Split:
        """The same split with the parts' names exchanged."""
        return replace(self, position=-self.position, probability=1 - self.probability, whole=False)


def shared_direction(directions: Sequence[tuple[int, Array]]) -> tuple[Array | None, frozenset[int]]:
    """What the splits of several classes have in common: a trigger that serves many targets points one way in all.

    Args:
        directions: a class and the (D,) direction of one of its splits, of length 1; several per class where it splits
            in several ways.

    Returns:
        The mean (D,) of the directions that the most classes share, and those classes; None where fewer than
        `SHARED_BY` share one.
    """
    if not directions:
        return None, frozenset()
    labels, lines = np.array([label for label, _ in directions]), np.stack([line for _, line in directions])
    alike = lines @ lines.T
    teams = (alike > SAME_WAY) & (labels[:, None] != labels[None]) | np.eye(len(labels), dtype=bool)
    team = max(teams, key=lambda team: len(np.unique(labels[team])))
    sharing = frozenset(int(label) for label in labels[team])
    return (lines[team].mean(0), sharing) if len(sharing) >= SHARED_BY else (None, frozenset())


@threadpool_limits.wrap(limits=1)  # small matrices: threads cost more than they bring, and round differently
def split_class(whitened: Array, seed: int, orders: Sequence[Array] = ()) -> list[Split]:
    """Find the ways in which one class falls into two parts.

    First guesses are two Gaussians along each of the widest directions, in the plane of the first two, and along the
    independent components that are least like one Gaussian: two heaps of like size have a low kurtosis, a small heap
    far out a high one. Further guesses are the samples at either end of each of the widest directions and the first
    ones in each of the given orders, a fixed share of the class: a discriminant between them and the rest is drawn, as
    many lie farthest out along it, and so on until they settle. Noise in a guess averages out of the discriminant, so
    a guess that holds a fifth of a small heap leads to all of it.

    From every guess a linear discriminant is drawn on three quarters of the class and read on the rest, the parts are
    read off that line, and this is repeated, as in self-training. A class may have natural groups as well as a trigger,
    or several triggers, so the widest gaps that differ are all given.

    Args:
        whitened: (n, D) features of the class, n at least 8.
        seed: of folds and starts.
        orders: (n,) each, what else may tell the parts: how little the probe believes each label, or how far out a
            sample lies in a direction that is known from other classes.

    Returns:
        Up to `KEPT` splits, the widest gap first; none where the class has no second part.

    Warns:
        ConvergenceWarning: a first guess did not settle, which is no reason to doubt what it leads to. Not silenced
            here: what Python filters, it filters in all threads.
    """
    n = len(whitened)
    x = whitened - whitened.mean(0)
    if np.abs(x).max(initial=0) <= ROUNDING * np.abs(whitened).max(initial=0):
        return []  # copies of one image
    _, directions = np.linalg.eigh(x.T @ x)
    z = x @ directions[:, ::-1][:, : min(DIRECTIONS, max(2, n // 5))]
    lines = Discriminants(z, seed)
    planes = [z[:, :2], *(z[:, k : k + 1] for k in range(min(STARTS, z.shape[1]))), *_independent(z, seed)]
    found: list[Split] = []
    # Settled guesses come second: of a heap that overlaps its class they hold the far side, with a wider gap.
    for guesses, most in (
        ([_mixture(plane, seed).predict(plane) == 1 for plane in planes], KEPT // 2),
        (_settled(lines, orders), KEPT),
    ):
        for split in sorted(_refined(lines, guesses), key=lambda split: -split.gap):
            if len(found) < most and all(split.differs_from(other) for other in found):
                position, probability = split.position.copy(), split.probability.copy()  # those of all guesses may go
                found.append(replace(split, position=position, probability=probability))
    return sorted(found, key=lambda split: -split.gap)


class Discriminants:
    """Linear discriminants of one class in two parts; each sample is read on one that was drawn without its fold.

    Whatever the parts, the covariance within them is that of all samples less a share of the outer product of their
    means' difference: so one decomposition per fold serves every guess.

    Args:
        z: (n, D) features.
        seed: of the folds.
    """

    def __init__(self, z: Array, seed: int) -> None:
        self.z = z
        fold = np.random.default_rng(seed).permutation(len(z)) % FOLDS
        self._folds = [(np.flatnonzero(fold == k), z[fold == k]) for k in range(FOLDS)]
        self._decomposed = [np.linalg.eigh(np.atleast_2d(np.cov(z[fold != k].T, bias=True))) for k in range(FOLDS)]

    def positions(self, upper: NDArray[np.bool_]) -> Array:
        """Places between the lower part and the upper one, about in units of log-odds: (G, n) for G guesses (G, n).

        In a small class one fold's line may part the samples that it was drawn from perfectly, with endless odds, and
        then what it reads would be a part by itself: lines that promise far more than the others are shortened.
        """
        counts = np.stack([upper[:, own].sum(1) for own, _ in self._folds])
        sums = np.stack([upper[:, own].astype(np.float64) @ z for own, z in self._folds])
        everything, drawn = self.z.sum(0), []
        for k, ((own, z), (values, vectors)) in enumerate(zip(self._folds, self._decomposed, strict=True)):
            high = counts.sum(0) - counts[k]  # of the upper part without the fold
            low = len(self.z) - len(own) - high
            above = sums.sum(0) - sums[k]
            means = above / np.maximum(1, high)[:, None], (everything - z.sum(0) - above) / np.maximum(1, low)[:, None]
            apart = means[0] - means[1]
            between = high * low / (high + low) ** 2
            ridge = RIDGE * (values.sum() - between * (apart**2).sum(1)) / len(values)
            along = apart @ vectors
            solved = along / (values + ridge[:, None])
            lines = solved @ vectors.T / (1 - between * (along * solved).sum(1))[:, None]  # Sherman and Morrison 1950
            lines[np.minimum(high, low) == 0] = 0
            drawn.append((lines, (means[0] + means[1]) / 2, (lines * apart).sum(1)))
        most = BOAST * np.median([reach for _, _, reach in drawn], axis=0)
        position = np.zeros(upper.shape)
        for (own, z), (lines, middle, reach) in zip(self._folds, drawn, strict=True):
            lines = lines * np.minimum(1, most / np.maximum(reach, 1e-9))[:, None]
            position[:, own] = lines @ z.T - (lines * middle).sum(1)[:, None]
        return position


def _settled(lines: Discriminants, more: Sequence[Array]) -> list[NDArray[np.bool_]]:
    """(n,) masks: samples at an end of a wide direction, or first in one of `more` (n,) orders, after settling."""
    z = lines.z
    ends = [sign * z[:, k] for k in range(min(STARTS, z.shape[1])) for sign in (1, -1)]
    guesses = [(order, max(LEAST_SIZE, round(share * len(z)))) for order in [*more, *ends] for share in ENDS]
    counts = np.array([count for _, count in guesses])
    upper = np.stack([_first(order, count) for order, count in guesses])
    moving = np.arange(len(guesses))
    for _ in range(SETTLES):
        before, places = upper[moving], lines.positions(upper[moving])
        upper[moving] = [_first(place, count) for place, count in zip(places, counts[moving], strict=True)]
        moving = moving[(before & upper[moving]).sum(1) <= 0.99 * counts[moving]]
        if not len(moving):
            break
    found: list[NDArray[np.bool_]] = []
    for mask in upper:
        if not any((mask & other).sum() > 0.9 * max(mask.sum(), other.sum()) for other in found):
            found.append(mask)
    return found


def _first(order: Array, count: int) -> NDArray[np.bool_]:
    """(n,) True for the `count` largest of an order (n,), of equal ones for those that come first."""
    count = min(count, len(order))
    least = np.partition(order, len(order) - count)[len(order) - count]
    upper = order > least
    upper[np.flatnonzero(order == least)[: count - upper.sum()]] = True
    return upper


@threadpool_limits.wrap(limits=1)
def drawn(part: NDArray[np.bool_], columns: Array, seed: int) -> Split | None:
    """The line that a part of a class leads to, among a few figures per sample.

    Args:
        part: (n,) a guess of the part.
        columns: (n, C) the figures.
        seed: of the folds.

    Returns:
        The class in two, its upper part the one that is more like the guess; None if a part vanishes.
    """
    z = (columns - columns.mean(0)) / (columns.std(0) + 1e-9)
    found = _refined(Discriminants(z, seed), [part])
    if not found:
        return None
    above = found[0].position[part].mean() > found[0].position[~part].mean()
    return found[0] if above else found[0].turned()


@threadpool_limits.wrap(limits=1)
def leaning(whitened: Array, part: NDArray[np.bool_], seed: int) -> Array:
    """(n,) how far samples lie along the difference between a part's mean and that of the rest.

    Each is read on a difference that was drawn without its fold. Where the spread is taken out, that is the best line
    there is, and all directions count, as in a discriminant of some hundred samples they could not.

    Args:
        whitened: (n, D) features.
        part: (n,) the part.
        seed: of the folds.
    """
    fold, places = np.random.default_rng(seed).permutation(len(part)) % FOLDS, np.zeros(len(part))
    for k in range(FOLDS):
        own = fold == k
        here, there = part & ~own, ~part & ~own
        if here.any() and there.any():
            above, below = whitened[here].mean(0), whitened[there].mean(0)
            length = float(np.linalg.norm(above - below)) + 1e-12
            places[own] = (whitened[own] - (above + below) / 2) @ (above - below) / length
    return places


def _independent(z: Array, seed: int) -> list[Array]:
    """(n, 1) places along the independent components that are least like a Gaussian."""
    found = []
    some = np.sort(np.random.default_rng(seed).permutation(len(z))[:ENOUGH])
    varied = np.linalg.matrix_rank(z[some] - z[some].mean(0))  # copies of one image vary in nothing
    for size in INDEPENDENT:
        if size > varied or len(z) < 4 * size:
            continue
        ica = FastICA(size, random_state=seed, max_iter=300, tol=1e-3, whiten="unit-variance", fun=_tanh)
        s = ica.fit(z[some, :size]).transform(z[:, :size])
        order = np.argsort((s**4).mean(0) / (s**2).mean(0) ** 2)
        found += [s[:, k : k + 1] for k in {*order[:FLAT].tolist(), *order[-SPIKED:].tolist()}]
    return found


def _tanh(x: Array) -> tuple[Array, Array]:
    """The hyperbolic tangent of (C, n) places, and the mean (C,) of its slope; scikit-learn's own goes row by row."""
    bent = np.tanh(x, out=x)
    return bent, (1 - bent**2).mean(-1)


def _refined(lines: Discriminants, guesses: list[NDArray[np.bool_]]) -> list[Split]:
    """The splits that guesses lead to, in their order, without those one of whose parts vanishes."""
    least = max(LEAST_SIZE, round(LEAST_SHARE * len(lines.z)))
    splits: list[Split] = []
    for _ in range(ROUNDS):
        guesses = [upper for upper in guesses if min(upper.sum(), (~upper).sum()) >= least]
        if not guesses:
            return []
        positions = lines.positions(np.stack(guesses))
        splits = [_read_off(*along) for along in zip(positions, *_two_gaussians(positions), strict=True)]
        guesses = [split.upper for split in splits]
    return [split for split in splits if min(split.upper.sum(), (~split.upper).sum()) >= least]


def _read_off(position: Array, weight: Array, mean: Array, var: Array, probability: Array) -> Split:
    """How far apart the two Gaussians along a line are, see `_two_gaussians`."""
    if mean[0] > mean[1]:
        weight, mean, var, probability = weight[::-1], mean[::-1], var[::-1], 1 - probability
    distance = float((mean[1] - mean[0]) * np.sqrt(2 / var.sum()))
    line = np.linspace(mean[0], mean[1], 200)[:, None]
    density = (weight / np.sqrt(var) * np.exp(-((line - mean) ** 2) / (2 * var))).sum(1)
    # A wide Gaussian outweighs a narrow one again far beyond its mean: there the posterior goes on as it was.
    order = np.argsort(position)
    middle = int((position < mean.mean()).sum())
    low, high = order[:middle], order[middle:]
    probability[low] = np.minimum.accumulate(probability[low][::-1])[::-1]
    probability[high] = np.maximum.accumulate(probability[high])
    return Split(position, probability, distance, float(density.min() / min(density[0], density[-1])))


def _two_gaussians(positions: Array) -> tuple[Array, Array, Array, Array]:
    """Expectation-maximisation from two means, along G lines (G, n) at once, since a line alone is soon done.

    It starts from two means, not from the parts that drew the line: those are noisy, and hold it where they are.

    Returns:
        Weights, means and variances (G, 2), and the shares of the second Gaussian (G, n).
    """
    (count, n), total = positions.shape, positions.sum(1)
    cut = total / n
    for _ in range(EM_ROUNDS):
        upper = positions > cut[:, None]
        high, above = upper.sum(1), np.where(upper, positions, 0.0).sum(1)
        both = (above / np.maximum(1, high) + (total - above) / np.maximum(1, n - high)) / 2
        last, cut = cut, np.where((high > 0) & (high < n), both, cut)
        if np.array_equal(last, cut):
            break
    second = (positions > cut[:, None]).astype(np.float64)
    weight, mean, var = (np.empty((count, 2)) for _ in range(3))
    moving, before = np.arange(count), np.full(count, -np.inf)
    for _ in range(EM_ROUNDS):
        along, shares = positions[moving], np.stack([1 - second[moving], second[moving]])
        size = shares.sum(2) + 1e-9
        means = (shares * along).sum(2) / size
        square = (along - means[:, :, None]) ** 2
        widths = (shares * square).sum(2) / size + 1e-4
        weights = size / size.sum(0)
        log = np.log(weights / np.sqrt(2 * np.pi * widths))[:, :, None] - square / (2 * widths[:, :, None])
        odds = np.exp(-np.abs(log[1] - log[0]))  # of the less likely one: logaddexp takes ten times as long
        likelihood = (log.max(0) + np.log1p(odds)).mean(1)
        second[moving] = np.where(log[1] > log[0], 1.0, odds) / (1 + odds)
        weight[moving], mean[moving], var[moving] = weights.T, means.T, widths.T
        gaining = likelihood - before >= EM_GAIN
        moving, before = moving[gaining], likelihood[gaining]
        if not len(moving):
            break
    return weight, mean, var, second


def _mixture(points: Array, seed: int) -> GaussianMixture:
    return GaussianMixture(2, covariance_type="diag", random_state=seed, reg_covar=1e-4).fit(points)
