r"""What the first probe makes of the samples, class by class, and the ways in which each class falls into two."""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from trainguard.errors import ModelError
from trainguard.screening.bars import CROWDED, LEFT, like_nothing_else
from trainguard.screening.finding import Finding
from trainguard.screening.identification import Images, Witness, kinds_of
from trainguard.screening.learning import logits
from trainguard.screening.pipeline import Run
from trainguard.screening.pixelview import Look, PixelView, looks_for
from trainguard.screening.probe import Probe, Trained
from trainguard.screening.resemblance import margins
from trainguard.screening.separation import Array, Split, split_class
from trainguard.screening.settings import Settings
from trainguard.screening.surroundings import Surroundings
from trainguard.screening.undoing import Undone
from trainguard.screening.whitening import Whitening
from trainguard.training import autocast, outputs

FITTED = 10_000  # samples that the common spread of features is learned from
HARDLY = 0.1  # probability of its label under which a sample's label is not believed
LEAST_DISBELIEF = 0.01  # share of such samples in other classes: below it there are too few to be a measure
AT_ONCE = 8192  # samples of a class whose pixels are held at once
MOST_THREADS = 4  # that look into a class each
HELD = 2 * AT_ONCE  # samples that these may hold together
NEW, NEW_SHARE = 30, 0.03  # samples that a further part of a class must add, and what share of the class
MOST = 4  # splits of a class that get a closer look; as many again of those that hold all kinds of images
Told = Callable[[np.ndarray], tuple[float, float]]  # see `surroundings.Bearings`


