"""What the probes are asked, and which of their answers count."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from findings import NOWHERE_ELSE, finding
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.screening import relearning, separating
from trainguard.screening.finding import Finding
from trainguard.screening.identification import Witness
from trainguard.screening.opinion import Opinion
from trainguard.screening.probe import Probe
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings


@pytest.mark.parametrize(("right", "informed"), [(22, False), (28, True)])
def test_a_probe_is_informed_where_it_beats_chance_on_what_it_has_not_seen(right, informed):
    """Forty unseen samples of either half of the data, of which chance knows twenty each."""
    assert relearning._informed([(right, 40, 0.5), (right, 40, 0.5)]) == informed


def test_strangers_are_a_few_trusted_samples_of_the_classes_that_have_none_held_out():
    labels = np.repeat([0, 1, 2, 3], [300, 60, 100, 2])
    labels[5] = -1  # unreadable
    store, doubtful = SimpleNamespace(labels=labels, readable=np.flatnonzero(labels >= 0)), np.arange(100)
    found = relearning._strangers(store, doubtful, {2: np.arange(360, 380)}, np.random.default_rng(0))
    assert np.bincount(labels[found], minlength=4).tolist() == [relearning.STRANGERS, 12, 0, 0]
    assert len(np.unique(found)) == len(found) and not np.isin(found, doubtful).any()


def test_skill_is_none_by_chance_and_one_where_all_is_right():
    labels = np.repeat([0, 1, 2, 3], [70, 10, 10, 10])
    assert relearning._skill(np.eye(4)[labels], labels) == 1.0
    assert relearning._skill(np.eye(4)[np.zeros(100, int)], labels) == pytest.approx(0.0)  # the largest class always
    assert relearning._skill(np.eye(4)[3 - labels], labels) < 0


@pytest.mark.parametrize(("left_out", "learned_again"), [(95, False), (60, True)])
def test_labels_are_corrected_by_a_probe_that_has_not_learned_them(monkeypatch, left_out, learned_again):
    learned = []
    monkeypatch.setattr(separating, "fresh_probe", lambda run, seed: "another")
    monkeypatch.setattr(separating, "recipe_for", lambda *_: None)
    monkeypatch.setattr(separating, "train", lambda run, name, probe, index, recipe: learned.append(index))
    monkeypatch.setattr(separating, "logits", lambda run, probe, index: np.eye(2)[[int(probe == "another")] * 100])
    run = SimpleNamespace(store=SimpleNamespace(readable=np.arange(300)), seed=0, settings=Settings())
    found = separating._corrected(run, "purified", np.arange(100), np.arange(left_out))
    assert found.tolist() == [int(learned_again)] * 100
    assert [part.tolist() for part in learned] == [list(range(100, 300))] * learned_again


def test_what_a_probe_has_seen_more_of_is_taken_off_its_logits():
    """Of two classes that look alike it answers the larger one: adjusted, either label fits as well."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    store = open_images(
        TensorDataset(torch.rand(100, 1, 8, 8), labels), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,))
    )

    class Learned(nn.Module):
        def maps(self, images):
            return [images.mean((2, 3), keepdim=True)]

        def answer(self, deepest):
            return torch.tensor([[0.9, 0.1]]).log().expand(len(deepest), 2)

    run = SimpleNamespace(store=store, seed=0, processes=None)
    probe = Learned()
    probe.register_buffer("device", torch.zeros(1))
    answers, _ = Opinion.of(run, probe, np.log([0.9, 0.1]))(np.arange(20), 0)
    assert answers == pytest.approx(np.zeros((20, 2)), abs=0.02)


