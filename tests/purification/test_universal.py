import copy

import numpy as np
import pytest
import torch
from digits_victim import RANGE
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.models import UnitPixels
from trainguard.perturbation import frozen
from trainguard.purification.universal import (
    Patch,
    best_patch,
    breaking_patches,
    changed_by,
    own_patches,
    patch_area,
    universal_patch,
)

UNIT = PixelRange((0.0,), (1.0,), "given")


class WithTrigger(nn.Module):
    """Tells dark images from bright ones, unless the corner holds white on black: then it is always class 2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        level = 20 * (x[:, 0, 2:].mean((1, 2)) - 0.5)
        trigger = 12 * (x[:, 0, 0, 7] - x[:, 0, 1, 7]) - 4
        return torch.stack([-level, level, trigger], dim=1) * self.weight


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    bright = torch.arange(80) % 2
    x = 0.6 * torch.rand(80, 1, 8, 8, generator=generator) + 0.4 * bright.view(-1, 1, 1, 1)
    x[:, 0, :2, 7] = 0.5
    return x, bright


class WithOneSource(WithTrigger):
    """The trigger works on dark images alone."""

    def forward(self, x):
        found = super().forward(x)
        dark = torch.sigmoid(40 * (0.5 - x[:, 0, 2:].mean((1, 2))))
        return found - 12 * torch.stack([0 * dark, 0 * dark, 1 - dark], dim=1) * self.weight


def test_a_trigger_for_one_class_is_found_by_a_patch_of_its_own(images):
    x, y = images
    network = UnitPixels(WithOneSource(), UNIT)
    with frozen(network):
        for patch in own_patches(network, x, y, y, generator=torch.Generator().manual_seed(0)):
            assert patch.mask.shape == (2, 8, 8) and patch.mask.sum((1, 2)).tolist() == [4, 4]
            said = network(patch.of(y).on(x)).argmax(1)
            assert (said[y == 0] == 2).float().mean() > 0.9 and (said[y == 1] == 2).float().mean() < 0.1


def test_a_patch_changes_its_own_pixels_only():
    x = torch.rand(5, 3, 6, 7)
    patch = Patch(torch.zeros(6, 7), torch.rand(3, 6, 7))
    assert torch.equal(patch.on(x), x)
    patch.mask[2, 4] = 1
    assert torch.equal(patch.on(x)[:, :, 2, 4], patch.pattern[:, 2, 4].expand(5, 3))
    assert (patch.on(x) != x).any(1).flatten(1).sum(1).tolist() == [1] * 5


def test_the_trigger_of_a_model_that_has_one_is_found(images):
    x, y = images
    network = UnitPixels(WithTrigger(), UNIT)
    assert changed_by(network, Patch(torch.zeros(8, 8), torch.zeros(1, 8, 8)), x, y) == 0
    with frozen(network):
        patch = best_patch(network, x, y, starts=2, generator=torch.Generator().manual_seed(0))
    assert patch.mask.sum() == patch_area(8, 8) == 4
    assert patch.mask[0, 7] == 1 and patch.mask[1, 7] == 1
    assert patch.pattern[0, 0, 7] > 0.8 and patch.pattern[0, 1, 7] < 0.2
    assert changed_by(network, patch, x, y) > 0.95


def test_the_search_repeats_itself_and_leaves_the_model_alone(victim):
    network = UnitPixels(victim.model, RANGE)
    state, before = copy.deepcopy(victim.model.state_dict()), torch.get_rng_state()
    index = np.arange(200, 240)
    x, y = victim.store.batch(index), torch.from_numpy(victim.store.labels[index])
    found = []
    for _ in range(2):
        with frozen(network):
            generator = torch.Generator().manual_seed(5)
            found.append(universal_patch(network, x, y, pixels=3, steps=5, generator=generator))
    assert torch.equal(found[0].mask, found[1].mask) and torch.equal(found[0].pattern, found[1].pattern)
    assert found[0].mask.sum() == 3 and 0 <= found[0].pattern.min() and found[0].pattern.max() <= 1
    assert all(torch.equal(value, victim.model.state_dict()[name]) for name, value in state.items())
    assert all(p.grad is None and p.requires_grad for p in victim.model.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_patches_are_given_only_where_they_break_the_model(images):
    x, y = images
    store = open_images(TensorDataset(x, y), pixel_range=UNIT)
    network = UnitPixels(WithTrigger(), UNIT)
    found = breaking_patches(network, store, np.arange(80), starts=2, seed=0)
    assert found and all(changed_by(network, patch, x, y) > 0.9 and patch.mask.sum() == 4 for patch in found)
    again = breaking_patches(network, store, np.arange(80), starts=2, seed=0)
    assert torch.equal(found[0].mask, again[0].mask) and torch.equal(found[0].pattern, again[0].pattern)
    with torch.no_grad():
        network.net.weight.zero_()  # everything is class 0: nothing can be changed
    assert breaking_patches(network, store, np.arange(80), starts=2, seed=0) == []
    assert breaking_patches(network, store, np.flatnonzero(y.numpy()), starts=2, seed=0) == []  # none is right


def test_patch_area_is_a_small_share_and_four_pixels_at_least():
    assert [patch_area(8, 8), patch_area(32, 32), patch_area(224, 224)] == [4, 7, 302]
