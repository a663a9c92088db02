"""Which part of a class is suspected, and whether its difference is a trigger."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from findings import finding
from torch.utils.data import TensorDataset

from trainguard import training
from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.screening.identification import (
    Trial,
    Witness,
    bystanders,
    decide,
    diversity,
    kinds_of,
    orient,
    transfers,
    triggers,
)
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings


@pytest.mark.parametrize("still", [1e-3, 1.0, 1e3])
def test_a_part_that_is_nearly_all_of_its_class_is_not_the_suspected_one(still):
    upper = np.arange(100) < 90
    split, divergence = Split(upper * 1.0, upper * 1.0, 6.0, 0.05), np.where(upper, 1.0, still).astype(np.float32)
    for one in (split, split.turned()):
        assert np.array_equal(orient(one, divergence, (0.0, 0.0)).upper, ~upper)
    assert np.array_equal(orient(split, np.where(upper, 1e-3, 1e3), (0.9, 0.0), left=0.05).upper, upper)  # crowded


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


def test_a_class_without_samples_is_nobodys_next_best():
    answers = np.random.default_rng(0).normal(size=(60, 40)).astype(np.float32)
    answers[:, 10:] += 3
    sizes = np.where(np.arange(40) < 10, 100, 0)
    usual = kinds_of(answers[:, :10], 0, sizes[:10], seed=0)
    assert kinds_of(answers, 0, sizes, seed=0) == pytest.approx(usual, abs=0.01) and usual > 0.9
    assert kinds_of(answers[:, :12], 0, sizes[:10], seed=0) < 0.4  # a model of more classes than the data have
    assert kinds_of(answers[:, :10], 0, sizes, seed=0) > 0.9  # and one without those that have only a name


@pytest.mark.parametrize("rare", [1, 6, 30, 200])
def test_of_one_class_that_is_most_of_the_data_the_others_still_speak(rare):
    labels = torch.where(torch.arange(1000) < rare, 1, 0)
    labels[:2] = 1
    store = open_images(TensorDataset(torch.rand(1000, 1, 4, 4), labels), pixel_range=None)
    images, chosen = bystanders(store, seed=0)
    assert len(images) == 250 and (chosen == 1).sum() >= min(max(2, rare), 30)


def test_means_and_what_they_move_are_the_same_whatever_is_held_at_once(monkeypatch):
    images = torch.rand(120, 1, 6, 6)
    store = open_images(TensorDataset(images, torch.arange(120) % 3), pixel_range=None)
    members = np.flatnonzero(store.labels == 0)
    split = Split(members % 2 * 1.0, members % 2 * 1.0, 6.0, 0.05)

    def looked():
        trial = Trial.of(split, members, 0, store, bystanders(store, seed=0), seed=0)
        witness = Witness(lambda pixels: (pixels.mean((1, 2, 3)) * 40).astype(np.int64) % 3, trial.images)
        return trial, witness.before, witness.after(trial, 1)

    (whole, *said), images_at_once = looked(), training.at_once(store.shape)
    monkeypatch.setattr(training, "LARGE", 1)
    assert images_at_once == 512 and training.at_once(store.shape) == 14  # of parts of 20
    few, *said_of_few = looked()
    assert few.likeness == pytest.approx(whole.likeness, rel=1e-4)
    np.testing.assert_allclose(few.difference, whole.difference, atol=1e-6)
    assert all(np.array_equal(one, other) for one, other in zip(said, said_of_few, strict=True))
    assert len(said[0]) == 120 and len(said[1]) == 80


def test_without_another_classs_image_a_difference_moves_none():
    images = torch.rand(40, 1, 4, 4)
    store = open_images(TensorDataset(images, torch.arange(40) % 2), pixel_range=None)
    split = Split(np.r_[np.zeros(10), np.ones(10)], np.r_[np.zeros(10), np.ones(10)], 6.0, 0.05)
    only = (images * 255).byte().numpy(), np.zeros(40, dtype=np.int64)
    trial = Trial.of(split, np.arange(0, 40, 2), 0, store, only, seed=0)
    assert transfers(trial, Witness(lambda pixels: np.zeros(len(pixels), dtype=int), only[0])) == (0.0, 0.0)


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


def test_a_set_of_small_classes_is_not_called_clean():
    assert decide([], 0.8, 10, Settings())[:2] == ("clean", 1.0)
    verdict, sure, reason, _ = decide([], 0.8, 10, Settings(), looked=0.9)
    assert verdict == "clean" and sure == pytest.approx(0.9) and "10.0% of the samples" in reason
    verdict, sure, reason, _ = decide([], 0.8, 10, Settings(), looked=0.4)
    assert (verdict, sure) == ("undecided", 0.0) and "60% of the samples are in classes of fewer than 30" in reason