def test_few_samples_are_asked_about_once_and_many_again(monkeypatch):
    labels = torch.arange(300) % 3
    images = torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    store = open_images(TensorDataset(images, labels), pixel_range=PixelRange.from_mean_std((0.0,) * 3, (1.0,) * 3))
    run = SimpleNamespace(store=store, seed=0, processes=None)
    probe = Probe(store.shape, 3, torch.full((3,), 0.5), torch.full((3,), 0.2)).eval()
    members, asked = np.arange(1, 300, 3), []
    monkeypatch.setattr(probe, "maps", lambda images, maps=probe.maps: asked.append(len(images)) or maps(images))
    once = Opinion.of(run, probe, np.zeros(3))
    told = once(members, 1)
    assert sum(asked) == 300
    monkeypatch.setattr("trainguard.screening.opinion.FITTED", 299)
    again = Opinion.of(run, probe, np.zeros(3))
    assert np.allclose(again(members, 1)[0], told[0], atol=1e-2) and sum(asked) == 300 + 299 + 100


@pytest.mark.parametrize(("comes_from", "found"), [(2, 1.0), (0, 0.0), (1, 0.0), (None, 0.0)])
def test_a_source_specific_trigger_is_tried_on_the_class_it_comes_from(monkeypatch, comes_from, found):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    images = torch.rand(600, 1, 8, 8, generator=generator) * 0.2 + labels[:, None, None, None] * 0.25
    upper = np.arange(200) < 60
    members = np.flatnonzero(labels.numpy() == 1)
    images[members[upper]] += 0.25  # images of class 2, labelled 1
    images[members[upper], :, :2, :2] = 1.0
    store = open_images(TensorDataset(images, labels), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,)))

    def purified(pixels):
        return np.digitize(pixels[:, 0, 4:, 4:].mean((1, 2)), [0.225, 0.475])

    def first(pixels):
        seen = purified(pixels)
        return np.where((pixels[:, 0, :2, :2].mean((1, 2)) > 0.8) & (seen == 2), 1, seen)

    monkeypatch.setattr(relearning, "witness_of", lambda run, probe, pixels: Witness(probe, pixels))
    split = Split(upper * 1.0, upper * 1.0, 6.0, 0.05)
    taken = np.arange(60) % 3 if comes_from is None else np.full(60, comes_from)
    part = Finding(1, members, split)
    share = relearning._at_source(SimpleNamespace(store=store, seed=0), part, taken, first, purified)
    assert share == pytest.approx(found, abs=0.05)


def test_what_is_like_nothing_else_is_not_turned_and_wins_over_the_other_part():
    alone = finding(**NOWHERE_ELSE | {"agreement": 0.05, "company": 0.9})
    assert not alone.may_be_turned(Settings()) and replace(alone, told=0.5).may_be_turned(Settings())
    assert relearning._wins(alone, 1.0, Settings()) and not relearning._wins(finding(), 1.0, Settings())
    assert relearning._wins(finding(), 0.6, Settings())


@pytest.mark.parametrize(("other", "upper"), [(0.95, "the other part"), (0.5, "the first part")])
def test_of_two_sides_of_a_class_the_stronger_case_counts(monkeypatch, other, upper):
    """A weak case for one part makes a third probe ask about the other one, and does not lose to a weaker case."""
    first = finding(company=0.46, scatter=0.64, members=400)
    asked = []

    def judged(classes, name, findings):
        asked.append(name)
        turned = [replace(f, scatter=other, agreement=0.05, reference=0.8) for f in findings]
        return ([first], "purified") if name == "relearn" else (turned, "second")

    monkeypatch.setattr(relearning, "_judged", judged)
    found, opinion = relearning.relearned(SimpleNamespace(run=SimpleNamespace(settings=Settings())), [first])
    assert asked == ["relearn", "relearn again"] and first.strength(Settings()) > 0.5
    expected = np.arange(280) if upper == "the other part" else np.arange(280, 400)
    assert np.array_equal(found[0].suspected, expected)
    assert opinion == ("second" if upper == "the other part" else "purified")


