"""The steps of a screening, each against a slow reference, a closed form or an invariant."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.perturbation import frozen, patch_mask
from trainguard.screening import separating
from trainguard.screening.consistency import divergence
from trainguard.screening.enhancement import CAP, enhancement_loss
from trainguard.screening.finding import Finding, with_kin
from trainguard.screening.identification import (
    Trial,
    Witness,
    bystanders,
    decide,
    diversity,
    orient,
    transfers,
    triggers,
)
from trainguard.screening.learning import recipe_for
from trainguard.screening.partition import least_consistent
from trainguard.screening.resemblance import resemblance
from trainguard.screening.separation import Split, _read_off, leaning, shared_direction, split_class
from trainguard.screening.settings import Settings
from trainguard.screening.whitening import Whitening


def linear(classes=3, pixels=3 * 8 * 8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


def test_divergence_equals_a_loop_over_samples(monkeypatch):
    monkeypatch.setattr(
        "trainguard.screening.consistency.autocast", lambda device: torch.autocast("cpu", enabled=False)
    )
    model, images, mask = linear(), torch.rand(5, 3, 8, 8), patch_mask(torch.rand(5, 2), 8, 8, 4)
    with frozen(model):
        found = divergence(model, images, mask=mask, eps=0.1, steps=1)
    for i in range(5):
        x = images[i : i + 1].clone().requires_grad_(True)
        before = model(x)
        nn.functional.cross_entropy(before, before.argmax(1)).backward()
        moved = (images[i : i + 1] + mask[i : i + 1] * 0.1 * x.grad.sign()).clamp(0, 1)
        p, q = before.softmax(1), model(moved).softmax(1)
        expected = (p * (p.log() - q.log())).sum()
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_divergence_is_zero_without_room_to_move():
    model, images = linear(), torch.rand(4, 3, 8, 8)
    with frozen(model):
        found = divergence(model, images, mask=torch.ones(4, 1, 8, 8), eps=0.0, steps=1)
    assert found.abs().max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.integers(1, 5), st.integers(0, 10**6))
def test_partition_takes_the_share_that_moves_most(n, rate, classes, seed):
    rng = np.random.default_rng(seed)
    moves = rng.random(n).astype(np.float32)
    moves[rng.random(n) < 0.1] = np.nan
    labels = rng.integers(classes, size=n)
    usable = np.isfinite(moves)
    plain = least_consistent(moves, rate)
    assert len(plain) == round(rate * usable.sum())
    rest = np.setdiff1d(np.flatnonzero(usable), plain)
    assert not len(plain) or not len(rest) or moves[plain].min() >= moves[rest].max()
    by_class = least_consistent(moves, rate, labels)
    for k in range(classes):
        members = usable & (labels == k)
        assert members[by_class].sum() == round(rate * members.sum())
    assert np.isfinite(moves[by_class]).all() and len(np.unique(by_class)) == len(by_class)


def test_partition_refuses_a_rate_above_one():
    with pytest.raises(ValueError, match=r"1\.5"):
        least_consistent(np.zeros(3, np.float32), 1.5)


def test_enhancement_loss_rises_on_trusted_and_falls_on_the_rest():
    labels = torch.tensor([0, 1])
    logits = torch.zeros(2, 2, requires_grad=True)
    enhancement_loss(torch.tensor([True, False]), labels)(logits, np.array([0, 1])).backward()
    assert logits.grad[0, 0] > 0  # descent lowers the trusted sample's own label
    assert logits.grad[1, 1] < 0


def test_enhancement_loss_weighs_the_trusted_and_the_rest_alike_however_few_are_trusted():
    labels = torch.zeros(20, dtype=torch.int64)
    trusted = torch.arange(20) < 2
    logits = torch.zeros(20, 3, requires_grad=True)
    enhancement_loss(trusted, labels)(logits, np.arange(20)).backward()
    up, down = logits.grad[trusted].abs().sum(), logits.grad[~trusted].abs().sum()
    assert torch.isclose(up, down)


def test_enhancement_loss_is_bounded_below():
    logits = torch.tensor([[-100.0, 100.0]])
    value = enhancement_loss(torch.tensor([True]), torch.tensor([0]))(logits, np.array([0]))
    assert value == -CAP


def heaps(n=600, share=0.3, gap=6.0, seed=0, size=40):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size))
    second = rng.random(n) < share
    x[second, 0] += gap
    return x, second


def test_split_finds_two_heaps():
    x, second = heaps()
    split = split_class(x, seed=0)[0]
    agreement = (split.upper == second).mean()
    assert max(agreement, 1 - agreement) > 0.98
    assert split.distance > 4 and split.valley < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_one_cloud_has_no_wide_gap(seed):
    x = np.random.default_rng(seed).normal(size=(600, 40))
    assert all(split.gap < 2.5 for split in split_class(x, seed))  # 5.8 where two heaps lie six apart


def test_split_finds_a_small_heap_across_the_widest_directions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 40)) * np.r_[np.full(8, 4.0), np.ones(32)]
    small = np.arange(1000) < 60
    x[small, 9] += 9
    found = split_class(x, seed=0)
    assert any(abs(np.corrcoef(split.upper, small)[0, 1]) > 0.95 and split.distance > 5 for split in found)


def test_split_finds_two_triggers_of_one_class():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 40))
    one, two = np.arange(1000) < 120, np.arange(1000) >= 880
    x[one, 0] += 10
    x[two, 1] += 9
    far = [s for s in split_class(x, seed=0) if Finding(0, np.arange(1000), s).is_candidate(Settings())]
    found = [split.upper if split.upper.mean() < 0.5 else ~split.upper for split in far]
    either = np.logical_or.reduce([upper for upper in found if upper.mean() < 0.3])
    assert (either[one | two]).mean() > 0.98 and either[~(one | two)].mean() < 0.05


def test_what_several_classes_share_is_a_direction_and_what_two_share_is_not():
    rng = np.random.default_rng(0)
    trigger = np.eye(40)[0]
    lines = [(label, trigger + 0.2 * rng.normal(size=40)) for label in (2, 5, 7)]
    lines += [(label, rng.normal(size=40)) for label in (0, 1, 2, 5, 9)]
    lines = [(label, line / np.linalg.norm(line)) for label, line in lines]
    common, sharing = shared_direction(lines)
    assert sharing == {2, 5, 7} and common @ trigger / np.linalg.norm(common) > 0.75
    assert shared_direction([line for line in lines if line[0] != 7]) == (None, frozenset())
    assert shared_direction([(4, line) for _, line in lines]) == (None, frozenset())  # one class, however often
    assert shared_direction([]) == (None, frozenset())


def test_the_direction_of_a_split_points_at_its_smaller_part():
    x, second = heaps(share=0.2)
    for split in (Split(second * 1.0, second * 1.0, 6.0, 0.0), Split(second * -1.0, ~second * 1.0, 6.0, 0.0)):
        assert split.direction(x)[0] > 0.95 and np.linalg.norm(split.direction(x)) == pytest.approx(1)


def test_an_order_leads_to_a_heap_that_no_guess_finds():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 60)) * np.r_[np.full(20, 3.0), np.ones(40)]
    small = np.arange(1000) < 60
    x[small, 20:24] += 2.2
    order = x[:, 20:24].sum(1) + 2 * rng.normal(size=1000)

    def best(splits):
        return max((abs(np.corrcoef(split.upper, small)[0, 1]) for split in splits), default=0.0)

    assert best(split_class(x, 0)) < 0.3 and best(split_class(x, 0, [order])) > 0.7


@pytest.mark.parametrize("still", [1e-3, 1.0, 1e3])
def test_a_part_that_is_nearly_all_of_its_class_is_not_the_suspected_one(still):
    upper = np.arange(100) < 90
    split, divergence = Split(upper * 1.0, upper * 1.0, 6.0, 0.05), np.where(upper, 1.0, still).astype(np.float32)
    for one in (split, split.turned()):
        assert np.array_equal(orient(one, divergence, (0.0, 0.0)).upper, ~upper)


def test_suspicion_reaches_beyond_the_upper_part_but_not_into_the_lower():
    x, second = heaps(gap=4.5)
    split = split_class(x, seed=0)[0]
    split = split if (split.upper == second).mean() > 0.5 else split.turned()
    flagged = split.suspicion > 0.5
    assert flagged[split.upper].all() and flagged.sum() > split.upper.sum()
    assert flagged[second].mean() >= split.upper[second].mean() and flagged[~second].mean() < 0.1
    order = np.argsort(split.position)
    assert (np.diff(split.suspicion[order]) >= 0).all()


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_the_part_whose_difference_is_a_trigger_is_suspected(share):
    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    labels = torch.arange(300) % 3
    members = np.flatnonzero(labels.numpy() == 1)
    poisoned = np.arange(len(members)) < share * len(members)
    images[members[poisoned], :, :2, :2] = 1.0
    store = open_images(TensorDataset(images, labels), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,)))

    def predict(pixels):
        return np.where(pixels[:, 0, :2, :2].mean((1, 2)) > 0.6, 1, 0)

    still = np.ones(len(members), dtype=np.float32)  # Eq. 3 says nothing here
    for upper in (poisoned, ~poisoned):
        split = Split(upper * 1.0, upper * 1.0, 6.0, 0.05)
        images = bystanders(store, seed=0)
        moved = transfers(Trial.of(split, members, 1, store, images, seed=0), Witness(predict, images[0]))
        assert sorted(moved) == pytest.approx([0.0, 1.0], abs=0.05)
        assert np.array_equal(orient(split, still, moved).upper, poisoned)


def test_split_probability_never_falls_along_the_line():
    x, _ = heaps(gap=3.0)
    split = split_class(x, seed=0)[0]
    order = np.argsort(split.position)
    assert (np.diff(split.probability[order]) >= 0).all()


def test_a_sample_far_out_changes_nobody_elses_part():
    rng = np.random.default_rng(0)
    position = np.r_[rng.normal(0, 1, 900), rng.normal(8, 3, 100), -14.0]  # the wide part reaches past the narrow one
    split = _read_off(position)
    assert (split.probability[:900] > 0.05).mean() < 0.1 and split.probability[-1] < 0.05
    assert split.probability[900:1000].mean() > 0.9
    turned = _read_off(-position)
    assert (turned.probability[:900] > 0.95).mean() > 0.9 and turned.probability[-1] > 0.95


def test_turning_a_split_twice_gives_it_back():
    split = Split(np.array([1.0, -1.0]), np.array([0.9, 0.2]), 4.0, 0.1)
    again = split.turned().turned()
    assert np.array_equal(again.position, split.position) and np.allclose(again.probability, split.probability)


def test_whitening_makes_the_spread_within_classes_round():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=3000)
    features = rng.normal(size=(3000, 6)) * [1, 2, 3, 4, 5, 6] + rng.normal(size=(3000, 1)) + labels[:, None]
    white = Whitening.fit(features.astype(np.float32), labels)(features.astype(np.float32))
    for k in range(3):
        white[labels == k] -= white[labels == k].mean(0)
    assert np.allclose(np.cov(white.T), np.eye(6), atol=0.25)


def test_a_feature_that_was_dead_where_it_was_learned_does_not_rule_what_comes_later():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=600)
    features = rng.normal(size=(600, 6)).astype(np.float32)
    features[:, 0] = 0
    whitening = Whitening.fit(features, labels)
    later = features[:20].copy()
    later[0, 0] = 1.0  # the first sample it answers to
    assert np.allclose(whitening(later), whitening(features[:20]))
    later[0, 1] = 1e4
    assert np.abs(whitening(later)).max() < 40


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("skill", [1.0, 3.0])  # of a weak probe, and of a good one
def test_resemblance_tells_hard_images_of_a_class_from_other_classes_images(classes, skill):
    rng = np.random.default_rng(0)

    def answers(truth, sight):
        found = rng.normal(size=(len(truth), classes))
        found[np.arange(len(truth)), truth] += skill * sight
        return found.astype(np.float32)

    labels = np.repeat(np.arange(classes), 200)
    held = answers(labels, 1.0)
    others = rng.integers(1, classes, 400)
    poison, own = answers(others, 1.0), answers(np.zeros(400, int), 1.0)
    hard = answers(others, 1.0)
    hard[:, 0] += 0.6 * skill  # they show something else, and a little of what they are
    values = [resemblance(part, held, labels, 0) for part in (poison, hard, own)]
    assert abs(values[0]) < 0.35 < values[1] < values[2] and abs(values[2] - 1) < 0.35


def test_resemblance_of_a_few_samples_is_said_with_less_certainty():
    rng = np.random.default_rng(0)
    held, labels = rng.normal(size=(100, 4)).astype(np.float32), np.repeat(np.arange(4), 25)
    held[np.arange(100), labels] += 2
    few = np.mean([resemblance(held[labels == 1][k : k + 5], held, labels, 0) for k in range(0, 25, 5)])
    assert few > resemblance(held[labels == 1], held, labels, 0) + 0.05


def test_resemblance_is_none_where_there_is_nothing_to_compare_with():
    some = np.eye(3, dtype=np.float32)
    assert resemblance(some[1:], some[:1], np.array([0]), 0) == 0.0
    assert resemblance(some[1:], some[1:], np.array([1, 2]), 0) == 0.0


def finding(
    distance=6.0,
    agreement=0.05,
    reference=0.8,
    trigger=0.0,
    valley=0.05,
    company=0.2,
    diversity=0.0,
    transfer=0.9,
    share=0.3,
    likeness=0.1,
    members=100,
    **more,
):
    half = (np.arange(members) >= members * (1 - share)).astype(float)
    split = Split(half, half, distance, valley)
    seen = (transfer, agreement, reference, company, trigger, diversity)
    return Finding(1, np.arange(members), split, *seen, likeness=likeness, **more)


NOWHERE_ELSE = {"distance": 12.0, "agreement": 0.75, "likeness": 0.05, "told": 0.99, "elsewhere": 0.0, "members": 200}


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (finding(), "poisoned"),
        (finding(agreement=0.75, trigger=0.2), "undecided"),  # far apart, nearly a trigger
        (finding(distance=16.0, agreement=0.23, company=1.0, trigger=0.17), "clean"),  # turned copies of one blood cell
        (finding(agreement=0.75, likeness=0.01), "undecided"),  # as far apart, and no picture that one of them has
        (finding(distance=5.5, agreement=0.75, likeness=0.01), "clean"),
        (finding(agreement=0.75, firmness=0.5, finished=True, likeness=0.01), "clean"),
        (finding(agreement=0.75, trigger=0.2, likeness=0.66), "clean"),  # likewise, but one scene: a track of signs
        (finding(distance=12.0, agreement=0.75), "clean"),  # a natural group, however far
        (finding(distance=5.0, company=0.9), "clean"),  # unlike the rest of its class, and among its own
        (finding(agreement=0.3, diversity=0.9, scatter=0.9), "poisoned"),  # far apart, and of all kinds for both probes
        (finding(agreement=0.3, diversity=0.9, scatter=0.7), "clean"),
        (finding(distance=4.0, valley=0.4, agreement=0.75), "clean"),  # a natural group
        (finding(distance=9.0, agreement=0.75, trigger=0.8), "poisoned"),  # clean-label: the difference is a trigger
        (finding(distance=5.3, agreement=0.75, trigger=0.8), "clean"),  # two kinds of one class
        (finding(distance=5.3, agreement=0.3, trigger=0.8), "poisoned"),  # no gap is needed where labels half misfit
        (finding(distance=5.3, agreement=0.3, trigger=0.8, company=0.7), "clean"),
        (finding(distance=5.3, agreement=0.3, trigger=0.8, likeness=0.8), "clean"),
        (finding(agreement=0.75, trigger=0.05), "clean"),  # what the class looks like moves images as well
        (finding(distance=2.0, valley=0.9), "clean"),  # one cloud
        (finding(distance=2.8, valley=0.7, diversity=0.85), "poisoned"),  # a small gap, but images of all kinds
        (finding(distance=2.8, valley=0.7, diversity=0.6), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.85, company=0.45), "clean"),  # birds resemble everything
        (finding(distance=2.8, valley=0.7, diversity=0.75, company=0.9), "clean"),  # several kinds that keep together
        # Foreign labels with much company, and a difference that half works: either alone is not enough.
        (finding(distance=3.2, valley=0.75, diversity=0.78, company=0.6, trigger=0.18), "poisoned"),
        (finding(distance=3.2, valley=0.75, diversity=0.78, company=0.6, trigger=0.06), "clean"),
        # Among few classes there are no kinds to tell: what does not lie far apart must be half a trigger as well.
        (finding(distance=3.5, valley=0.5, trigger=0.1), "clean"),
        (finding(distance=3.5, valley=0.5, trigger=0.27), "poisoned"),
        (finding(distance=3.5, valley=0.5, diversity=0.4), "poisoned"),
        (finding(distance=3.5, valley=0.5, told=0.98, elsewhere=0.0, likeness=0.03), "poisoned"),  # like nothing else
        (finding(distance=3.5, valley=0.5, scatter=0.4), "poisoned"),
        # One scene: frames of another pose are foreign, and keep no company; frames of the class are of its own kind.
        (finding(distance=12.0, likeness=0.8, scatter=0.2), "clean"),
        (finding(distance=12.0, likeness=0.8, scatter=0.9, diversity=0.9), "poisoned"),
        (finding(distance=140.0, agreement=0.8, likeness=1.6, trigger=0.4), "clean"),
        (finding(distance=12.0, agreement=0.55, likeness=0.8, trigger=0.45), "poisoned"),  # images shrunk, on black
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25), "poisoned"),
        (finding(distance=4.6, valley=0.2, company=0.72, trigger=0.25), "clean"),  # newspapers among paper
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25, likeness=0.8), "clean"),
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25, share=0.6), "clean"),  # most of the class
        (finding(distance=3.8, valley=0.4, agreement=0.0, company=1.2, trigger=0.16), "clean"),  # keeps to itself
        (finding(distance=3.2, valley=0.75, diversity=0.78, agreement=0.6, trigger=0.18), "clean"),  # labels fit
        (finding(distance=4.4, valley=0.2, diversity=0.9, company=1.2), "poisoned"),  # half of the class: own company
        # Own company as well, but taken for all kinds: poison that looks alike. Far apart, several kinds are enough.
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.92, diversity=0.8), "poisoned"),
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.92, diversity=0.4), "clean"),  # some of the skirts
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.66, diversity=0.8), "clean"),
        (finding(distance=9.0, company=0.9, scatter=0.78), "poisoned"),
        (finding(distance=9.0, company=0.9, scatter=0.78, skill=0.4), "clean"),  # whoever knows little scatters
        (finding(distance=9.0, company=0.9, scatter=0.78, share=0.15), "clean"),  # fifteen samples
        (finding(distance=9.0, company=0.9, scatter=0.6), "clean"),  # a track of signs: it keeps together
        (finding(distance=9.0, company=0.6, scatter=0.68), "poisoned"),
        (finding(distance=9.0, company=0.9, scatter=0.42), "clean"),
        (finding(distance=9.0, company=0.9, scatter=0.9, firmness=0.25, disbelief=1.1), "clean"),  # wrong labels
        (finding(firmness=0.25, disbelief=1.1, pixels=True), "poisoned"),  # wrong labels do not show among pixels
        (finding(company=0.9, at_source=0.8), "poisoned"),  # a trigger for images of one class
        (finding(company=0.9, at_source=0.35), "clean"),
        (finding(company=0.9, at_source=0.8, likeness=2.0), "clean"),  # one scene
        (finding(agreement=0.5, company=0.9, at_source=0.8), "clean"),  # labels fit
        (finding(share=0.7), "clean"),  # most of a class, and a probe that learned the rest alone
        (finding(share=0.7, scatter=0.95, members=150), "poisoned"),
        (finding(share=0.7, scatter=0.95), "clean"),  # thirty samples teach nobody a class
        (finding(resemblance=0.6), "poisoned"),  # far apart
        (finding(resemblance=0.8), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.0), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.0, beside=True), "poisoned"),  # one more of several pictures
        (finding(resemblance=0.8, told=0.85, elsewhere=0.0, beside=True), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.1, beside=True), "clean"),
        (finding(distance=4.2, valley=0.2, resemblance=0.35, scatter=0.3), "poisoned"),
        (
            finding(distance=4.2, valley=0.2, resemblance=0.5, scatter=0.3),
            "clean",
        ),  # hard images: something of their label
        (finding(distance=4.2, valley=0.2, resemblance=0.5, diversity=0.9, scatter=0.6), "clean"),
        # Few natural parts are of all kinds for both probes, and those fit their label better.
        (finding(distance=4.2, valley=0.2, agreement=0.3, resemblance=0.5, diversity=0.9, scatter=0.9), "poisoned"),
        (finding(distance=4.2, valley=0.2, agreement=0.3, resemblance=0.85, diversity=0.9, scatter=0.9), "clean"),
        (finding(distance=4.2, valley=0.2, agreement=0.45, resemblance=0.5, diversity=0.9, scatter=0.9), "clean"),
        (finding(distance=4.2, resemblance=0.5, trigger=0.16, valley=0.2), "clean"),
        (finding(distance=4.2, valley=0.2, company=0.9, at_source=0.8, resemblance=0.5), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.85, resemblance=0.5), "clean"),
        # Set apart as the poisoned parts of several other classes are: one trigger for many targets.
        (finding(distance=4.2, valley=0.2, company=0.7), "clean"),
        (finding(distance=4.2, valley=0.2, company=0.7, kinship=0.6), "poisoned"),
        (finding(distance=2.8, valley=0.7, diversity=0.8, company=0.7, kinship=0.6), "poisoned"),
        (finding(distance=4.2, valley=0.2, company=0.7, kinship=0.2), "clean"),
        (finding(distance=4.2, valley=0.2, agreement=0.6, kinship=0.6), "clean"),  # labels fit
        (finding(distance=4.2, valley=0.2, company=0.7, resemblance=0.6, kinship=0.6), "clean"),
        # A probe that knows little contradicts only what is far apart.
        (finding(distance=4.2, valley=0.5, skill=0.62, scatter=0.3), "poisoned"),
        (finding(distance=4.2, valley=0.5, skill=0.4, scatter=0.3), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, resemblance=0.2), "poisoned"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, resemblance=0.5), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, agreement=0.3), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, trigger=0.5), "poisoned"),
        (finding(skill=0.4), "poisoned"),
        (finding(distance=8.0, agreement=0.55, trigger=0.25, skill=0.55), "poisoned"),
        (finding(agreement=0.5, trigger=0.2, skill=0.42), "undecided"),
        # Utterly apart, and of all kinds for the purified probe: a picture that looks like the class itself.
        (finding(distance=20.0, agreement=0.3, scatter=0.9), "poisoned"),
        (finding(distance=20.0, agreement=0.3, scatter=0.6), "clean"),
        (finding(distance=20.0, agreement=0.5, scatter=0.9), "clean"),
        # Clean-label: fine detail that nothing else has, utterly apart, in images that are not one scene.
        (finding(**NOWHERE_ELSE), "poisoned"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.25, "trigger": 0.16}), "poisoned"),  # a picture, and half a trigger
        (finding(**NOWHERE_ELSE | {"likeness": 0.25, "trigger": 0.09}), "clean"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.66, "trigger": 0.16}), "clean"),
        (finding(**NOWHERE_ELSE | {"distance": 8.0}), "clean"),
        (finding(**NOWHERE_ELSE | {"valley": 0.2}), "clean"),
        (finding(**NOWHERE_ELSE | {"elsewhere": 0.05}), "clean"),  # samples of other classes have it: covers
        (finding(**NOWHERE_ELSE | {"told": 0.9}), "clean"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.12}), "clean"),  # a track of signs is like nothing else either
        (finding(**NOWHERE_ELSE | {"members": 150}), "clean"),
        (finding(**NOWHERE_ELSE | {"share": 0.7}), "clean"),
        (finding(firmness=0.8, finished=True), "poisoned"),  # a finished model knows them nearly as well as the rest
        (finding(firmness=0.6, finished=True), "clean"),  # hard images, which the model never learned
        (finding(distance=2.8, valley=0.7, diversity=0.85, firmness=0.25), "clean"),  # wrong labels
        (finding(firmness=0.25, disbelief=1.6), "poisoned"),  # set apart, and hardly learned yet
        (finding(firmness=0.25, disbelief=1.1), "clean"),  # as many labels are not believed in every class
        (finding(agreement=0.75, trigger=0.25), "undecided"),  # images of the class, which half move others
        (
            finding(distance=8.0, agreement=0.55, trigger=0.25),
            "poisoned",
        ),  # the same of images that are not quite what the class is
    ],
)
def test_verdict_follows_the_evidence(case, verdict):
    found, confidence, reason, poisoned = decide([case], 0.8, 10, Settings())
    assert found == verdict and 0 <= confidence <= 1 and reason
    assert bool(poisoned) == (verdict == "poisoned")


def test_kinship_is_with_the_poisoned_parts_of_several_other_classes():
    ways = np.eye(6)[0] + 0.3 * np.random.default_rng(0).normal(size=(5, 6))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    poison = [replace(finding(), label=label, line=way) for label, way in enumerate(ways[:3])]
    kin = replace(finding(distance=4.2, valley=0.2, company=0.7), label=3, line=ways[3])
    strange = replace(kin, label=4, line=np.eye(6)[5])
    larger = replace(kin, label=5, line=-ways[4], split=kin.split.turned())  # the suspected part is most of its class
    *others, kin, strange, larger = with_kin([*poison, kin, strange, larger], Settings())
    assert [f.kinship for f in others] == [0, 0, 0] and kin.kinship > 0.7 and larger.kinship > 0.7
    assert abs(strange.kinship) < 0.3
    few = with_kin([*poison[:2], replace(kin, kinship=0.0)], Settings())
    assert [f.kinship for f in few] == [0, 0, 0]  # two classes share no direction yet


@pytest.mark.parametrize(("firmness", "verdict"), [(0.55, "clean"), (0.8, "poisoned")])
def test_what_is_most_of_its_class_must_be_learned_the_better(firmness, verdict):
    minor = finding(firmness=firmness, disbelief=1.1, scatter=0.95, members=150)
    assert decide([minor], 0.8, 10, Settings())[0] == "poisoned"
    assert decide([replace(minor, split=minor.split.turned())], 0.8, 10, Settings())[0] == verdict


def test_a_probe_that_learned_nothing_leaves_the_verdict_open():
    verdict, _, reason, _ = decide([finding(distance=2.0, valley=0.9)], 0.11, 10, Settings())
    assert verdict == "undecided" and "learned too little" in reason


@pytest.mark.parametrize(
    ("case", "accuracy", "reason"),
    [(finding(), 0.11, "learned too little"), (finding(informed=False), 0.6, "no more than by chance")],
)
def test_nothing_is_called_poison_by_probes_that_know_nothing(case, accuracy, reason):
    verdict, _, why, poisoned = decide([case], accuracy, 10, Settings())
    assert verdict == "undecided" and reason in why and not poisoned


@pytest.mark.parametrize(("right", "informed"), [(22, False), (28, True)])
def test_a_probe_is_informed_where_it_beats_chance_on_what_it_has_not_seen(right, informed):
    """Forty unseen samples of either half of the data, of which chance knows twenty each."""
    assert separating._informed([(right, 40, 0.5), (right, 40, 0.5)]) == informed


def test_strangers_are_a_few_trusted_samples_of_the_classes_that_have_none_held_out():
    labels = np.repeat([0, 1, 2, 3], [300, 60, 100, 2])
    labels[5] = -1  # unreadable
    store, doubtful = SimpleNamespace(labels=labels, readable=np.flatnonzero(labels >= 0)), np.arange(100)
    found = separating._strangers(store, doubtful, {2: np.arange(360, 380)}, np.random.default_rng(0))
    assert np.bincount(labels[found], minlength=4).tolist() == [separating.STRANGERS, 12, 0, 0]
    assert len(np.unique(found)) == len(found) and not np.isin(found, doubtful).any()


def test_skill_is_none_by_chance_and_one_where_all_is_right():
    labels = np.repeat([0, 1, 2, 3], [70, 10, 10, 10])
    assert separating._skill(np.eye(4)[labels], labels) == 1.0
    assert separating._skill(np.eye(4)[np.zeros(100, int)], labels) == pytest.approx(0.0)  # the largest class always
    assert separating._skill(np.eye(4)[3 - labels], labels) < 0


@pytest.mark.parametrize(("covers", "found"), [(False, 1.0), (True, 0.0)])
def test_a_trigger_moves_images_for_one_probe_only(covers, found):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 8, 8, generator=generator) * 0.4
    labels = torch.arange(300) % 3
    images[labels == 2, :, 4:, 4:] += 0.4  # what class 2 is known by
    members = np.flatnonzero(labels.numpy() == 1)
    upper = np.arange(len(members)) < 40
    spot = (slice(0, 8), slice(0, 8)) if covers else (slice(0, 2), slice(0, 2))
    images[members[upper], :, spot[0], spot[1]] = 1.0
    store = open_images(TensorDataset(images, labels), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,)))

    def purified(pixels):
        known = pixels[:, 0, 4:, 4:].mean((1, 2)) - pixels[:, 0, 4:, :4].mean((1, 2)) > 0.2
        return np.where(known, 2, np.where(pixels.mean((1, 2, 3)) > 0.5, 1, 0))

    def first(pixels):
        return np.where(pixels[:, 0, :2, :2].mean((1, 2)) > 0.5, 1, purified(pixels))

    split = Split(upper * 1.0, upper * 1.0, 6.0, 0.05)
    images = bystanders(store, seed=0)
    trial, learned = Trial.of(split, members, 1, store, images, seed=0), Witness(first, images[0])
    assert max(transfers(trial, learned)) > 0.9
    assert triggers(trial, learned, Witness(purified, images[0])) == pytest.approx(found, abs=0.05)


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
    answers, _ = separating._opinion(run, probe, np.log([0.9, 0.1]))(np.arange(20), 0)
    assert answers == pytest.approx(np.zeros((20, 2)), abs=0.02)


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

    monkeypatch.setattr(separating, "witness_of", lambda run, probe, pixels: Witness(probe, pixels))
    split = Split(upper * 1.0, upper * 1.0, 6.0, 0.05)
    taken = np.arange(60) % 3 if comes_from is None else np.full(60, comes_from)
    part = Finding(1, members, split)
    share = separating._at_source(SimpleNamespace(store=store, seed=0), part, taken, first, purified)
    assert share == pytest.approx(found, abs=0.05)


@pytest.mark.parametrize(("one_scene", "verdict"), [(False, "poisoned"), (True, "clean")])
def test_what_one_scene_looks_like_is_no_half_a_trigger(one_scene, verdict):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 8, 8, generator=generator) * 0.8
    members = np.arange(100)
    upper = members < 30
    if one_scene:
        images[:30] = images[:1] + 0.1 * torch.rand(30, 1, 8, 8, generator=generator)
    else:
        images[:30, :, :, ::2] += 0.2
    store = open_images(
        TensorDataset(images, torch.arange(300) // 100), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,))
    )
    split = Split(upper * 1.0, upper * 1.0, 8.0, 0.05)
    trial = Trial.of(split, members, 0, store, bystanders(store, seed=0), seed=0)
    assert (trial.likeness > 1) == one_scene
    case = finding(distance=9.0, agreement=0.4, company=0.9, trigger=0.23, likeness=trial.likeness)
    assert decide([case], 0.8, 10, Settings())[0] == verdict
    assert decide([replace(case, trigger=0.5)], 0.8, 10, Settings())[0] == "poisoned"


def test_diversity_tells_all_kinds_from_a_few():
    rng = np.random.default_rng(0)
    others = np.array([0, *rng.integers(80, 120, 9)])
    assert diversity(rng.integers(1, 10, 60), others, seed=0) > 0.9
    assert diversity(rng.choice([3, 5, 9], 60), others, seed=0) < 0.4
    assert diversity(rng.integers(1, 4, 60), np.array([0, 100, 100, 100]), seed=0) == 0  # too few classes to say
    assert diversity(np.zeros(0, dtype=np.int64), others, seed=0) == 0


def test_the_part_that_holds_all_kinds_is_suspected():
    split = Split(np.r_[np.zeros(50), np.ones(50)], np.r_[np.zeros(50), np.ones(50)], 4.4, 0.2)
    still = np.ones(100, dtype=np.float32)
    assert orient(split, still, (0.0, 0.1), (True, False)).upper[50:].all()
    assert orient(split, still, (0.1, 0.0), (False, True)).upper[:50].all()


def test_the_part_that_is_unlike_other_classes_images_is_suspected():
    split = Split(np.r_[np.zeros(60), np.ones(40)], np.r_[np.zeros(60), np.ones(40)], 9.0, 0.0)
    moving = np.r_[np.full(60, 0.1), np.ones(40)].astype(np.float32)  # the lower part holds still, as a trigger would
    assert orient(split, moving, (0.0, 0.0)).upper[:60].all()
    assert orient(split, moving, (0.0, 0.0), odd=(True, False)).upper[60:].all()
    assert orient(split.turned(), moving, (0.0, 0.0), odd=(False, True)).upper[60:].all()


@pytest.mark.parametrize(
    ("more", "odd"),
    [({}, True), ({"told": 0.9}, False), ({"elsewhere": 0.05}, False), ({"likeness": 0.5}, False)],
)
def test_a_part_is_odd_where_nothing_else_is_like_it_though_its_pictures_are(more, odd):
    case = finding(**NOWHERE_ELSE | more)
    assert case.is_odd == odd and not case.turned().is_odd
    assert replace(case, elsewhere=1 - case.elsewhere).turned().is_odd == odd


def test_what_is_like_nothing_else_is_not_turned_and_wins_over_the_other_part():
    alone = finding(**NOWHERE_ELSE | {"agreement": 0.05, "company": 0.9})
    assert not alone.may_be_turned(Settings()) and replace(alone, told=0.5).may_be_turned(Settings())
    assert separating._wins(alone, 1.0, Settings()) and not separating._wins(finding(), 1.0, Settings())
    assert separating._wins(finding(), 0.6, Settings())


def test_split_finds_a_heap_by_a_fifth_of_it_among_the_doubtful():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 100)) * np.r_[np.full(40, 3.0), np.ones(60)]
    small = np.arange(1000) < 80
    x[small, 50] += 4.5
    doubt = rng.normal(size=1000) + 0.8 * small

    def found(splits):
        return max((abs(np.corrcoef(split.upper, small)[0, 1]) for split in splits), default=0.0)

    assert found(split_class(x, 0)) < 0.5
    assert found(split_class(x, 0, [doubt])) > 0.85


@pytest.mark.parametrize(
    ("case", "turned"),
    [
        (finding(company=0.9), True),
        (finding(distance=3.8, company=0.9), False),  # not far enough
        (finding(valley=0.4, company=0.9), False),
        (finding(agreement=0.5, company=0.9), False),  # the parts know each other
        (finding(agreement=0.02, reference=0.08, company=1.4), True),  # the trusted part is no class at all
        (finding(**NOWHERE_ELSE | {"agreement": 0.05, "company": 0.9, "members": 100}), True),
        (finding(firmness=2.0, finished=True), False),  # the other part is not what a finished model has learned
    ],
)
def test_parts_far_apart_that_are_foreign_to_each_other_are_turned(case, turned):
    assert case.may_be_turned(Settings()) == turned
    other = case.turned()
    assert np.array_equal(other.suspected, np.arange(70)) and other.firmness == 1 / case.firmness
    assert other.elsewhere == 1 - case.elsewhere


def test_a_part_that_leaves_too_little_is_not_turned():
    few = np.r_[np.zeros(90), np.ones(10)]
    assert not replace(finding(company=0.9), split=Split(few, few, 6.0, 0.05)).may_be_turned(Settings())


@pytest.mark.parametrize(
    ("case", "tells"),
    [
        (finding(company=0.5, scatter=0.6), False),  # as the rest of a class, where its poison is what was trusted
        (finding(company=0.2), True),
        (finding(company=0.9, scatter=0.8), True),
        (finding(company=0.9, diversity=0.85), True),
        (finding(company=0.9, trigger=0.13), True),
        (finding(company=0.9, at_source=0.6), True),
    ],
)
def test_what_could_be_said_of_the_rest_of_a_class_does_not_tell_the_sides(case, tells):
    assert case.tells_sides(Settings()) == tells


@pytest.mark.parametrize(("other", "upper"), [(0.95, "the other part"), (0.5, "the first part")])
def test_of_two_sides_of_a_class_the_stronger_case_counts(monkeypatch, other, upper):
    """A weak case for one part makes a third probe ask about the other one, and does not lose to a weaker case."""
    first = finding(company=0.46, scatter=0.64, members=400)
    asked = []

    def judged(run, name, probe, findings, images):
        asked.append(name)
        turned = [replace(f, scatter=other, agreement=0.05, reference=0.8) for f in findings]
        return ([first], "purified", "opinion") if name == "relearn" else (turned, "second", "its opinion")

    monkeypatch.setattr(separating, "_judged", judged)
    found, probe, _ = separating._relearned(SimpleNamespace(settings=Settings()), None, [first], None)
    assert asked == ["relearn", "relearn again"] and first.strength(Settings()) > 0.5
    expected = np.arange(280) if upper == "the other part" else np.arange(280, 400)
    assert np.array_equal(found[0].suspected, expected)
    assert probe == ("second" if upper == "the other part" else "purified")


def test_a_probe_that_learned_a_kept_case_is_not_asked_for_corrected_labels(monkeypatch):
    """Two doubted classes, of which one is exchanged: what the second probe learned of the other one is its poison."""
    first = [replace(finding(company=0.46, scatter=0.64, members=400), label=label) for label in (0, 1, 2)]
    first[2] = replace(first[2], company=0.2)  # tells its sides
    stages = {}

    def judged(run, name, probe, findings, images):
        stages[name] = {(f.label, f.suspected.min()) for f in findings}
        if name == "relearn":
            return first, "purified", "opinion"
        other = [replace(f, scatter=0.95 if f.label == 0 else 0.3, agreement=0.05, reference=0.8) for f in findings]
        return other, name, "its opinion"

    monkeypatch.setattr(separating, "_judged", judged)
    found, probe, _ = separating._relearned(SimpleNamespace(settings=Settings()), None, first, None)
    low, high = first[0].turned().suspected.min(), first[0].suspected.min()
    assert stages["relearn again"] == {(0, low), (1, low), (2, high)}
    assert stages["relearn at last"] == {(0, low), (1, high), (2, high)} and probe == "relearn at last"
    assert [f.suspected.min() for f in found] == [low, high, high]


def test_a_fold_of_a_small_class_is_no_part_of_it():
    """One line may part the samples that it is drawn from far better than the others do theirs: a guess of theirs."""
    for seed in range(4, 7):
        x = np.random.default_rng(seed).normal(size=(200, 400))
        x -= x.mean(0)
        x = x @ np.linalg.svd(x, full_matrices=False)[2][:40].T
        fold = np.random.default_rng(seed).permutation(200) % 4
        for split in split_class(x, seed):
            assert max(abs(np.corrcoef(split.upper, fold == k)[0, 1]) for k in range(4)) < 0.9


def test_a_probe_that_does_not_know_a_class_cannot_contradict_its_labels():
    assert decide([finding(agreement=0.0, reference=0.1)], 0.8, 10, Settings())[0] == "clean"


def test_where_a_sample_leans_is_read_without_it():
    rng = np.random.default_rng(1)
    noise, part = rng.normal(size=(200, 2_000)), np.arange(200) < 60
    assert abs(leaning(noise, part, 0)[part].mean() - leaning(noise, part, 0)[~part].mean()) < 3  # not from its own
    told = noise + 0.3 * part[:, None]
    places = leaning(told, part, 0)
    assert places[part].min() > places[~part].max()
    assert not leaning(noise, np.zeros(200, bool), 0).any()


@pytest.mark.parametrize(
    ("samples", "epochs", "shift"), [(300, 23, 0.125), (3_000, 16, 0.125), (10_000, 6, 0.0625), (50_000, 2, 0.0625)]
)
def test_however_small_the_budget_a_probe_sees_enough_and_no_image_too_often_alike(samples, epochs, shift):
    run = SimpleNamespace(settings=Settings(), spend=0.1, store=SimpleNamespace(readable=np.arange(samples)))
    recipe = recipe_for(run, samples, 0.5, Settings().warmup_shift)
    assert (recipe.epochs, recipe.shift) == (epochs, shift)
