r"""What is known of one class and its suspected part, and whether that makes it poison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainguard.screening import bars
from trainguard.screening.bars import like_nothing_else, passes
from trainguard.screening.separation import SAME_WAY, Split
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
        kinds = (varied or self.diversity >= settings.diverse_candidate) and self.split.upper.mean() <= 0.5
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
        return self.line if self.split.upper.mean() <= 0.5 else -self.line

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
        return self._contradiction(settings) > 0.5

    def _contradiction(self, settings: Settings) -> float:
        if self.proven:
            return self.proven
        known = passes(float((~self.split.upper).sum()) - bars.LEARNED_FROM, 5.0)
        if self.undoing:
            return min(known, self._is_undone(settings))
        foreign = min(known, self._foreignness(settings))
        kindless = not (self.diversity or self.scatter or self.is_far_apart or self.is_odd)  # too few classes for kinds
        half = settings.transfer if kindless else settings.transfer_of_foreign
        backed = passes(self.trigger - (bars.SURE_TRIGGER if self.split.upper.mean() > 0.5 else half), 0.05)
        backed = min(backed, passes(bars.OWN_COMPANY - self.company, 0.1), passes(bars.ONE_SCENE - self.likeness, 0.05))
        firm = passes(self.firmness - max(bars.LEARNED, float(self.split.upper.mean())), 0.05)
        kin = passes(self.kinship - SAME_WAY, 0.05)
        # What the first probe has not learned is on all kinds of images, or it is what is hard about the class.
        many = passes(self.scatter - bars.OF_MANY_KINDS, 0.05) if self.scatter else 1.0  # 0 where there are few classes
        learned = max(firm, min(many, passes(self.disbelief - bars.DISBELIEVED, 0.1)), float(self.pixels))
        if self.is_apart(settings):
            # What a probe learned from a few of a class need not keep company with most of it.
            apart = passes(settings.company - self._chance - self.company, 0.1) * float(self.split.upper.mean() <= 0.5)
            apart = min(apart, passes(bars.ONE_LIGHT - self.likeness, 0.05))  # frames, offices by daylight
            if kindless:  # some of what is made of plastic, among other trash
                apart = min(apart, passes(self.trigger - settings.transfer, 0.05))
            kinds = passes(self.diversity - settings.diverse, 0.05)
            scattered = passes(self.scatter - self._asked_scatter(settings), 0.05)
            if not self.is_far_apart:  # a hard group of a rare class scatters too, and is of one kind to who knows it
                scattered = min(scattered, passes(self.diversity - settings.diverse_candidate, 0.05))
            scattered *= not self.is_common  # most seedlings of a kind, the rest of which are younger
            # What a part is taken for moves into it as well; coins under another lamp keep to themselves even so.
            source = min(
                passes(self.at_source - bars.TRIGGER_AT_SOURCE, 0.1),
                passes(bars.COMPANY_AT_SOURCE - self.company, 0.1),
            )
            source *= self.likeness <= bars.ONE_SCENE and not self.is_common
            group = max(apart, kinds, scattered) * (self.is_quite_apart or len(self.suspected) >= bars.FEW)
            return min(foreign, max(min(learned, group), backed, source, kin, self._stamped()))
        # Its kinds alone made it a candidate, and a class that resembles everything has them as well.
        own = min(passes(settings.diverse_company - self.company, 0.1), passes(self.firmness - bars.BELIEVED, 0.05))
        # What both probes take for all kinds, and one has learned, may look alike: other colours, another light.
        varied = min(passes(self.diversity - bars.MANY_KINDS, 0.02), passes(self.variety - bars.MORE_KINDS, 0.1))
        every = max(varied, passes(self.diversity - settings.diverse, 0.05))
        every = min(every, passes(self.scatter - self._asked_scatter(settings), 0.05))
        every = min(every, firm, self._wholly_foreign(settings))
        return min(foreign, max(min(learned, own), every, backed, kin))

    def _stamped(self) -> float:
        """How sure it is that something was put on all of the part, whatever else its images have in common.

        Where there are few classes, images of one kind, or more poison in a class than images of its own, poison keeps
        company, and the parts' mean difference is much of what the classes look like, too. But what was put on all of
        it is in no other class, and moves nearly all of their images; most of a crowded class need not move as many.
        """
        odd = self.told >= bars.TOLD and self.elsewhere <= bars.NOWHERE and len(self.suspected) >= bars.MANY
        asked = bars.MOVED_BY_MOST if self.split.upper.mean() > 0.5 else bars.MOVED
        return passes(self.transfer - asked, 0.1) * float(odd and self.is_far_apart)

    def _is_undone(self, settings: Settings) -> float:
        """How sure it is that a change has made the part: its labels are disowned, and it is seen better undone."""
        half = min(
            passes(bars.HALF_DISOWNED - self.relative_agreement, 0.05),
            passes(self.scatter - settings.scatter, 0.05),
            passes(self.restored - bars.MUCH_RESTORED, 0.05),
        )
        disowned = max(half, passes(settings.conflict - self.relative_agreement, 0.05))
        return min(disowned, passes(self.restored - bars.RESTORED, 0.02))

    def _foreignness(self, settings: Settings) -> float:
        """How sure it is that the suspected part does not belong to its class, as far as the purified probe may say."""
        disowned = passes(self._asked_conflict(settings) - self.relative_agreement, 0.05)
        every, skilled = self._is_of_every_kind(settings), self.skill >= bars.SKILLED
        far_or_sure = self.is_far_apart or every or self._is_surely_a_trigger
        asked = bars.STRANGE_FAR if far_or_sure else bars.STRANGE
        asked = bars.STRANGE_BOTH if self.is_far_apart and every and skilled else asked
        strange = passes(asked - self.resemblance, 0.05)
        if self.beside and like_nothing_else(self.told, self.elsewhere):
            strange = 1.0  # images that are hard for their class are in no such part
        if skilled:
            return min(disowned, strange)
        far = passes(self.split.gap - bars.GAP_OF_UNSKILLED * (bars.SKILLED - self.skill), 0.25)
        if every:  # nor need those lie far apart that are as foreign as any others must be
            far = max(far, self._wholly_foreign(settings))
        return min(disowned, strange, far)

    def _wholly_foreign(self, settings: Settings) -> float:
        """How sure it is that the part is as foreign as any must be, by the strictest bars."""
        return min(
            passes(settings.conflict - self.relative_agreement, 0.05),
            passes(bars.STRANGE - self.resemblance, 0.05),
        )

    def _asked_conflict(self, settings: Settings) -> float:
        """The relative agreement up to which the labels of a part are foreign to the purified probe.

        Where a class holds several triggers that look alike, a probe without one of them has learned the others; and a
        picture that is blended in may itself look like the class.
        """
        utterly = self.scatter >= settings.scatter and self.is_far_apart and self.split.gap >= bars.UTTERLY_FAR
        sure = utterly or self._is_of_every_kind(settings) or self._is_surely_a_trigger or self._stamped() > 0.5
        return bars.EVERY_KIND if sure else settings.conflict

    def _is_of_every_kind(self, settings: Settings) -> bool:
        """True where both probes take the part for images of all kinds, which few natural parts are made of."""
        return self.diversity >= settings.diverse and self.scatter >= settings.scatter

    @property
    def _is_surely_a_trigger(self) -> bool:
        """True where the difference moves so many images that its source may resemble the target."""
        alike = self.company > bars.OWN_COMPANY or self.likeness > bars.ONE_SCENE
        return self.trigger >= bars.SURE_TRIGGER and self.is_quite_apart and not alike

    def _half_foreign(self, settings: Settings) -> float:
        """How sure it is that the part is disowned enough for a sure trigger to need no gap.

        Two natural groups of one class, as faces in colour and grey ones, differ by what moves many images of other
        classes too: but they are of their own kind, or keep to themselves.
        """
        return min(
            passes(self.trigger - bars.SURE_TRIGGER, 0.1),
            passes(bars.EVERY_KIND - self.relative_agreement, 0.05),
            passes(settings.company - self.company, 0.1),
            passes(bars.ONE_SCENE - self.likeness, 0.05),
        )

    def _asked_trigger(self, settings: Settings) -> float:
        """The trigger that is evidence by itself: more where the purified probe knows few of the images it moves."""
        return settings.transfer + self._unskilled * (bars.SURE_TRIGGER - settings.transfer)

    @property
    def _unskilled(self) -> float:
        """How little the purified probe knows of samples that it has not seen, in [0, 1]."""
        return float(np.clip((bars.SKILLED - self.skill) / bars.UNSKILLED, 0, 1))

    def _asked_scatter(self, settings: Settings) -> float:
        """The scatter from which a part is poison by that alone.

        More of few samples, and of a part that keeps to itself: a probe that knows little, of a hundred classes, puts
        such a natural group anywhere.
        """
        bar = settings.scatter
        if self.is_far_apart:
            bar = settings.scatter_of_far
            if self.company > bars.TOGETHER:
                bar += max(bars.STRAYS, self._unskilled * (settings.scatter - bar))
        return bar + self._chance

    @property
    def _chance(self) -> float:
        """What a figure of the suspected part may be off by chance."""
        return bars.CHANCE / float(np.sqrt(max(1, len(self.suspected))))

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
        """How strongly the evidence speaks for poison, in [0, 1]; above 0.5 counts as poisoned.

        Three kinds of evidence count, each in how far it passes its bar: labels that contradict the images (poisoned
        labels), a mean difference that works as a trigger on other images (clean-label attacks), and fine detail that
        sets a part of the class far apart and that no other class's images have (clean-label attacks whose trigger
        follows each image, or its place). Where the labels contradict the images, a difference that half works as a
        trigger is enough to believe it.
        """
        if not self.is_candidate(settings):
            return 0.0
        far = passes(self.split.distance - settings.transfer_distance, 0.5)
        minor = float(self.split.upper.mean() <= settings.transfer_share)
        own_kind = self.reference >= bars.KNOWN and self.relative_agreement >= bars.OWN_KIND
        if self.is_common:
            return self._contradiction(settings)
        scene = self.likeness > bars.FRAMES
        asked = (self._asked_trigger(settings), bars.SURE_TRIGGER, bars.TRIGGER_OF_SCENE)[own_kind + scene]
        trigger = minor * min(passes(self.trigger - asked, 0.1), max(far, self._half_foreign(settings)))
        return max(self._contradiction(settings), trigger, self._solitude(settings))

    @property
    def is_common(self) -> bool:
        """True where fine detail tells a part that keeps to itself, and most other classes' images lie with it.

        Then what tells it is no trigger, which is in none of them, and its mean difference is what the class's other
        part has: of a class of two things the one that resembles the other classes more. Poison under a foreign label
        is made of other classes' images, and they may lie with it; but then it does not keep to itself.
        """
        return self.told >= bars.TOLD_COMMON and self.elsewhere >= bars.COMMON and self.company > bars.OWN_COMPANY

    @property
    def is_odd(self) -> bool:
        """True where fine detail tells the parts, and other classes' images all lie with the other one.

        Parts whose means differ much may be so because the one is of the class and the other of other classes: then it
        is the poison that others lie with.
        """
        return self.told >= bars.TOLD and self.elsewhere <= bars.NOWHERE and self.likeness <= bars.NO_SCENE

    def is_alone(self, settings: Settings) -> bool:
        """True where fine detail that nothing else has sets the suspected part apart."""
        return self._solitude(settings) > 0.5

    def _solitude(self, settings: Settings) -> float:
        if (
            self.split.valley > bars.DEEP
            or len(self.suspected) < bars.MANY
            or self.split.upper.mean() > settings.transfer_share
        ):
            return 0.0
        odd = min(passes(self.told - bars.TOLD, 0.02), passes(bars.NOWHERE - self.elsewhere, 0.01))
        half = min(
            passes(self.trigger - settings.transfer_of_foreign, 0.05), passes(bars.ONE_SCENE - self.likeness, 0.05)
        )
        no_scene = max(passes(bars.NO_SCENE - self.likeness, 0.01), half)
        far = bars.ALONE_BESIDE if self.beside else bars.ALONE
        return min(odd, passes(self.split.distance - far, 0.5), no_scene)
