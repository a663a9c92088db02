"""What shows among pixels: a faint picture that no probe has learned, and that natural images have nothing like it."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import gaussian_blur

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.screening import classes as classes_module
from trainguard.screening.classes import Classes, _seen, _with_pixels
from trainguard.screening.finding import Finding
from trainguard.screening.pixelview import FAINT, SIDE, PixelView, flat, looks_for, side_for, texture
from trainguard.screening.probe import Probe
from trainguard.screening.separation import Split, split_class
from trainguard.screening.settings import Settings
from trainguard.screening.surroundings import Surroundings

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def smooth(count, side, seed=0):
    """Images of low frequencies, as natural ones mostly are, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 0.5 + 0.15 * torch.randn(count, 3, 4, 4, generator=generator)
    coarse = F.interpolate(coarse, (side, side), mode="bicubic")
    return (coarse + 0.02 * torch.randn(coarse.shape, generator=generator)).clamp(0, 1)


def seen(view, pixels):
    return view(pixels, view.widest(pixels, seed=0))


def test_a_faint_picture_on_a_fifth_of_a_class_is_set_apart():
    images = smooth(3000, 16)
    bad = torch.arange(0, 600, 3)  # of class 0
    pattern = 8 / 255 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5)).sign()
    images[bad] = (images[bad] + pattern).clamp(0, 1)
    labels = np.arange(3000) % 3
    pixels = flat(images, 16).numpy()
    view = PixelView.fit(pixels, labels)
    members = np.flatnonzero(labels == 0)
    first = split_class(seen(view, pixels[members]), seed=0)[0]
    upper = first.upper if first.upper.mean() < 0.5 else ~first.upper
    assert set(members[upper]) == set(bad.tolist()) and first.distance > 5 and first.valley < 0.1
    clean = split_class(seen(view, pixels[members + 1]), seed=0)
    assert not any(Finding(1, members, split).is_apart(Settings()) for split in clean)


@pytest.mark.parametrize(("count", "side", "seen"), [(60, 16, 2), (900, 16, 10), (900, 8, 8), (50_000, 64, SIDE)])
def test_pictures_have_fewer_numbers_than_there_are_samples(count, side, seen):
    images = smooth(2, side)
    assert flat(images, side_for((3, side, side), count)).shape == (2, 3 * seen**2)


def test_small_images_stay_as_they_are_and_large_ones_are_averaged():
    images = smooth(4, 16)
    assert torch.equal(flat(images, 32), images.flatten(1))
    assert torch.allclose(flat(images, 8)[0, 0], images[0, 0, :2, :2].mean())


def test_the_widest_directions_are_those_of_a_whole_decomposition_and_repeat_with_the_seed():
    pixels, labels = flat(smooth(900, 8), 8).numpy(), np.arange(900) % 3
    view, own = PixelView.fit(pixels, labels), pixels[labels == 0]
    lines = view.widest(own, seed=3)
    assert lines.shape == (192, 60) and np.array_equal(lines, view.widest(own, seed=3))
    white = np.linalg.solve(view.root, ((own - view.mean) / view.scale).T).T
    values, _ = np.linalg.eigh(np.cov(white.T))
    spread = view(own, lines).var(0, ddof=1)
    assert np.allclose(spread[:5], values[::-1][:5], rtol=0.02) and spread.sum() > 0.97 * values[-60:].sum()


