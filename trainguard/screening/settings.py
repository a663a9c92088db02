r"""The screening's settings: one set for all attacks, and the paper's variant beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal


@dataclass(frozen=True)
class Settings:
    r"""Everything that decides what is flagged. Lengths are shares of what screening may spend.

    Attributes:
        variant: `"separation"`: trainguard's own; `"paper"`: AdvrBD as published.
        default_epochs: length of the protected run where the caller names no `epochs`.
        warmup_share: of them for the probe that learns everything, the trigger included. Measured: at 8 of 15 epochs on
            10,000 images the trigger separates inside its class for every attack of the drill.
        warmup_shift: random translation of its images, as a share of their side. Smaller than `shift`: a trigger lies
            in its place, and is learned sooner; without any, single images are learned by heart. It grows to `shift`
            where passes are many.
        relearn_share: of them for the purified probe, trained without what is suspected.
        shift: random translation of its images: it should know what they show.
        least_steps: gradient steps that a probe takes whatever the budget: small data sets cost little.
        least_seen: images that a probe sees likewise, the repeated ones counted again; 400 steps of 128. Measured: on
            3,000 images a probe that has seen 27,000 believes so little that clean classes are called poisoned.
        least_epochs: passes that are enough for `least_seen`, however small the data set.
        most_steps: steps that are enough for a probe however large the data set is, unless two epochs are more.
        batch_size: of the probes; smaller on data sets of under about 4,400 images.
        patch_side: side of Eq. 3's patch as a share of the image's side: half, measured best of 8, 16 and 32 pixels.
        eps: radius of Eq. 3's perturbation in unit pixels: 8/255, measured best of 4, 8, 16 and 32.
        attack_steps: gradient steps of Eq. 3; one, because a scoring pass should cost about an epoch.
        least_members: samples below which a class is not looked into.
        candidate_distance: Ashman's D from which a class's two parts are worth a closer look.
        candidate_valley: density between the parts, relative to the lower of the two peaks, up to which likewise.
        conflict: agreement of the purified probe with the suspected part's labels, relative to the rest of the class,
            under which those labels contradict the images (poisoned labels).
        company: share of the suspected samples' nearest neighbours, for the purified probe, that have their label,
            relative to the rest of the class, above which they are a natural group that keeps to itself.
        diverse: diversity (see `identification.diversity`) from which a part holds all kinds of images, and so is no
            natural group, whatever company it keeps.
        scatter: diversity of the purified probe's answers to a part from which likewise; birds have come up to 0.67.
        scatter_of_far: the same where hardly a sample lies between the two parts; a tenth more where a part keeps to
            itself: tracks of signs have come up to 0.60.
        diverse_candidate: diversity from which a part of at most half of a class needs only the next two in the place
            of `candidate_distance` and `candidate_valley`, and `diverse_company` in the place of `company`.
        diverse_distance: Ashman's D from which such a part is worth a closer look.
        diverse_valley: density between the parts up to which likewise.
        diverse_company: company under which its labels contradict the images; classes that resemble everything (birds)
            have come down to 0.45, poison up to 0.15.
        transfer: share of other classes' images that the parts' mean difference moves into the class while the purified
            probe still sees what they are, from which it acts as a trigger (clean-label attacks had 0.28 and more where
            nothing else spoke for them, the copies of one blood cell 0.17).
        transfer_of_foreign: the same share from which it backs labels that contradict the images: the two together need
            neither a gap nor foreign company, as long as the part does not keep to itself.
        transfer_distance: Ashman's D that a class needs when the transfer is the only evidence: clean-label poison had
            7.8 and more, natural groups whose difference moves 0.3 to 0.7 of other images 5.8 at most.
        transfer_share: largest share of a class that may be called poisoned on the transfer alone: the rest of a class
            differs from a small natural group as that group differs from it.
        learned: the probe's accuracy on the data, relative to chance, below which the verdict is `"undecided"`; half of
            the way from chance to 1 is enough.
        partition_rate: `"paper"` only: share of the data that each iteration of Algorithm 2 moves to D_c.
        iterations: `"paper"` only: of Algorithm 2.
        unlearn_epochs: `"paper"` only: of Eq. 4 in each iteration.
        unlearn_rate: `"paper"` only: learning rate of Eq. 4. ABL's published 5e-4 left 36% of BadNets' clean samples
            learned after four iterations, 0.02 left 21%.
    """

    variant: Literal["separation", "paper"] = "separation"
    default_epochs: float = 24.0
    warmup_share: float = 0.55
    warmup_shift: float = 0.0625
    relearn_share: float = 0.3
    shift: float = 0.125
    least_steps: int = 400
    least_seen: int = 51_200
    least_epochs: int = 16
    most_steps: int = 6000
    batch_size: int = 128
    patch_side: float = 0.5
    eps: float = 8 / 255
    attack_steps: int = 1
    least_members: int = 30
    candidate_distance: float = 2.8
    candidate_valley: float = 0.6
    conflict: float = 0.25
    company: float = 0.5
    diverse: float = 0.82
    scatter: float = 0.78
    scatter_of_far: float = 0.55
    diverse_candidate: float = 0.75
    diverse_distance: float = 2.6
    diverse_valley: float = 0.85
    diverse_company: float = 0.3
    transfer: float = 0.22
    transfer_of_foreign: float = 0.12
    transfer_distance: float = 7.0
    transfer_share: float = 0.6
    learned: float = 2.0
    partition_rate: float = 0.05
    iterations: int = 4
    unlearn_epochs: int = 2
    unlearn_rate: float = 0.02

    @classmethod
    def paper(cls) -> Settings:
        """AdvrBD as published, on the user's architecture; numbers that the text lost were chosen on BadNets."""
        return cls(variant="paper", warmup_share=0.4)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


PRESETS = {"default": Settings(), "paper": Settings.paper()}


def check_preset(preset: str) -> None:
    """Refuse a name that is none of `PRESETS`.

    Raises:
        ValueError: so it is.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")


def check_length(epochs: int | None, budget: float, seed: int, callbacks: Any = ()) -> None:
    """Refuse what no screening can be made with, before anything is read.

    Raises:
        ValueError: one of them is not a number that will do.
    """
    if not (epochs is None or (isinstance(epochs, Real) and 1 <= epochs < float("inf"))):
        raise ValueError(f"expected epochs= of at least 1 epoch, or None, got {epochs!r}")
    if not (isinstance(budget, Real) and 0 < budget < float("inf")):
        raise ValueError(f"expected a budget above 0, got {budget!r}")
    if not (isinstance(seed, Integral) and 0 <= seed < 2**32):
        raise ValueError(f"expected seed= as a whole number from 0 to 2^32 - 1, got {seed!r}")
    check_callbacks(callbacks)


def check_callbacks(callbacks: Any) -> None:
    """Refuse what is no list of callbacks.

    Raises:
        ValueError: so it is.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise ValueError(f"expected a list for callbacks=, got a {type(callbacks).__name__}: write callbacks=[...]")
