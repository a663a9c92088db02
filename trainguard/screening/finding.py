r"""What is known of one class and its suspected part; what that makes of it, `case` says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainguard.screening import bars
from trainguard.screening.case import Case
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings


@dataclass(frozen=True, eq=False)
class Finding:
    """What is known of one class and its suspected part.

    Attributes:
        label: the class.
        members: (n,) int64, its samples.
        split: in two; the upper part is the suspected one.
        transfer: share of other classes' images that the suspected part's mean difference moves into the class, for the
            probe that learned everything; of a part with `undoing`, that the change itself moves.
        agreement: share of the suspected part that the purified probe, trained without it, puts into the class.
        reference: the same share for samples of the trusted part that were held out likewise.
        company: share of the suspected part's nearest neighbours, in the purified probe's features, that have its
            label, relative to the same share for held-out trusted samples. Poisoned images mix with those of their
            true class; a natural group keeps to itself, wherever the probe puts it.
        trigger: share of other classes' images that the mean difference moves into the class for the probe that learned
            everything, while the purified one still sees what they are, see `identification.triggers`.
        at_source: the same share of images of the one class that the purified probe takes most of the part for: a
            source-specific trigger works on no others. 0 where there is no such class.
        diversity: how many kinds of images the suspected part is made of, for the probe that learned everything, see
            `identification.diversity`.
        variety: that over the same of the rest of the class, which resembles as much throughout if it is natural.
        scatter: how many kinds of images the purified probe takes the suspected part for, likewise. Poison that looks
            alike (changed colours) keeps company with itself, and is scattered over its true classes even so.
        firmness: mean probability that the probe that learned everything gives to the suspected part's label, relative
            to the rest of the class: a trigger is learned, wrong labels and hard images are not.
        disbelief: how many labels of the class that probe does not believe, relative to the other classes: wrong labels
            are everywhere, a trigger that is not learned yet is not.
        likeness: what the suspected part's images have in common against the rest of the class over how they differ
            among themselves, see `identification.Trial`: a trigger is on images of all kinds, a track of traffic signs
            is one image with little change.
        line: (D,) of length 1, the way from the class's larger part to its smaller one in the first probe's features.
        kinship: cosine of that way, towards the suspected part, and the one that the suspected parts of several classes
            share that count as poisoned for other reasons: a trigger that serves many targets is one direction in all.
        resemblance: how much more the suspected part resembles its label than other classes' samples do, for the
            purified probe, see `resemblance.resemblance`: hard images have something of their class, poison has not.
        skill: the purified probe's accuracy on samples that were held out, 0 for chance and 1 for all right. What it
            learned from a few hundred images says little of a natural group that was left out.
        told: how well fine detail tells the two parts, see `surroundings.Bearings`.
        elsewhere: the share of other classes' samples whose fine detail lies on the suspected part's side: a trigger is
            in none of them.
        beside: another part of the class counts as poisoned: one trigger may be several pictures, and a purified probe
            that has learned some of them finds their class in the others.
        proven: how strongly the labels of its parts contradict their images, where they were drawn as one since.
        finished: that probe is a finished model, which has had the time to learn whatever trigger there is.
        pixels: the class was parted by what its pixels show, which wrong labels do not, not by what that probe sees.
        left: share of the class that a suspected part must leave, less where the class is crowded.
        undoing: the change that the suspected part seems to have had, where there is one, see `undoing`.
        restored: how much surer the purified probe is of the suspected part once that change is undone.
        informed: the purified probe knows samples that it has not seen better than by chance, so that its word counts.
    """

    label: int
    members: NDArray[np.int64]
    split: Split
    transfer: float = 0.0
    agreement: float = 1.0
    reference: float = 1.0
    company: float = 1.0
    trigger: float = 0.0
    diversity: float = 0.0
    variety: float = 1.0
    scatter: float = 0.0
    firmness: float = 1.0
    disbelief: float = 1.0
    likeness: float = 0.0
    at_source: float = 0.0
    line: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    kinship: float = 0.0
    resemblance: float = 0.0
    skill: float = 1.0
    told: float = 0.5
    elsewhere: float = 0.5
    beside: bool = False
    proven: float = 0.0
    finished: bool = False
    pixels: bool = False
    informed: bool = True
    left: float = bars.LEFT
    undoing: str = ""
    restored: float = 0.0

    def is_candidate(self, settings: Settings) -> bool:
        """True where the two parts lie far enough apart for a closer look; less far where one holds all kinds."""
        if self.proven or self.undoing:
            return True  # it has had that look
        varied = self.diversity >= bars.MANY_KINDS and self.variety >= bars.MORE_KINDS
        kinds = (varied or self.diversity >= settings.diverse_candidate) and self.portion <= 0.5
        shallow = bars.SHALLOW if varied else settings.diverse_valley
        near = self.split.distance >= settings.diverse_distance and self.split.valley <= shallow
        known = not self.finished or self.firmness >= bars.HELD
        return known and (self.is_apart(settings) or (kinds and near))

    def is_apart(self, settings: Settings) -> bool:
        """True where the gap alone is wide enough."""
        return self.split.distance >= settings.candidate_distance and self.split.valley <= settings.candidate_valley

    @property
    def is_far_apart(self) -> bool:
        """True where hardly a sample lies between the parts."""
        return self.split.distance >= bars.VERY_FAR and self.split.valley <= bars.DEEP

    @property
    def is_quite_apart(self) -> bool:
        """True where few samples lie between the parts."""
        return self.split.distance >= bars.FAR and self.split.valley <= bars.HOLLOW

    def is_foreign(self, settings: Settings) -> bool:
        """True where the parts lie apart and the purified probe does not give the suspected one its label."""
        return self.is_apart(settings) and self.relative_agreement < settings.conflict

    @property
    def way(self) -> NDArray[np.float64]:
        """(D,) `line`, towards the suspected part."""
        return self.line if self.portion <= 0.5 else -self.line

    @property
    def portion(self) -> float:
        """The share of the class that is suspected."""
        return float(self.split.upper.mean())

    @property
    def suspected(self) -> NDArray[np.int64]:
        """The samples of the upper part."""
        return self.members[self.split.upper]

    @property
    def doubtful(self) -> NDArray[np.bool_]:
        """(n,) True for members that may belong to the suspected part: nothing is learned from them about it."""
        return self.split.probability > bars.DOUBTFUL

    @property
    def relative_agreement(self) -> float:
        """`agreement` over `reference`: near 1 for a natural group, near 0 for images that carry a foreign label.

        1 where the purified probe does not know the class at all, and so cannot contradict a label.
        """
        return self.agreement / self.reference if self.reference >= bars.KNOWN else 1.0

    def contradicts(self, settings: Settings) -> bool:
        """True where the suspected part's labels contradict its images."""
        return Case(self, settings).contradiction > 0.5

    def may_be_turned(self, settings: Settings) -> bool:
        """True where the other part may be the poison: the two lie far apart, and neither knows the other.

        Or where a probe that learned the class from the other part knows nothing of it, or far less than of this one:
        what is of all kinds of images cannot be learned. Not where it is the suspected one that is like nothing else.
        """
        if self.is_alone(settings) or self.undoing:
            return False
        strange = self.is_foreign(settings) or (self.is_apart(settings) and self.reference < bars.KNOWN)
        known = min(self.relative_agreement, self.company) >= bars.BETTER_KNOWN  # than what that probe learned from
        strange |= known and self.is_odd and self.is_far_apart  # fine detail alone may have told the sides
        other = self.turned()
        left = int((~other.doubtful).sum()) >= max(bars.LEAST_TRUSTED, self.left * len(self.members))
        return self.is_quite_apart and strange and left and other.is_candidate(settings)

    def tells_sides(self, settings: Settings) -> bool:
        """True where what speaks for poison could not be said of the rest of the class, were the other part the poison.

        Then a probe that learned the class from its poison alone would put the rest wherever it resembles: into some
        classes, with some company of its own. It would not hold all kinds of images, nor be a trigger for others.
        """
        kinds = self.diversity >= settings.diverse or self.scatter >= settings.scatter
        trigger = self.trigger >= settings.transfer_of_foreign or self.at_source >= bars.TRIGGER_AT_SOURCE
        return kinds or trigger or self.company < settings.diverse_company

    def turned(self) -> Finding:
        """The other part suspected, of which no more is known than that it is as far away."""
        return dataclasses.replace(
            self,
            split=self.split.turned(),
            diversity=0.0,
            firmness=1 / max(self.firmness, 1e-6),
            elsewhere=1 - self.elsewhere,
        )

    def strength(self, settings: Settings) -> float:
        """How strongly the evidence speaks for poison, in [0, 1]; above 0.5 counts as poisoned; see `case`."""
        return Case(self, settings).strength if self.is_candidate(settings) else 0.0

    @property
    def is_common(self) -> bool:
        """True where fine detail tells a part that keeps to itself, and most other classes' images lie with it.

        Then what tells it is no trigger, which is in none of them, and its mean difference is what the class's other
        part has: of a class of two things the one that resembles the other classes more. Poison under a foreign label
        is made of other classes' images, and they may lie with it; but then it does not keep to itself.
        """
        return self.told >= bars.TOLD_COMMON and self.elsewhere >= bars.COMMON and self.company > bars.OWN_COMPANY

    @property
    def lies_with_all(self) -> bool:
        """True where fine detail tells the parts, and other classes' images all lie with this one.

        It may be poison, in a class whose own images have a source of their own; or the other part is, and this one is
        all that the class has.
        """
        return self.told >= bars.TOLD and self.elsewhere >= 1 - bars.NOWHERE

    @property
    def is_odd(self) -> bool:
        """True where fine detail tells the parts, and other classes' images all lie with the other one.

        Parts whose means differ much may be so because the one is of the class and the other of other classes: then it
        is the poison that others lie with.
        """
        return self.told >= bars.TOLD and self.elsewhere <= bars.NOWHERE and self.likeness <= bars.NO_SCENE

    def is_alone(self, settings: Settings) -> bool:
        """True where fine detail that nothing else has sets the suspected part apart."""
        return Case(self, settings).solitude > 0.5