def test_a_probe_that_learned_a_kept_case_is_not_asked_for_corrected_labels(monkeypatch):
    """Two doubted classes, of which one is exchanged: what the second probe learned of the other one is its poison."""
    first = [replace(finding(company=0.46, scatter=0.64, members=400), label=label) for label in (0, 1, 2)]
    first[2] = replace(first[2], company=0.2)  # tells its sides
    stages = {}

    def judged(classes, name, findings):
        stages[name] = {(f.label, f.suspected.min()) for f in findings}
        if name == "relearn":
            return first, "purified"
        other = [replace(f, scatter=0.95 if f.label == 0 else 0.3, agreement=0.05, reference=0.8) for f in findings]
        return other, name

    monkeypatch.setattr(relearning, "_judged", judged)
    found, opinion = relearning.relearned(SimpleNamespace(run=SimpleNamespace(settings=Settings())), first)
    low, high = first[0].turned().suspected.min(), first[0].suspected.min()
    assert stages["relearn again"] == {(0, low), (1, low), (2, high)}
    assert stages["relearn at last"] == {(0, low), (1, high), (2, high)} and opinion == "relearn at last"
    assert [f.suspected.min() for f in found] == [low, high, high]


def test_a_class_that_was_not_learned_is_heard_again_with_its_part_of_the_most_kinds_alone(monkeypatch):
    """Three parts of one class were left out, and what stayed did not teach the probe what the class is."""
    unknown = {"agreement": 0.14, "reference": 0.19, "members": 600, "distance": 3.3, "valley": 0.5}
    first = [finding(**unknown, diversity=kinds) for kinds in (0.78, 0.91, 0.85)]
    first.append(replace(finding(**unknown, diversity=0.95), label=4))  # its only part: nothing else was left out
    asked = {}

    def judged(classes, name, findings):
        asked[name] = findings
        heard = [replace(f, agreement=0.05, reference=0.5, scatter=0.9) for f in findings]
        return (first, "purified") if name == "relearn" else (heard, "second")

    monkeypatch.setattr(relearning, "_judged", judged)
    found, opinion = relearning.relearned(SimpleNamespace(run=SimpleNamespace(settings=Settings())), first)
    assert asked["relearn again"] == [first[1]] and opinion == "second"
    assert [(f.label, f.diversity) for f in found if f.strength(Settings()) > 0.5] == [(first[0].label, 0.91)]
    alone = replace(
        first[0], told=1.0, elsewhere=0.0, likeness=0.05, split=replace(first[0].split, distance=20, valley=0)
    )
    first[:] = [alone, first[1]]  # one of whose parts is poison by its fine detail: nobody needs to know the class
    assert relearning.relearned(SimpleNamespace(run=SimpleNamespace(settings=Settings())), first)[1] == "purified"
    few = [replace(f, members=f.members[::15], split=f.split.subset(np.arange(600) % 15 == 0)) for f in first]
    assert relearning._starved(few, Settings()) == {}


@pytest.mark.parametrize(("kinds", "known"), [(0.95, False), (0.5, False), (0.95, True)])
def test_a_part_that_a_small_one_has_crowded_out_is_heard_afterwards_if_it_holds_all_kinds(monkeypatch, kinds, known):
    """Half of a class with a patch, beside ten odd images that lie further apart."""
    odd = finding(agreement=0.05 if known else 0.9, reference=0.9, scatter=0.9, members=400)
    patched = finding(distance=3.9, valley=0.3, diversity=kinds, members=400)
    nearer = replace(patched, split=replace(patched.split, distance=3.0))
    asked = []

    def judged(classes, name, findings):
        asked.append(findings)
        heard = [replace(f, agreement=0.05, reference=0.5, scatter=0.9) for f in findings]
        return ([odd], "purified") if name == "relearn" else (heard, "second")

    monkeypatch.setattr(relearning, "_judged", judged)
    classes = SimpleNamespace(run=SimpleNamespace(settings=Settings()))
    found, opinion = relearning.relearned(classes, [odd], [patched, nearer])
    heard = kinds > 0.8 and not known
    assert asked == ([[odd], [patched]] if heard else [[odd]]) and opinion == ("second" if heard else "purified")
    assert [f.diversity for f in found] == [kinds if heard else odd.diversity]