def test_pieces_of_a_picture_are_set_apart_that_few_random_directions_lose():
    images = smooth(6000, 32)
    bad = torch.arange(0, 900, 3)  # of class 0
    rng = torch.Generator().manual_seed(5)
    shown = (torch.rand(len(bad), 1, 4, 4, generator=rng) < 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    images[bad] += 4 / 255 * torch.randn(3, 32, 32, generator=rng).sign() * shown
    labels = np.arange(6000) % 3
    pixels = flat(images, 32).numpy()
    own = pixels[labels == 0]
    first = split_class(seen(PixelView.fit(pixels, labels), own), seed=0)[0]
    upper = first.upper if first.upper.mean() < 0.5 else ~first.upper
    assert np.array_equal(np.flatnonzero(upper), np.arange(300)) and first.distance > 5 and first.valley < 0.1


def split(distance, valley, upper):
    return Split(upper, upper, distance, valley)


HALF, OTHER = np.r_[np.zeros(70), np.ones(30)], np.r_[np.ones(30), np.zeros(70)]


@pytest.mark.parametrize(
    ("feature", "pixels", "expected"),
    [
        (split(3.2, 0.5, HALF), split(6.0, 0.1, HALF), [6.0]),  # cut alike: the clearer one
        (split(3.2, 0.5, HALF), split(2.9, 0.5, HALF), [3.2]),
        (split(4.5, 0.1, HALF), split(7.3, 0.0, HALF), [7.3]),
        (split(5.5, 0.1, HALF), split(9.0, 0.0, HALF), [9.0]),  # however clear the other one is
        (split(3.2, 0.5, HALF), split(6.0, 0.1, OTHER), [6.0, 3.2]),  # another part
        (split(1.5, 1.0, HALF), split(6.0, 0.1, HALF), [6.0, 1.5]),  # no candidate: kept as what was looked at
        (split(3.2, 0.5, HALF), split(2.0, 1.0, OTHER), [3.2]),  # nothing set apart among pixels
    ],
)
def test_of_features_and_pixels_the_clearer_one_speaks(feature, pixels, expected):
    base = Finding(0, np.arange(100), feature)
    found = _with_pixels([base], [replace(base, split=pixels)], Settings())
    assert [finding.split.distance for finding in found] == expected


def test_detail_is_the_energy_of_the_cosines_of_every_place():
    image = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(image, (4, 4))  # 4 x 4 places
    energies = dctn(windows, axes=(2, 3), norm="ortho").reshape(4, 4, 16)[:, :, 1:] ** 2
    for cells in (1, 2):
        means = energies.reshape(cells, 4 // cells, cells, 4 // cells, 15).mean((1, 3)).transpose(2, 0, 1)
        found = texture(torch.from_numpy(image)[None, None], cells)
        assert np.allclose(found, np.log(means.ravel() + FAINT), atol=1e-4)


def test_colours_are_told_from_brightness_and_nothing_is_lost_to_half_precision():
    grey = smooth(5, 16).mean(1, keepdim=True).repeat(1, 3, 1, 1)
    energy = texture(grey, 2).reshape(5, 3, 15, 4)
    assert torch.allclose(energy[:, 1:], torch.tensor(FAINT).log(), atol=1e-3) and (energy[:, 0] > -10).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(texture(grey, 2), energy.flatten(1))


@pytest.mark.parametrize(
    ("shape", "samples", "numbers"),
    [
        ((3, 32, 32), 10_000, 45 * 64),
        ((3, 32, 32), 900, 45 * 4),
        ((3, 140, 130), 10_000, 45 * 64),
        ((1, 8, 8), 900, 15 * 16),
        ((2, 5, 4), 900, 30),
        ((3, 32, 32), 100, None),  # so few tell nothing of so many numbers
        ((3, 3, 9), 900, None),  # too small for any detail
    ],
)
def test_detail_is_looked_at_where_there_is_any_and_samples_enough(shape, samples, numbers):
    pixels, *more = looks_for(shape, samples)
    images = torch.rand(70, *shape)
    assert [look(images).shape for look in more] == ([] if numbers is None else [(70, numbers)])
    assert len(pixels(images)) == 70


def test_images_that_are_hardly_out_of_focus_are_set_apart_by_their_detail_alone():
    images = smooth(3000, 16)
    images += 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    bad = torch.arange(0, 600, 3)  # of class 0
    images[bad] = gaussian_blur(images[bad], [3, 3], [0.45, 0.45])
    labels = np.arange(3000) % 3
    members = np.flatnonzero(labels == 0)
    flattened, detailed = (look(images).numpy() for look in looks_for((3, 16, 16), 3000))
    first = split_class(seen(PixelView.fit(detailed, labels), detailed[members]), seed=0)[0]
    upper = first.upper if first.upper.mean() < 0.5 else ~first.upper
    assert len(set(members[upper]) ^ set(bad.tolist())) < 5 and first.distance > 5 and first.valley < 0.1
    plain = split_class(seen(PixelView.fit(flattened, labels), flattened[members]), seed=0)
    assert not any(Finding(0, members, split).is_apart(Settings()) for split in plain)


def test_of_a_large_class_some_are_held_at_once_and_all_come_back_in_order(monkeypatch):
    drawn = []

    class View:
        def widest(self, pixels, seed):
            drawn.append(pixels[:, 0])
            return "lines"

        def __call__(self, pixels, lines):
            assert lines == "lines" and len(pixels) <= 8
            return pixels

    monkeypatch.setattr(classes_module, "AT_ONCE", 8)
    monkeypatch.setattr(
        classes_module, "_seen", lambda run, probe, looks, index: (None, index[:, None], -index[:, None])
    )
    classes = Classes(SimpleNamespace(seed=0), None, None, None, lambda x: 2 * x, (), (View(),), None)
    members = np.arange(100, 140, 2)
    whitened, view = classes.read(members)
    assert np.array_equal(whitened[:, 0], 2 * members) and np.array_equal(view[:, 0], -members)
    (first,) = drawn  # the directions come from samples of everywhere, not from those that came first
    assert len(first) == 8 and first.min() < -124
    for seen, wanted in zip(classes.views_of(members), (whitened, view), strict=True):
        assert np.array_equal(seen, wanted)


def test_few_samples_are_looked_at_once_and_many_again(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, 300)
    unit = PixelRange.from_mean_std((0.0,), (1.0,))
    store = open_images(TensorDataset(smooth(300, 16), torch.from_numpy(labels)), pixel_range=unit)
    run = SimpleNamespace(seed=0, store=store, processes=Processes())
    probe = Probe(store.shape, 3, torch.full((3,), 0.5), torch.full((3,), 0.2))
    classes = Classes.of(run, probe, None)
    members, (answers, *again) = classes.members(1), _seen(run, probe, classes.looks, classes.members(1))
    assert np.allclose(classes.answers[members], answers, atol=1e-2)
    with monkeypatch.context() as patched:
        patched.setattr(classes_module, "_seen", None)  # nothing asks the probe a second time
        for seen, wanted in zip(classes.seen(members), again, strict=True):
            assert np.allclose(seen, wanted, atol=1e-2)
        assert len(classes.seen(members, looking=False)) == 1
    monkeypatch.setattr(classes_module, "FITTED", 200)
    many = Classes.of(run, probe, None)
    assert many.slots is None and np.array_equal(many.seen(members)[0], again[0])


@pytest.mark.parametrize("shape, shown", [((3, 12, 40), (16, 40)), ((3, 40, 12), (40, 16)), ((1, 8, 8), (16, 16))])
def test_small_images_are_enlarged_and_only_along_their_short_side(shape, shown):
    probe = Probe(shape, 3, torch.full((shape[0],), 0.5), torch.full((shape[0],), 0.2)).eval()
    seen = []
    probe.stem.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
    assert probe(torch.rand(2, *shape)).shape == (2, 3) and seen == [shown]


def test_a_class_is_looked_at_once_and_the_second_time_says_the_same(monkeypatch):
    rng, asked = np.random.default_rng(0), []
    features, numbers = rng.normal(size=(400, 6)), rng.normal(size=(400, 6))
    numbers[:80, 0] += 12  # what the features do not show

    class View:
        def widest(self, pixels, seed):
            return None

        def __call__(self, pixels, lines):
            return pixels

    def seen(run, probe, looks, index):
        asked.append(len(looks))
        return [None, features[index], *(numbers[index] for _ in looks)]

    monkeypatch.setattr(classes_module, "_seen", seen)
    labels = np.zeros(400, dtype=np.int64)
    run = SimpleNamespace(
        seed=0, settings=Settings(), store=SimpleNamespace(labels=labels, readable=np.arange(400)), trained=None
    )
    answers = rng.normal(size=(400, 3)).astype(np.float32)
    classes = Classes(run, None, answers, None, lambda x: x, ("look",), (View(),), np.array([400, 0, 0]))
    first, second = classes.splits([0])[0], classes.splits([0])[0]
    assert asked == [1, 0]
    assert any(f.pixels and f.split.smaller[:80].all() and f.split.smaller.sum() == 80 for f in first)
    assert [f.pixels for f in first] == [f.pixels for f in second]
    assert all(np.array_equal(a.split.position, b.split.position) for a, b in zip(first, second, strict=True))


def test_classes_are_looked_into_at_once_as_one_by_one(monkeypatch):
    images, labels = smooth(900, 16), np.arange(900) % 3
    images[:270:3, :, :3, :3] = 1.0  # of class 0
    unit = PixelRange.from_mean_std((0.0,) * 3, (1.0,) * 3)
    store = open_images(TensorDataset(images, torch.from_numpy(labels)), pixel_range=unit)
    run = SimpleNamespace(seed=0, store=store, processes=Processes(), settings=Settings(), trained=None)
    probe = Probe(store.shape, 3, torch.full((3,), 0.5), torch.full((3,), 0.2))
    found, filters = [], list(warnings.filters)
    for threads in (1, 3):
        monkeypatch.setattr(classes_module, "MOST_THREADS", threads)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        classes = Classes.of(run, probe, None)
        found.append(classes.splits([2, 0, 1]))
    assert [*found[0]] == [*found[1]] == [2, 0, 1] and warnings.filters == filters
    for one, other in zip(*([part for some in parts.values() for part in some] for parts in found), strict=True):
        assert one.label == other.label and np.array_equal(one.split.position, other.split.position)
    assert any(f.split.smaller[:90].all() and f.split.smaller.sum() == 90 for f in found[0][0])


def test_other_classes_images_lie_with_the_part_that_has_no_trigger():
    images, labels = smooth(3000, 16), np.arange(3000) % 3
    bad = np.arange(0, 3000, 6)  # half of class 0: noise that is drawn anew for each image
    noise = torch.randn(500, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    images[bad] = (images[bad] + 0.05 * noise).clamp(0, 1)
    bearings, members = bearings_of(images, labels)
    assert np.array_equal(bearings.chosen, np.arange(1000)) and 1250 < len(bearings.others) < 1400
    told, elsewhere = bearings(np.isin(members, bad))
    assert told > 0.97 and elsewhere < 0.01
    assert bearings(~np.isin(members, bad)) == pytest.approx((told, 1 - elsewhere), abs=0.01)
    assert bearings(np.arange(1000) < 500)[0] == pytest.approx(0.5, abs=0.1)  # fine detail says nothing of these parts
    assert bearings(np.zeros(1000, dtype=bool)) == (0.5, 0.5)
    assert replace(bearings, others=bearings.others[:10])(np.isin(members, bad)) == (0.5, 0.5)


def bearings_of(images, labels):
    """Of class 0, among two thousand samples of all classes, as a screening looks at them."""
    store = open_images(
        TensorDataset(images, torch.from_numpy(labels)), pixel_range=PixelRange.from_mean_std((0.0,), (1.0,))
    )
    order = np.random.default_rng(0).permutation(len(labels))
    look = looks_for((3, 16, 16), len(labels))[-1]
    numbers = look(images[order]).numpy()
    around = Surroundings.of(look, PixelView.fit(numbers, labels[order]), numbers, labels[order])
    members, run = np.flatnonzero(labels == 0), SimpleNamespace(seed=0, store=store, processes=None)
    return around.of_class(run, nn.Conv2d(3, 1, 1), members, 0), members


def test_further_parts_of_a_class_are_far_apart_new_and_like_nothing_else():
    def part(first, count, distance=6.0, valley=0.05):
        own = np.isin(np.arange(500), np.arange(first, first + count)).astype(float)
        return Finding(0, np.arange(500), Split(own, own, distance, valley), pixels=True)

    run = SimpleNamespace(seed=0, settings=Settings())
    classes = Classes(run, None, None, None, None, (), (), np.array([500]))
    said = {60: (0.94, 0.0), 61: (0.85, 0.0), 62: (0.94, 0.1)}  # by the size of the part
    known, new = part(0, 60), part(100, 60)
    others = [part(200, 61), part(300, 62), part(40, 60), part(20, 60), part(400, 60, distance=3.5), part(90, 60)]
    seen = [*others, replace(new, split=part(100, 60, 7.0).split)]
    found = classes._further([known], seen, lambda: lambda own: said[int(own.sum())])
    assert [np.flatnonzero(f.split.upper)[0] for f in found] == [100, 40]
    assert len(classes._further([], seen, lambda: lambda own: said[int(own.sum())])) == 2
