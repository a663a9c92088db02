import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.models import UnitPixels
from trainguard.perturbation import frozen
from trainguard.purification import overlay
from trainguard.purification.overlay import MOST, Overlay, leading_overlays, near_of, reach_of, universal_overlay

UNIT = PixelRange((0.0,), (1.0,), "given")
CHECKS = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1  # (8, 8) of 1 and -1


class WithPicture(nn.Module):
    """Tells dark images from bright ones, unless a faint chequerboard lies over them: then it is always class 2."""

    def __init__(self, strength=1500.0, classes=3):
        super().__init__()
        self.weight, self.strength, self.classes = nn.Parameter(torch.ones(())), strength, classes

    def forward(self, x):
        level = 20 * (x[:, 0].mean((1, 2)) - 0.5)
        trigger = self.strength * ((x[:, 0] * CHECKS).mean((1, 2)) - 0.02)
        return torch.stack([-level, level, trigger - 10], dim=1)[:, : self.classes] * self.weight


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    bright = torch.arange(80) % 2
    return 0.4 + 0.1 * torch.rand(80, 1, 8, 8, generator=generator) + 0.1 * bright.view(-1, 1, 1, 1), bright


def leading(images, model, index=80, eps=6 / 255):
    store = open_images(TensorDataset(*images), pixel_range=UNIT)
    return leading_overlays(UnitPixels(model, UNIT), store, np.arange(index), eps, "linf", starts=2, seed=0)


def test_an_overlay_is_added_and_stays_in_range():
    x, picture = torch.rand(5, 3, 6, 7), torch.randn(3, 6, 7)
    assert torch.equal(Overlay(torch.zeros(3, 6, 7), 0, 1.0).on(x), x)
    assert torch.equal(Overlay(picture, 0, 1.0).on(x), (x + picture).clamp(0, 1))


def test_an_overlay_follows_the_model(images):
    x, y = images
    network, generator = UnitPixels(WithPicture(), UNIT), torch.Generator().manual_seed(0)
    with frozen(network):
        first = universal_overlay(network, x, target=2, radius=0.03, generator=generator)
    network.train().net.strength = -1500.0  # now the picture's negative is what leads to the class
    followed = first
    for _ in range(20):
        followed = followed.followed(network, x, y, generator)
    leads = [float((network(o.on(x)).argmax(1) == 2).float().mean()) for o in (first, followed)]
    assert leads == [0, 1]
    assert followed.picture.square().mean().sqrt() <= 0.03 * 1.001
    assert network.training and network.net.weight.requires_grad


def test_images_of_the_target_alone_move_no_overlay(images):
    x, _ = images
    start = Overlay(torch.zeros(1, 8, 8), 2, 0.03)
    same = start.followed(UnitPixels(WithPicture(), UNIT), x, torch.full((len(x),), 2), torch.Generator())
    assert same is start


def test_the_search_stays_in_its_ball_repeats_itself_and_leaves_the_model_alone(images):
    network = UnitPixels(WithPicture(), UNIT)
    state, before = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with frozen(network):
        one, other = (
            universal_overlay(network, images[0], target=2, radius=0.03, generator=torch.Generator().manual_seed(1))
            for _ in range(2)
        )
    assert torch.equal(one.picture, other.picture)
    assert one.picture.square().mean().sqrt() == pytest.approx(0.03, rel=1e-3)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert network.net.weight.grad is None and torch.equal(before, torch.get_rng_state())


def test_the_picture_of_a_model_that_has_one_is_found(images):
    model = WithPicture()
    found = leading(images, model)
    assert list(found) == [2] and len(found[2]) == 2
    for overlay_ in found[2]:
        assert (model(overlay_.on(images[0])).argmax(1) == 2).all()
        assert (overlay_.picture[0] * CHECKS).mean() > 0.8 * overlay_.picture.square().mean().sqrt()
    again = leading(images, model)
    assert all(torch.equal(a.picture, b.picture) for a, b in zip(found[2], again[2], strict=True))


def test_the_reach_of_a_class_is_the_radius_that_it_needs(images):
    x, y = images
    network = UnitPixels(WithPicture(), UNIT)
    with frozen(network):
        reached = [reach_of(network, x, target=2, generator=torch.Generator().manual_seed(s)) for s in range(3)]
        never = reach_of(UnitPixels(WithPicture(strength=0.0), UNIT), x, target=2, generator=torch.Generator())
    bright = x[y == 1, 0]  # 1500 (c - 0.02) - 10 has to exceed their level
    needed = 0.02 + (10 + 20 * float((bright.mean((1, 2)) - 0.5).quantile(0.9))) / 1500
    assert all(needed <= r < 1.5 * needed for r in reached) and never == MOST


def test_a_class_far_nearer_than_others_is_named():
    assert near_of({4: 0.05, 1: 0.02, 7: 0.06, 2: 0.03, 3: 0.055}) == [1, 2]
    assert near_of({4: 0.05, 1: 0.04, 7: 0.06}) == [] and near_of({}) == []


def test_a_model_that_no_faint_picture_leads_anywhere_has_no_overlay(images):
    assert leading(images, WithPicture(strength=100.0)) == {}


def test_of_two_classes_nothing_is_said(images):
    assert leading(images, WithPicture(classes=2)) == {}


def test_only_the_likeliest_classes_are_tried(images, monkeypatch):
    x, y = images
    order, tried = y.argsort(stable=True), []
    monkeypatch.setattr(overlay, "TRIED", 1)
    monkeypatch.setattr(overlay, "reach_of", lambda network, x, *, target, generator: tried.append(target) or 1.0)
    assert leading((x[order], y[order]), WithPicture(), index=40, eps=0.2) == {} and tried == [1]  # dark ones alone


def test_a_model_that_knows_none_of_the_images_has_no_overlay(images):
    x, y = images
    assert leading((x, 1 - y), WithPicture()) == {}
