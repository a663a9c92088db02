import math

import pytest
import torch

from trainguard.purification.families import BEND, CYCLES, KNOTS, RADIUS, Pixels, Warp, Wave, families


@pytest.fixture
def images():
    return 0.3 + 0.4 * torch.rand(6, 3, 32, 24, generator=torch.Generator().manual_seed(0))


def climbed(family, x, slope, steps=5):
    """The images after some steps up a slope that is the same everywhere."""
    for _ in range(steps):
        family.climb(family.on(x), slope)
    return family.on(x)


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("together", [False, True])
def test_pixels_reach_the_corner_of_the_ball_that_is_asked_for(images, together):
    slope = torch.randn(images.shape, generator=numbers(1))
    change = climbed(Pixels(images, together=together, far=True, generator=numbers()), images, slope, 7) - images
    corner = RADIUS * (slope.mean(0, keepdim=True) if together else slope).sign().expand_as(images)
    assert torch.allclose(change, corner, atol=1e-6)


def test_pixels_start_at_zero_or_at_random_within_the_ball(images):
    near, far = (Pixels(images, together=False, far=far, generator=numbers()).on(images) - images for far in (0, 1))
    assert near.abs().max() == 0 and 0.9 * RADIUS < far.abs().max() <= RADIUS + 1e-6


@pytest.mark.parametrize("cycles", [(6, 0), (0, 5), (3, 4), (-3, 4)])
def test_a_wave_takes_on_the_frequency_that_the_slopes_ask_for(images, cycles):
    rows, columns = torch.arange(32)[:, None] / 32, torch.arange(24) / 24
    asked = torch.sin(2 * math.pi * (cycles[0] * rows + cycles[1] * columns) + 0.7)
    noise = 0.3 * torch.randn(images.shape, generator=numbers(2))
    change = climbed(Wave(images, generator=numbers()), images, asked + noise) - images
    assert change.abs().max() == pytest.approx(RADIUS, abs=1e-5)
    likeness = (change * asked).flatten(1).sum(1) / (change.flatten(1).norm(dim=1) * asked.norm() * 3**0.5)
    assert (likeness > 0.98).all()


def test_waves_are_slow_and_leave_the_brightness_alone(images):
    """A checkerboard is asked for, and a brighter image: neither is a wave of this family."""
    board = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(24)) + 0.5
    noise = 1e-3 * torch.randn(images.shape, generator=numbers(3))
    change = (climbed(Wave(images, generator=numbers()), images, board + noise) - images)[:, 0]
    spectrum = torch.fft.fft2(change).abs()
    frequencies = torch.maximum(torch.fft.fftfreq(32).abs()[:, None], torch.fft.fftfreq(24).abs()).flatten()
    strongest = frequencies[spectrum.flatten(1).argmax(1)]
    assert (strongest > 0).all() and (strongest <= CYCLES).all() and change.mean((1, 2)).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [2, 3])
def test_a_warp_moves_a_blob_to_where_it_is_asked_for(axis):
    place = [torch.arange(side, dtype=torch.float32) for side in (32, 32)]
    blob = torch.exp(-((place[0][:, None] - 15.5) ** 2 + (place[1] - 15.5) ** 2) / 18).expand(2, 3, 32, 32)
    ramp = (place[1] if axis == 3 else place[0][:, None]).expand(2, 3, 32, 32) - 15.5

    def middle(x):
        return (x * ramp).sum((1, 2, 3)) / x.sum((1, 2, 3))

    moved = climbed(Warp(blob, generator=numbers()), blob, ramp)
    assert (middle(moved) - middle(blob) > 0.5).all()
    assert moved.min() >= 0 and moved.max() <= 1


def test_a_warp_stays_within_its_bounds_and_begins_somewhere(images):
    warp = Warp(images, generator=numbers())
    assert warp.knots.shape == (6, KNOTS, KNOTS, 2) and 0.5 * BEND < warp.knots.abs().max() <= 2 * BEND
    climbed(warp, images, torch.randn(images.shape, generator=numbers(1)), 20)
    assert warp.knots.abs().max() <= 2 * BEND + 1e-6
    warp.knots = torch.zeros_like(warp.knots)
    assert torch.allclose(warp.on(images), images, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 8, 8), (5, 1, 9, 7), (33, 3, 16, 16)])
def test_every_image_has_a_search_whatever_the_size(shape):
    x = torch.rand(shape, generator=numbers())
    searches = families(x, far=True, generator=numbers())
    counts = [count for _, count in searches]
    assert sum(counts) == len(x) and counts[0] >= 1
    for (family, _), part in zip(searches, x.split(counts), strict=True):
        moved = climbed(family, part, torch.randn(part.shape, generator=numbers(1)), 2)
        assert moved.shape == part.shape and moved.isfinite().all()
        assert moved.min() >= 0 and moved.max() <= 1


def test_a_quarter_shares_one_change_and_the_draws_repeat_themselves(images):
    x = images.repeat(6, 1, 1, 1)[:32]

    def changes(seed):
        searches = families(x, far=True, generator=numbers(seed))
        parts = x.split([count for _, count in searches])
        return [family.on(part) - part for (family, _), part in zip(searches, parts, strict=True)]

    one, same, other = changes(0), changes(0), changes(1)
    assert [len(part) for part in one] == [10, 8, 6, 8]
    assert torch.allclose(one[1], one[1][:1], atol=1e-6) and not torch.allclose(one[0][1:], one[0][:1], atol=1e-2)
    for first, second, third in zip(one, same, other, strict=True):
        assert torch.equal(first, second) and not torch.equal(first, third)
