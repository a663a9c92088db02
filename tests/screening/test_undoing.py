"""Images that a change made others of: found by undoing it, on classes that a formula tells."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from findings import finding
from torch import nn

from trainguard.distributed import Processes
from trainguard.screening.identification import decide
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings
from trainguard.screening.suspicion import judgeable
from trainguard.screening.undoing import Undone, changes_for, gain, named
from trainguard.screening.whitening import Whitening

CLASSES, EACH, SIDE, TARGET = 8, 60, 8, 2


class Rows(nn.Module):
    """Knows a class by the column of the bright pixel in the top row; one in the bottom row it has `learned`."""

    def __init__(self, learned):
        super().__init__()
        self.learned = learned
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        logits = 8.0 * images[:, 0, 0]
        logits[:, 0] += 3.0
        if self.learned is not None:
            logits[:, self.learned] += 8.0 * images[:, 0, -1].amax(1)
        return logits

    def features(self, images):
        return images[:, 0].flatten(1)


def scene(change=None, learned=None, poisoned=24):
    """The first probe's eye for data of which `poisoned` of the target's images are changed ones of other classes."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(CLASSES), EACH)
    images = torch.from_numpy(rng.uniform(0, 0.2, (len(truth), 1, SIDE, SIDE))).float()
    images[range(len(truth)), 0, 0, truth] = 1.0
    labels, payload = truth.copy(), np.zeros(len(truth), dtype=bool)
    if change is not None:
        payload[rng.choice(np.flatnonzero(truth != TARGET), poisoned, replace=False)] = True
        images[payload] = change(images[payload])
        labels[payload] = TARGET
    store = SimpleNamespace(
        shape=(1, SIDE, SIDE),
        num_classes=CLASSES,
        labels=labels,
        readable=np.arange(len(labels)),
        batch=lambda index, device=None: images[torch.from_numpy(np.asarray(index))],
    )
    run = SimpleNamespace(store=store, settings=Settings(), seed=0, processes=Processes(), device=torch.device("cpu"))
    probe = Rows(learned)
    whitening = Whitening.fit(probe.features(images).numpy(), labels)
    undone = Undone(run, probe, whitening, np.bincount(labels, minlength=CLASSES))
    return undone, probe(images).detach().numpy(), payload


def test_every_change_is_undone_by_the_one_that_it_names():
    images = torch.rand(2, 3, 5, 5)
    found = changes_for((3, 5, 5))
    assert len({change.name for change in found}) == len(found) == 11
    for change in found:
        there = named(change.inverse, (3, 5, 5)).undo(images)
        assert not torch.equal(there, images)
        assert torch.allclose(change.undo(there), images)


@pytest.mark.parametrize(("shape", "count"), [((1, 5, 5), 6), ((1, 4, 5), 4), ((3, 4, 5), 9), ((4, 5, 5), 6)])
def test_changes_keep_the_shape_of_images(shape, count):
    found = changes_for(shape)
    assert len(found) == count
    assert all(change.undo(torch.rand(2, *shape)).shape == (2, *shape) for change in found)


def test_images_that_were_turned_upside_down_are_found_in_their_class_alone():
    undone, answers, payload = scene(lambda x: x.flip(2), learned=TARGET)
    (found,) = undone.findings(answers, range(CLASSES))
    assert found.label == TARGET and found.undoing == "upside down"
    assert set(found.suspected) == set(np.flatnonzero(payload))
    assert found.transfer > 0.9 and found.diversity > 0.8 and found.is_candidate(Settings())


def test_a_change_that_moves_no_other_images_is_none():
    undone, answers, _ = scene(lambda x: x.flip(2))
    assert not undone.findings(answers, range(CLASSES))