@dataclass(frozen=True, eq=False)
class Classes:
    """What the first probe makes of the samples, one class at a time: that much memory its features need.

    Attributes:
        run: the screening.
        probe: that learned everything.
        answers: (M, K) its logits for the readable samples.
        images: see `bystanders`.
        whitening: of its features.
        looks: at the images, which ask no probe.
        views: of what each look gives.
        sizes: (K,) readable samples of each class.
        around: the fine detail of samples of all classes; None where images are too small or too few for that.
        looked: of each class that has been looked at, for each look the parts that it sets apart.
        kept: of all samples, where they are few, the probe's features and what each look gives, one after the other.
        slots: (N,) where in these each sample lies.
    """

    run: Run
    probe: Probe | Trained
    answers: np.ndarray
    images: Images
    whitening: Whitening
    looks: Sequence[Look]
    views: Sequence[PixelView]
    sizes: np.ndarray
    around: Surroundings | None = None
    looked: dict[int, list[list[Finding]]] = field(default_factory=dict)
    kept: Sequence[np.ndarray] = ()
    slots: np.ndarray | None = None

    @classmethod
    def of(cls, run: Run, probe: Probe | Trained, images: Images) -> Classes:
        """Ask the probe, and learn the spread that all classes share from some samples of them.

        Raises:
            ModelError: what it answers is no number.
        """
        store = run.store
        fitted = np.random.default_rng(run.seed).permutation(store.readable)[:FITTED]
        looks = looks_for(store.shape, len(fitted))
        few = len(fitted) == len(store.readable)
        answers, *everything = _seen(run, probe, looks, fitted)
        answers = answers[np.argsort(fitted)] if few else logits(run, probe, store.readable)
        if len(broken := store.readable[~np.isfinite(answers).all(1)]):
            raise ModelError(f"the model gives NaN or infinite outputs on {store.name(broken[0])}: check what it does")
        features, *seen = everything
        whitening = Whitening.fit(features, store.labels[fitted])
        views = [PixelView.fit(numbers, store.labels[fitted]) for numbers in seen]
        sizes = np.bincount(store.labels[store.readable], minlength=store.num_classes)
        fine = Surroundings.of(looks[-1], views[-1], seen[-1], store.labels[fitted]) if len(looks) > 1 else None
        classes = cls(run, probe, answers, images, whitening, looks, views, sizes, fine)
        if not few:
            return classes
        slots = np.zeros(len(store), dtype=np.int64)
        slots[fitted] = np.arange(len(fitted))
        return dataclasses.replace(classes, kept=everything, slots=slots)

    def splits(self, labels: Sequence[int], common: np.ndarray | None = None) -> dict[int, list[Finding]]:
        """The splits of each class that get a closer look, the part of more kinds as the upper one.

        Images are read and the probe is asked here, class by class. What follows is numbers alone, each class's on a
        thread of its own, as many at a time as may be held.

        Args:
            labels: the classes.
            common: (D,) a direction in whitened features to look along as well.
        """
        workers = max(1, min(MOST_THREADS, torch.get_num_threads(), HELD // int(self.sizes.max())))
        found: dict[int, list[Finding]] = {}
        parting: deque[tuple[int, Future[tuple[Array, list[Finding]]]]] = deque()

        def finish() -> None:
            label, parted = parting.popleft()
            found[label] = self._closer(label, *parted.result())

        blas = threadpool_limits(1, user_api="blas")  # which all threads share
        with blas, warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
            warnings.simplefilter("ignore", ConvergenceWarning)
            for label in labels:
                if len(parting) == workers:
                    finish()
                numbers = self._numbers(self.members(label), label not in self.looked)
                parting.append((label, pool.submit(self._parted, label, numbers, common)))
            while parting:
                finish()
        return found

    @threadpool_limits.wrap(limits=1)  # OpenMP's are each thread's own
    def _parted(
        self, label: int, numbers: Callable[[], list[Array]], common: np.ndarray | None
    ) -> tuple[Array, list[Finding]]:
        """A class's whitened features and its splits in them; those of each look are kept in `looked`."""
        whitened, *places = numbers()
        if label not in self.looked:
            self.looked[label] = [self._apart(label, numbers) for numbers in places]
        unsure = -margins(self.answers[self.labels == label], label)[0]
        orders = [unsure] + ([] if common is None else [whitened @ common])
        return whitened, [self.finding(label, split) for split in split_class(whitened, self.run.seed, orders)]

    def _closer(self, label: int, whitened: Array, found: list[Finding]) -> list[Finding]:
        """Of the splits of a class those that get a closer look, and what its surroundings say of them."""
        settings, found = self.run.settings, _few(found, self.run.settings)
        every: list[Finding] = []
        for plain in self.looked[label]:
            found = _with_pixels(found, plain, settings)
            every += plain
        bearings = cache(lambda: self.bearings(label))  # not needed in every class
        found += self._further(found, every, bearings)
        return [self._placed(finding, whitened, bearings) for finding in found]

    def _apart(self, label: int, places: np.ndarray) -> list[Finding]:
        """The splits of a class, from where a look puts its samples (n, k), that are wide enough to count."""
        found = [self.finding(label, split, pixels=True) for split in split_class(places, self.run.seed)]
        return [f for f in found if f.is_apart(self.run.settings) or f.is_quite_apart]

    def _placed(self, finding: Finding, whitened: np.ndarray, bearings: Callable[[], Told]) -> Finding:
        """With the way between its parts in whitened features and, of a candidate, where other classes' images lie."""
        finding = dataclasses.replace(finding, line=finding.split.direction(whitened))
        if not finding.is_candidate(self.run.settings):
            return finding
        told, elsewhere = bearings()(finding.split.upper)
        return dataclasses.replace(finding, told=told, elsewhere=elsewhere)

    def _further(self, found: list[Finding], seen: list[Finding], bearings: Callable[[], Told]) -> list[Finding]:
        """Further parts of a class that a look sets far apart, that hold new samples, and that are like nothing else.

        A trigger may be one of several pictures, each of which makes a part of its own.
        """
        chosen = [f for f in found if f.is_candidate(self.run.settings)]
        held, more = np.any([f.split.smaller for f in chosen], axis=0), []
        for finding in sorted((f for f in seen if f.is_quite_apart), key=lambda f: -f.split.gap):
            part = finding.split.smaller
            if (part & ~held).sum() >= max(NEW, NEW_SHARE * len(part)):
                told, elsewhere = bearings()(part)
                if like_nothing_else(told, elsewhere):
                    more.append(finding)
                    held = held | part
        return more

    def _numbers(self, members: np.ndarray, looking: bool) -> Callable[[], list[Array]]:
        """Read the samples of a class now; what `read` makes of them may be asked for later, on any thread."""
        if len(members) > AT_ONCE:
            places = self.read(members, looking)
            return lambda: places
        seen = self.seen(members, looking)
        return lambda: self._places(seen, self._lines(seen))

    def read(self, members: np.ndarray, looking: bool = True) -> list[Array]:
        """The whitened features (n, D) of the samples of a class, and for each look (n, k) where they vary most."""
        order, parts, lines = np.arange(len(members)), [], None
        if len(members) > AT_ONCE:  # the directions are learned from the first ones: any, not those of one place
            order = np.random.default_rng(self.run.seed).permutation(order)
        for start in range(0, len(order), AT_ONCE):
            seen = self.seen(members[order[start : start + AT_ONCE]], looking)
            lines = lines or self._lines(seen)
            parts.append(self._places(seen, lines))
        return [np.concatenate(part)[np.argsort(order)] for part in zip(*parts, strict=True)]

    def _lines(self, seen: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each look the directions along which what it gives of a class varies most; see `seen`."""
        return [view.widest(numbers, self.run.seed) for view, numbers in zip(self.views, seen[1:], strict=False)]

    def _places(self, seen: Sequence[np.ndarray], lines: Sequence[np.ndarray]) -> list[Array]:
        """The whitened features (n, D), and for each look (n, k) where its numbers lie along these directions."""
        looks = zip(self.views, seen[1:], lines, strict=False)  # without looks, no views are needed
        return [self.whitening(seen[0]), *(view(numbers, line) for view, numbers, line in looks)]

    def seen(self, members: np.ndarray, looking: bool = True) -> Sequence[np.ndarray]:
        """The probe's features (n, D) of some samples, and what each look gives (n, P)."""
        if self.slots is not None:
            rows = self.slots[members]
            return [numbers[rows] for numbers in (self.kept if looking else self.kept[:1])]
        return _seen(self.run, self.probe, self.looks if looking else (), members)[1:]

    def views_of(self, members: np.ndarray) -> list[np.ndarray]:
        """Samples of one class, whitened: the probe's features (n, D), and all that each look gives (n, P).

        Of a class that is too large to be held at once, where they vary most (n, k).
        """
        if len(members) > AT_ONCE:
            return self.read(members)
        features, *seen = self.seen(members)
        looked = [view.whitened(numbers) for view, numbers in zip(self.views, seen, strict=True)]
        return [self.whitening(features), *looked]

    def bearings(self, label: int) -> Told:
        """What fine detail says of a part (n,) of a class, see `surroundings.Bearings`."""
        if self.around is None:
            return lambda part: (0.5, 0.5)
        return self.around.of_class(self.run, self.probe, self.members(label), label)

    def finding(self, label: int, split: Split, pixels: bool = False) -> Finding:
        """A split of a class, the part of more kinds as the upper one."""
        upper, lower = self.kinds(label, split.upper), self.kinds(label, ~split.upper)
        split = split if upper >= lower else split.turned()
        most, more = max(upper, lower), over(max(upper, lower), min(upper, lower))
        members, left = self.members(label), self.left(label)
        return Finding(label, members, split, diversity=most, variety=more, left=left, pixels=pixels)

    def left(self, label: int) -> float:
        """The share of a class that a suspected part must leave: of one that is crowded, as if it were not."""
        typical = float(np.median(self.sizes[self.sizes > 0]))
        return LEFT * min(1.0, CROWDED * typical / float(self.sizes[label]))

    def members(self, label: int) -> np.ndarray:
        """The readable samples (n,) of a class."""
        return np.flatnonzero(self.run.store.labels == label)

    @cached_property
    def witness(self) -> Witness:
        """The probe's say on mean differences."""
        return witness_of(self.run, self.probe, self.images[0])

    @cached_property
    def undone(self) -> Undone:
        """The probe's eye for images that a change has made others of."""
        return Undone(self.run, self.probe, self.whitening, self.sizes)

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels (M,) of the readable samples."""
        return self.run.store.labels[self.run.store.readable]

    @cached_property
    def believed(self) -> np.ndarray:
        """The probability (M,) that the probe gives to the label of each readable sample."""
        given = torch.from_numpy(self.labels)[:, None]
        some = zip(torch.from_numpy(self.answers).split(FITTED), given.split(FITTED), strict=True)
        return torch.cat([answers.softmax(1).gather(1, labels)[:, 0] for answers, labels in some]).numpy()

    @cached_property
    def disbelieved(self) -> np.ndarray:
        """The share (K,) of each class's labels that it hardly believes."""
        return np.bincount(self.labels[self.believed < HARDLY], minlength=len(self.sizes)) / np.maximum(1, self.sizes)

    def firmness(self, label: int, part: np.ndarray) -> float:
        """The mean probability that the probe gives to the label of a part (n,) of its class, relative to the rest."""
        given = self.believed[self.labels == label]
        return float(given[part].mean() / max(given[~part].mean(), 1e-6))

    def disbelief(self, label: int) -> float:
        """The share of a class's labels that the probe hardly believes, relative to that of the other classes."""
        others = self.disbelieved[(self.sizes > 0) & (np.arange(len(self.sizes)) != label)]
        return float(self.disbelieved[label] / max(np.median(others), LEAST_DISBELIEF)) if len(others) else 1.0

    def kinds(self, label: int, part: np.ndarray) -> float:
        """The diversity of a part (n,) of a class."""
        return kinds_of(self.answers[self.labels == label][part], label, self.sizes, self.run.seed)


def witness_of(run: Run, probe: Probe | Trained, images: np.ndarray) -> Witness:
    """The labels that a probe gives to unit images (B, C, H, W)."""

    def predict(pixels: np.ndarray) -> np.ndarray:
        probe.eval()
        with torch.no_grad(), autocast(run.device):
            batch = torch.from_numpy(pixels).to(run.device).contiguous(memory_format=torch.channels_last)
            return probe(batch).argmax(1).cpu().numpy()

    return Witness(predict, images)


def _seen(run: Run, probe: Probe | Trained, looks: Sequence[Look], index: np.ndarray) -> list[np.ndarray]:
    """The probe's logits (n, K) and features (n, D) of samples (n,), and what each look gives (n, P): in one pass."""
    images = run.store.batch(index[:1])
    ends = np.cumsum([probe.num_classes, *(look(images).shape[1] for look in looks)])

    def everything(images: torch.Tensor) -> torch.Tensor:
        answers, features = probe.logits_and_features(images)
        return torch.cat([answers.float(), *(look(images) for look in looks), features.float()], 1)

    answers, *seen, features = np.split(outputs(everything, probe, run.store, index, run.processes), ends, axis=1)
    return [answers, features, *seen]


def over(part: float, rest: float) -> float:
    """The diversity of a part over that of the rest; 1 where there are too few classes for kinds."""
    return part / rest if rest else 1.0


def _few(findings: list[Finding], settings: Settings) -> list[Finding]:
    """Of the splits of one class, widest gap first: those that get a closer look, or else the first one."""
    chosen = [f for f in findings if f.is_candidate(settings)]
    usual = [f for f in chosen if f.diversity < settings.diverse_candidate][:MOST]
    diverse = [f for f in chosen if f.diversity >= settings.diverse_candidate][:MOST]
    return sorted([*usual, *diverse], key=lambda f: -f.split.gap) or findings[:1]


def _with_pixels(found: list[Finding], seen: list[Finding], settings: Settings) -> list[Finding]:
    """The splits of a class, with the clearest one of a look at its images.

    Of two that cut the class alike the one with the wider gap counts.
    """
    apart = next((finding for finding in seen if finding.is_apart(settings)), None)
    if apart is None:
        return found
    alike = [f for f in found if f.is_candidate(settings) and not f.split.differs_from(apart.split)]
    if any(f.split.gap >= apart.split.gap for f in alike):
        return found
    return sorted([apart, *(f for f in found if f not in alike)], key=lambda f: -f.split.gap)
