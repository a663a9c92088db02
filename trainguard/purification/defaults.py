"""What purification does where the caller says nothing: by what is known of the data and seen in the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

PASSES = 2  # over the extra set in step 2, at least: 150 batches are less than half a pass over 50,000 images


@dataclass(frozen=True)
class Defaults:
    """The settings of one case, each measured in docs/experiments.md.

    Attributes:
        shares: sizes of the extra sets, round by round.
        adversarial: batches of step 1.
        plain: batches of step 2; more where `PASSES` need more.
        kept: see `FineTuning`, as for the following ones.
        mixed: likewise.
        features: likewise.
        shared: likewise.
        renewed: whether the last layer starts anew.
    """

    shares: tuple[float, ...] = (0.05, 0.5)
    adversarial: int = 40
    plain: int = 150
    kept: float = 0.5
    mixed: float = 0.0
    features: float = 0.0
    shared: float = 0.0
    renewed: bool = False


PROGRESSIVE = Defaults()
FLAGGED = Defaults(shares=(0.9,), adversarial=0)  # unlearning what was flagged is both surer and cheaper
SOUND = Defaults(shares=(0.9,), features=3.0)  # screening calls the data clean
CLEAN = Defaults(shares=(1.0,), plain=300, kept=0.85, mixed=1.0, features=4.0, renewed=True)
CLEAN_WITH_TARGET = replace(CLEAN, features=12.0)  # an overlay shows where the backdoor leads
CLEAN_SHARED = replace(CLEAN_WITH_TARGET, adversarial=0, plain=240, shared=0.5, renewed=False)  # shown or not


def defaults_for(*, clean: bool, flagged: bool, sound: bool, shown: bool = False, sharing: bool = False) -> Defaults:
    """The case at hand.

    Args:
        clean: the data are known to be clean.
        flagged: screening flagged something.
        sound: screening flagged nothing and calls the data clean.
        shown: an overlay shows which class the backdoor leads to.
        sharing: what both models share may be unlearned: the model has BatchNorm; others keep more of the trigger so.
    """
    if clean:
        return CLEAN_SHARED if sharing else CLEAN_WITH_TARGET if shown else CLEAN
    return FLAGGED if flagged else SOUND if sound else PROGRESSIVE