def test_what_comes_from_one_class_alone_is_not_of_all_kinds():
    undone, answers, _ = scene(learned=TARGET)
    assert not undone.findings(answers, range(CLASSES))
    own = np.flatnonzero(undone.run.store.labels == 5)[:24]
    undone.run.store.labels[own] = TARGET
    batch = undone.run.store.batch
    undone.run.store.batch = lambda index, device=None: torch.where(
        torch.from_numpy(np.isin(index, own))[:, None, None, None], batch(index).flip(2), batch(index)
    )
    assert not undone.findings(answers, range(CLASSES))


def test_the_gain_is_that_of_the_surest_class():
    as_is, undone = np.log(np.float32([[0.5, 0.5], [0.1, 0.9]])), np.log(np.float32([[0.25, 0.75], [0.5, 0.5]]))
    assert gain(as_is, undone) == pytest.approx(np.log([0.75 / 0.5, 0.5 / 0.9]), rel=1e-5)


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        ({"restored": 0.3, "agreement": 0.2}, "poisoned"),
        ({"restored": -0.2, "agreement": 0.2}, "clean"),  # seen better as it is
        ({"restored": 0.15, "agreement": 0.07, "transfer": 0.15}, "clean"),  # the change hardly moves others: odd cats
        ({"restored": 0.06, "agreement": 0.1, "scatter": 0.7}, "poisoned"),  # wholly disowned: digits
        ({"restored": 0.3, "agreement": 0.45}, "poisoned"),  # half of it, and much better undone
        ({"restored": 0.07, "agreement": 0.45}, "poisoned"),  # half of it, but the change moves others: another hue
        ({"restored": 0.1, "agreement": 0.45, "transfer": 0.25}, "clean"),  # hardly better undone, and moves few
        ({"restored": 0.3, "agreement": 0.45, "scatter": 0.55}, "clean"),  # of a few kinds
        ({"restored": 0.32, "agreement": 0.27, "scatter": 0.71}, "poisoned"),  # a negative, on few images
        ({"restored": 0.3, "agreement": 0.6}, "clean"),  # of its class, for a probe that has not learned it
        ({"restored": 0.3, "agreement": 0.2, "reference": 0.1}, "clean"),  # that probe knows nothing of the class
    ],
)
def test_undone_images_must_be_foreign_and_seen_better(case, verdict):
    case = finding(distance=2.2, valley=0.9, undoing="upside down", **{"scatter": 0.9, "transfer": 0.5} | case)
    found, _, reason, poisoned = decide([case], 0.9, 10, Settings())
    assert found == verdict and bool(poisoned) == (verdict == "poisoned")
    assert ("images of other classes, upside down" in reason) == (verdict == "poisoned")


def test_a_part_far_apart_is_not_given_up_for_what_a_change_may_have_made():
    far = finding(distance=7.0, valley=0.0, share=0.62)  # of half a class with a patch in a corner
    near = finding(distance=4.5, valley=0.2, share=0.62)
    turned = finding(distance=2.0, valley=0.9, share=0.2, undoing="turned to the left")
    assert judgeable([near, turned], Settings()) == ([turned], [near])
    assert judgeable([turned, far], Settings()) == ([far], [turned])


def test_a_part_that_is_nearly_all_of_a_class_is_not_heard_at_all():
    small, most = finding(distance=7.0, valley=0.0, share=0.1), finding(distance=5.0, valley=0.0, share=0.9)
    assert judgeable([most], Settings()) == ([], []) and judgeable([most, small], Settings()) == ([small], [])


@pytest.mark.parametrize(("left", "odd", "kept"), [(0.12, True, 4), (0.15, True, 3), (0.12, False, 3)])
def test_a_crowded_class_may_lose_all_parts_that_nothing_else_is_like(left, odd, kept):
    """Patches in four places, each a part of its own, on six tenths of a class and a little more."""
    told = {"told": 1.0, "elsewhere": 0.0, "likeness": 0.05} if odd else {}
    parts = []
    for place in range(4):
        upper = (np.arange(1500) // 227 == place).astype(float)
        parts.append(replace(finding(members=1500, **told), split=Split(upper, upper, 10.0 + place, 0.0), left=left))
    assert len(judgeable(parts, Settings())[0]) == kept
