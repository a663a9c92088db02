r"""Whether what is known of a class's suspected part makes it poison.

Every figure counts by how far it passes its bar, from 0 to 1 with 0.5 at the bar (`bars.passes`). What must hold
together is as strong as its weakest figure, and of several reasons the strongest one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainguard.screening import bars
from trainguard.screening.bars import like_nothing_else, passes
from trainguard.screening.separation import SAME_WAY
from trainguard.screening.settings import Settings

if TYPE_CHECKING:
    from trainguard.screening.finding import Finding


@dataclass(frozen=True, eq=False)
class Case:
    """The case against a suspected part.

    Attributes:
        part: what is known of it.
        settings: the bars that a preset may move.
    """

    part: Finding
    settings: Settings

    @property
    def strength(self) -> float:
        """How strongly the evidence speaks for poison, in [0, 1]; above 0.5 counts as poisoned.

        Three kinds of evidence count: labels that contradict the images (poisoned labels), a mean difference that works
        as a trigger on other images (clean-label attacks), and fine detail that sets a part of the class far apart and
        that no other class's images have (clean-label attacks whose trigger follows each image, or its place).
        """
        if self.part.is_common:
            return self.contradiction
        return max(self.contradiction, self._works_as_trigger, self.solitude)

    # Labels that contradict the images.

    @property
    def contradiction(self) -> float:
        """How sure it is that the labels of the part contradict its images: foreign ones, and for one reason more."""
        part = self.part
        if part.proven:
            return part.proven
        known = passes(float((~part.split.upper).sum()) - bars.LEARNED_FROM, 5.0)
        if part.undoing:
            return min(known, self._is_undone)
        backed = max(self._is_backed, passes(part.kinship - SAME_WAY, 0.05))
        if part.is_apart(self.settings):
            group = min(self._is_learned, self._is_no_group)
            reason = max(group, backed, self._works_at_source, self._is_stamped)
        else:  # its kinds alone made it a candidate, and a class that resembles everything has them as well
            reason = max(min(self._is_learned, self._keeps_foreign_company), self._is_of_kinds_that_are_learned, backed)
        return min(known, self._is_foreign, reason)

    @property
    def _is_undone(self) -> float:
        """How sure it is that a change has made the part.

        Its labels are disowned, and undoing the change puts its images right, as the change itself moves others into
        the class.
        """
        part, settings = self.part, self.settings
        works = part.restored + part.transfer
        half = min(
            passes(bars.HALF_DISOWNED - part.relative_agreement, 0.05),
            passes(part.scatter - bars.KINDS_UNDONE, 0.05),
            passes(works - bars.WELL_UNDONE, 0.05),
        )
        wholly = passes(settings.conflict - part.relative_agreement, 0.05)
        return max(half, min(wholly, passes(works - bars.UNDONE, 0.05)))

    @property
    def _is_foreign(self) -> float:
        """How sure it is that the suspected part does not belong to its class, as far as the purified probe may say."""
        part = self.part
        disowned = passes(self._asked_conflict - part.relative_agreement, 0.05)
        every, skilled = self._is_of_every_kind, part.skill >= bars.SKILLED
        far_or_sure = part.is_far_apart or every or self._is_surely_a_trigger
        asked = bars.STRANGE_FAR if far_or_sure else bars.STRANGE
        asked = bars.STRANGE_BOTH if part.is_far_apart and every and skilled else asked
        strange = passes(asked - part.resemblance, 0.05)
        if self._moves_as_another or (part.beside and like_nothing_else(part.told, part.elsewhere)):
            strange = 1.0  # images that are hard for their class are in no such part
        if skilled:
            return min(disowned, strange)
        far = passes(part.split.gap - bars.GAP_OF_UNSKILLED * (bars.SKILLED - part.skill), 0.25)
        if every:  # nor need those lie far apart that are as foreign as any others must be
            far = max(far, self._is_wholly_foreign)
        return min(disowned, strange, far)

    @property
    def _moves_as_another(self) -> bool:
        """True where the difference moves nearly all other images, and the part is of all kinds and like none of them.

        Of a part far apart, or of a further part of a class.
        """
        part = self.part
        moves = part.transfer >= bars.MOVED and part.elsewhere <= bars.NOWHERE
        return moves and part.scatter >= self.settings.scatter and (part.beside or part.is_far_apart)

    @property
    def _is_wholly_foreign(self) -> float:
        """How sure it is that the part is as foreign as any must be, by the strictest bars."""
        return min(
            passes(self.settings.conflict - self.part.relative_agreement, 0.05),
            passes(bars.STRANGE - self.part.resemblance, 0.05),
        )

    @property
    def _asked_conflict(self) -> float:
        """The relative agreement up to which the labels of a part are foreign to the purified probe.

        Where a class holds several triggers that look alike, a probe without one of them has learned the others; and a
        picture that is blended in may itself look like the class.
        """
        part, settings = self.part, self.settings
        utterly = part.scatter >= settings.scatter and part.is_far_apart and part.split.gap >= bars.UTTERLY_FAR
        sure = utterly or self._is_of_every_kind or self._is_surely_a_trigger or self._is_stamped > 0.5
        return bars.EVERY_KIND if sure else settings.conflict

    @property
    def _is_of_every_kind(self) -> bool:
        """True where both probes take the part for images of all kinds, which few natural parts are made of."""
        return self.part.diversity >= self.settings.diverse and self.part.scatter >= self.settings.scatter

    @property
    def _is_kindless(self) -> bool:
        """True where there are too few classes for kinds, and nothing else tells the parts."""
        part = self.part
        return not (part.diversity or part.scatter or part.is_far_apart or part.is_odd)

    # Reasons beside it to believe that they do.

    @property
    def _is_learned(self) -> float:
        """How sure it is that the first probe has learned the part, or has had no chance to.

        What it has not learned is on all kinds of images, or it is what is hard about the class.
        """
        part = self.part
        many = passes(part.scatter - bars.OF_MANY_KINDS, 0.05) if part.scatter else 1.0  # 0 where there are few classes
        not_yet = min(many, passes(part.disbelief - bars.DISBELIEVED, 0.1))
        return max(self._is_firm, not_yet, float(part.pixels))

    @property
    def _is_firm(self) -> float:
        """How sure it is that the first probe believes the part's labels."""
        return passes(self.part.firmness - max(bars.LEARNED, self.part.portion), 0.05)

    @property
    def _is_no_group(self) -> float:
        """How sure it is that a part with a gap is no natural group: by its company, or the kinds that it holds."""
        part, settings = self.part, self.settings
        if not part.is_quite_apart and len(part.suspected) < bars.FEW:
            return 0.0
        # What a probe learned from a few of a class need not keep company with most of it.
        alone = passes(settings.company - self._chance - part.company, 0.1) * float(part.portion <= 0.5)
        alone = min(alone, passes(bars.ONE_LIGHT - part.likeness, 0.05))  # frames, offices by daylight
        alone *= not part.lies_with_all  # clean cats, for a probe that has learned what cats are from shaken images
        if self._is_kindless:  # some of what is made of plastic, among other trash
            alone = min(alone, passes(part.trigger - settings.transfer, 0.05))
        scattered = passes(part.scatter - self._asked_scatter, 0.05)
        if not part.is_far_apart:  # a hard group of a rare class scatters too, and is of one kind to who knows it
            scattered = min(scattered, passes(part.diversity - settings.diverse_candidate, 0.05))
        scattered *= not part.is_common  # most seedlings of a kind, the rest of which are younger
        return max(alone, passes(part.diversity - settings.diverse, 0.05), scattered)

    @property
    def _keeps_foreign_company(self) -> float:
        """The same of a part without a gap: hardly any of its company is of its class."""
        part = self.part
        return min(
            passes(self.settings.diverse_company - part.company, 0.1), passes(part.firmness - bars.BELIEVED, 0.05)
        )

    @property
    def _is_of_kinds_that_are_learned(self) -> float:
        """How sure it is that a part without a gap is of all kinds for both probes, and learned by one.

        Such images may look alike even so: other colours, another light.
        """
        part = self.part
        varied = min(passes(part.diversity - bars.MANY_KINDS, 0.02), passes(part.variety - bars.MORE_KINDS, 0.1))
        every = max(varied, passes(part.diversity - self.settings.diverse, 0.05))
        scattered = passes(part.scatter - self._asked_scatter, 0.05)
        return min(every, scattered, self._is_firm, self._is_wholly_foreign)

    @property
    def _is_backed(self) -> float:
        """How sure it is that the parts' mean difference half works as a trigger, which is enough beside the labels."""
        part, settings = self.part, self.settings
        half = settings.transfer if self._is_kindless else settings.transfer_of_foreign
        return min(
            passes(part.trigger - (bars.SURE_TRIGGER if part.portion > 0.5 else half), 0.05),
            passes(bars.OWN_COMPANY - part.company, 0.1),
            passes(bars.ONE_SCENE - part.likeness, 0.05),
        )

    @property
    def _works_at_source(self) -> float:
        """The same on images of one class: what a part is taken for moves into it, and does not keep to itself.

        Coins under another lamp do even so.
        """
        part = self.part
        source = min(
            passes(part.at_source - bars.TRIGGER_AT_SOURCE, 0.1),
            passes(bars.COMPANY_AT_SOURCE - part.company, 0.1),
        )
        return source * float(part.likeness <= bars.ONE_SCENE and not part.is_common)

    @property
    def _is_stamped(self) -> float:
        """How sure it is that something was put on all of the part, whatever else its images have in common.

        Where there are few classes, images of one kind, or more poison in a class than images of its own, poison keeps
        company, and the parts' mean difference is much of what the classes look like, too. But what was put on all of
        it is in no other class, and moves nearly all of their images; most of a crowded class need not move as many.
        """
        part = self.part
        odd = part.told >= bars.TOLD and part.elsewhere <= bars.NOWHERE and len(part.suspected) >= bars.MANY
        asked = bars.MOVED_BY_MOST if part.portion > 0.5 else bars.MOVED
        return passes(part.transfer - asked, 0.1) * float(odd and part.is_far_apart)

    # A mean difference that is a trigger by itself.

    @property
    def _works_as_trigger(self) -> float:
        """How sure it is that the parts' mean difference is a trigger, whatever the labels of the part."""
        part, settings = self.part, self.settings
        far = passes(part.split.distance - settings.transfer_distance, 0.5)
        own_kind = part.reference >= bars.KNOWN and part.relative_agreement >= bars.OWN_KIND
        scene = part.likeness > bars.FRAMES
        asked = (self._asked_trigger, bars.SURE_TRIGGER, bars.TRIGGER_OF_SCENE)[int(own_kind) + int(scene)]
        minor = float(part.portion <= settings.transfer_share)
        return minor * min(passes(part.trigger - asked, 0.1), max(far, self._is_half_foreign))

    @property
    def _is_surely_a_trigger(self) -> bool:
        """True where the difference moves so many images that its source may resemble the target."""
        part = self.part
        alike = part.company > bars.OWN_COMPANY or part.likeness > bars.ONE_SCENE
        return part.trigger >= bars.SURE_TRIGGER and part.is_quite_apart and not alike

    @property
    def _is_half_foreign(self) -> float:
        """How sure it is that the part is disowned enough for a sure trigger to need no gap.

        Two natural groups of one class, as faces in colour and grey ones, differ by what moves many images of other
        classes too: but they are of their own kind, or keep to themselves.
        """
        part = self.part
        return min(
            passes(part.trigger - bars.SURE_TRIGGER, 0.1),
            passes(bars.EVERY_KIND - part.relative_agreement, 0.05),
            passes(self.settings.company - part.company, 0.1),
            passes(bars.ONE_SCENE - part.likeness, 0.05),
        )

    @property
    def _asked_trigger(self) -> float:
        """The trigger that is evidence by itself: more where the purified probe knows few of the images it moves."""
        return self.settings.transfer + self._unskilled * (bars.SURE_TRIGGER - self.settings.transfer)

    @property
    def _unskilled(self) -> float:
        """How little the purified probe knows of samples that it has not seen, in [0, 1]."""
        return float(np.clip((bars.SKILLED - self.part.skill) / bars.UNSKILLED, 0, 1))

    @property
    def _asked_scatter(self) -> float:
        """The scatter from which a part is poison by that alone.

        More of few samples, of a part that may be all that the class has, and of one that keeps to itself: a probe that
        knows little, of a hundred classes, puts such a natural group anywhere.
        """
        bar = self.settings.scatter
        if self.part.is_far_apart and not self.part.lies_with_all:
            bar = self.settings.scatter_of_far
            if self.part.company > bars.TOGETHER:
                bar += max(bars.STRAYS, self._unskilled * (self.settings.scatter - bar))
        return bar + self._chance

    @property
    def _chance(self) -> float:
        """What a figure of the suspected part may be off by chance."""
        return bars.CHANCE / float(np.sqrt(max(1, len(self.part.suspected))))

    # Fine detail that nothing else has.

    @property
    def solitude(self) -> float:
        """How sure it is that fine detail which no other class's images have sets the part far apart."""
        part, settings = self.part, self.settings
        if part.split.valley > bars.DEEP or len(part.suspected) < bars.MANY or part.portion > settings.transfer_share:
            return 0.0
        odd = min(passes(part.told - bars.TOLD, 0.02), passes(bars.NOWHERE - part.elsewhere, 0.01))
        half = min(
            passes(part.trigger - settings.transfer_of_foreign, 0.05), passes(bars.ONE_SCENE - part.likeness, 0.05)
        )
        several = passes(min(part.diversity, part.scatter) - bars.SEVERAL_KINDS, 0.05)  # one scene is of one kind
        unlike = passes(bars.NO_SCENE_BEYOND - part.likeness, 0.05)  # and its images are alike
        strangers = min(unlike, passes(settings.conflict - part.relative_agreement, 0.05))
        moving = min(max(several, strangers), passes(part.transfer - bars.MOVED_BY_MOST, 0.1))
        stamped = passes(part.transfer - bars.MOVED, 0.1)  # by what was put on all of them
        beyond = min(max(unlike, stamped), passes(part.split.distance - bars.BEYOND, 1.0))
        no_scene = max(passes(bars.NO_SCENE - part.likeness, 0.01), half, moving, beyond)
        far = passes(part.split.distance - (bars.ALONE_BESIDE if part.beside else bars.ALONE), 0.5)
        far = max(far, min(several, passes(part.split.distance - bars.ALONE_OF_KINDS, 0.5)))
        return min(odd, far, no_scene)
