r"""Do images resemble their label at all, or no more than any image of the class that they seem to belong to?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_COMPARED = 3  # samples of a class that others may be compared with
LEAST_TOLD = 0.1  # of what the probe tells a class by, above chance: below it differences are noise
SPREAD = 12**-0.5  # standard deviation of a place among samples of the same kind

Array = NDArray[np.floating]


def resemblance(part: Array, held: Array, labels: NDArray[np.int64], label: int) -> float:
    """How much more a part resembles its label than other classes' samples do, as far as its size lets one say.

    A hard image of a class still has something of it, however sure a probe is that it shows something else; an image
    of another class under a poisoned label has no more of it than others of that other class. So each sample is put
    among held-out samples of the class that the probe takes it for, by the logit of its label less the best other one.

    Args:
        part: (n, K) logits of the part, of a probe that learned from none of these samples.
        held: (m, K) logits of samples that were held out, the class's own among them.
        labels: (m,) their labels.
        label: the part's.

    Returns:
        0 where the part lies among other classes' samples as these do themselves, 1 where it lies as held-out samples
        of its label do; one standard error of it added. 0 where there is nothing to compare with.
    """
    others = labels != label
    own, strange = held[~others], (*margins(held[others], label), labels[others])
    places, usual = _places(part, label, strange), _places(own, label, strange)
    if not len(places) or not len(usual):
        return 0.0
    above = float(places.mean()) - 0.5 + SPREAD / len(places) ** 0.5
    return above / max(LEAST_TOLD, float(usual.mean()) - 0.5)


def margins(answers: Array, label: int) -> tuple[Array, NDArray[np.int64]]:
    """Of logits (n, K), that of the label less the best other one (n,), and which that is (n,)."""
    others = answers.copy()
    others[:, label] = -np.inf
    return answers[:, label] - others.max(1), others.argmax(1)


def _places(answers: Array, label: int, held: tuple[Array, NDArray[np.int64], NDArray[np.int64]]) -> Array:
    """Where samples lie among those of the class that they are taken for, in [0, 1]; fewer where it has too few."""
    own, taken = margins(answers, label)
    against, _, labels = held
    found = []
    for other in np.unique(taken):
        there, here = np.sort(against[labels == other]), own[taken == other]
        if len(there) >= LEAST_COMPARED:
            below = np.searchsorted(there, here, "left") + np.searchsorted(there, here, "right")
            found.append(below / (2 * len(there)))
    return np.concatenate(found) if found else np.zeros(0)
