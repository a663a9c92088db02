"""The poison of a class drawn as one: from figures of each sample, and from the parts that are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from trainguard.screening import sharpening
from trainguard.screening.finding import Finding
from trainguard.screening.separation import Split, drawn
from trainguard.screening.settings import Settings

SIZE = 600
POISON = np.arange(SIZE) < 150


def finding(part, members=None, label=0, **more):
    """A part of a class, whose labels contradict its images unless told otherwise."""
    members = np.arange(SIZE) if members is None else members
    half = part[members].astype(float)
    known = {"agreement": 0.05, "reference": 0.8, "company": 0.2} | more
    return Finding(label, members, Split(half, half, 6.0, 0.05), likeness=0.1, **known)


def classes(views):
    run = SimpleNamespace(settings=Settings(), seed=0)
    return SimpleNamespace(run=run, members=lambda label: np.arange(SIZE), views_of=lambda members: views)


def unsure(part, label):
    rng = np.random.default_rng(1)
    return rng.normal(size=(SIZE, 3)), rng.random(SIZE)


def sure(part, label):
    """A purified probe that does not believe a poisoned label."""
    answers = np.random.default_rng(2).normal(size=(SIZE, 3))
    answers[:, 0] += np.where(POISON, -6.0, 6.0)
    return answers, np.where(POISON, 0.0, 1.0)


def faint(strength=0.25):
    """Views in which the poison lies apart along many directions, a little along each."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(SIZE, 400)) + np.where(POISON[:, None], strength, 0.0) for _ in range(2)]


def flagged(found):
    mask = np.zeros(SIZE, dtype=bool)
    mask[found.members[found.split.suspicion > 0.5]] = True
    return mask


def test_a_guess_leads_to_the_part_that_the_figures_tell():
    rng = np.random.default_rng(0)
    figures = np.column_stack([4.0 * POISON + rng.normal(size=SIZE), 3.0 * POISON + rng.normal(size=SIZE)])
    guess = POISON & (rng.random(SIZE) < 0.6) | (rng.random(SIZE) < 0.05)
    found = drawn(guess, figures, seed=0)
    assert (found.upper == POISON).mean() > 0.99
    assert np.array_equal(drawn(~guess, figures, seed=0).upper, ~found.upper)
    assert drawn(np.arange(SIZE) < 3, figures, seed=0) is None


def test_parts_of_a_class_are_drawn_as_one_in_all_directions():
    some = [finding(np.arange(SIZE) < 50), finding(np.isin(np.arange(SIZE), range(50, 90)), np.arange(50, SIZE))]
    other = finding(POISON, label=1, company=0.9)
    found, poisoned = sharpening.sharpened(classes(faint()), [*some, other], some, unsure)
    (whole,) = poisoned
    assert found == [whole, other] and len(whole.members) == SIZE
    assert (flagged(whole) != POISON).mean() < 0.02
    _, without = sharpening.sharpened(classes([]), some, some, unsure)
    assert (np.any([flagged(part) for part in without], axis=0) != POISON).mean() > 0.02


def test_what_the_purified_probe_alone_tells_counts_where_it_holds_the_part(monkeypatch):
    starts = []
    monkeypatch.setattr(sharpening, "drawn", lambda part, *rest: starts.append(part) or drawn(part, *rest))
    half = finding(np.arange(SIZE) < 60)
    _, (whole,) = sharpening.sharpened(classes([]), [half], [half], sure)
    assert (flagged(whole) == POISON).mean() > 0.99
    assert (starts[1] == POISON).mean() > 0.99
    starts.clear()
    beside = finding((np.arange(SIZE) >= 120) & (np.arange(SIZE) < 220))  # most of it is in no such part
    sharpening.sharpened(classes([]), [beside], [beside], sure)
    assert np.array_equal(starts[1], flagged(beside))


@pytest.mark.parametrize("distance", [6.0, 1.0])
def test_a_line_drawn_again_is_kept_only_while_it_is_evidence(monkeypatch, distance):
    part = finding(POISON)
    again = Split(part.split.position, part.split.probability, distance, 0.05)
    monkeypatch.setattr(sharpening, "drawn", lambda *_: again)
    _, (poisoned,) = sharpening.sharpened(classes([]), [part], [part], unsure)
    if distance > 2.8:
        assert poisoned.split.position is again.position and poisoned.split.whole
    else:
        assert poisoned.split is part.split


def test_a_class_whose_labels_are_right_keeps_its_line():
    part = finding(POISON, agreement=0.8, company=0.9, trigger=0.9)
    assert sharpening.sharpened(classes(faint()), [part], [part], sure) == ([part], [part])


def test_a_line_that_tells_nothing_leaves_the_parts_as_they_were(monkeypatch):
    monkeypatch.setattr(sharpening, "drawn", lambda *_: None)
    some = [finding(np.arange(SIZE) < 50), finding(np.isin(np.arange(SIZE), range(50, 90)), np.arange(50, SIZE))]
    assert sharpening.sharpened(classes(faint()), some, some, unsure) == (some, some)


def test_a_line_that_makes_most_of_a_class_possible_is_not_followed(monkeypatch):
    part, asked = np.arange(SIZE) < 15, []

    def led_away(known, columns, seed):
        """No two parts at first, of which all but a few are possible; then far apart, but of something else."""
        asked.append(known)
        upper = np.arange(SIZE) < 500
        if len(asked) < 3:
            return Split(upper.astype(float), np.where(upper, 0.4, 0.1), 1.5, 1.0)
        return Split(upper.astype(float), upper.astype(float), 7.0, 0.0)

    monkeypatch.setattr(sharpening, "drawn", led_away)
    known = finding(part)
    assert sharpening.sharpened(classes([]), [known], [known], unsure)[1] == [known]
    monkeypatch.setattr(sharpening, "GROWS", 100)
    asked.clear()
    (whole,) = sharpening.sharpened(classes([]), [known], [known], unsure)[1]
    assert flagged(whole).sum() == 500


@pytest.mark.parametrize("blur", [sharpening.BLUR, 0.0])
def test_the_few_values_of_company_lead_no_line_away(monkeypatch, blur):
    """As on all of CIFAR-10: of the clean images one in ten keeps company of other labels."""
    monkeypatch.setattr(sharpening, "BLUR", blur)
    rng, size = np.random.default_rng(0), 6000
    poison = np.arange(size) < 2000
    lonely = ~poison & (rng.random(size) < 0.12)
    margin = np.where(poison, -7.0, np.where(lonely, -1.0, 6.0)) + 2.5 * rng.normal(size=size)
    company = np.where(poison | lonely, rng.binomial(3, 0.08, size), 3 - rng.binomial(3, 0.05, size)) / 3
    answers = np.column_stack([margin, np.zeros(size)])
    view = rng.normal(size=(size, 40)) + np.where(poison[:, None], 0.9, 0.0)
    run = SimpleNamespace(settings=Settings(), seed=0)
    whole = SimpleNamespace(run=run, members=lambda label: np.arange(size), views_of=lambda members: [view])
    part = finding(poison, np.arange(size))
    _, (drawn_again,) = sharpening.sharpened(whole, [part], [part], lambda *_: (answers, company))
    caught = drawn_again.split.suspicion > 0.5
    wrong = (caught & ~poison).sum()
    assert caught[poison].mean() > 0.99
    assert wrong < 50 if blur else wrong > 200


def test_a_change_that_is_undone_tells_its_part_and_what_is_possible_is_not_flagged():
    rng, seen = np.random.default_rng(3), []
    undone = rng.normal(size=(SIZE, 3))
    undone[:, 0] += np.where(POISON, -6.0, 6.0)

    class Asked:
        __call__ = staticmethod(unsure)

        def of_undone(self, members, change):
            seen.append(change)
            return undone

    part = finding(POISON & (np.arange(SIZE) < 80), undoing="upside down", restored=0.4, transfer=0.4)
    told = classes([])
    told.run.store = SimpleNamespace(shape=(3, 8, 8))
    told.undone = SimpleNamespace(view=lambda members, change: rng.normal(size=(SIZE, 5)))
    _, (whole,) = sharpening.sharpened(told, [part], [part], Asked())
    assert [change.name for change in seen] == ["upside down"]
    assert (flagged(whole) != POISON).mean() < 0.03
    assert np.array_equal(flagged(whole), whole.split.upper)
