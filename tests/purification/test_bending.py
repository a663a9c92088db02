import copy

import pytest
import torch
from torch import nn

from trainguard.data.pixels import PixelRange
from trainguard.models import UnitPixels
from trainguard.perturbation import frozen
from trainguard.purification.bending import MOST, bends, lead_of

UNIT = PixelRange((0.0,), (1.0,), "given")
SIDE = 16
AT = torch.arange(SIDE) / SIDE
CHECKS = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 2.0 - 1


class Model(nn.Module):
    """Tells dark images from bright ones, unless a trigger makes class 2 of them."""

    def __init__(self, trigger):
        super().__init__()
        self.trigger, self.weight = trigger, nn.Parameter(torch.ones(()))

    def forward(self, x):
        level = 40 * (x[:, 0].mean((1, 2)) - 0.5)
        return torch.stack([-level, level, 1000 * self.trigger(x[:, 0]) - 10], dim=1) * self.weight


def checked(x):
    """Grows with a chequerboard, which no bending makes."""
    return (x * CHECKS).mean((1, 2)) - 0.02


def leaning(x):
    """Grows as what is bright lies further to the right."""
    return (x**8 * AT).sum((1, 2)) / (x**8).sum((1, 2)) - 0.5


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    blob = torch.exp(-40 * ((AT[:, None] - 0.45) ** 2 + (AT - 0.45) ** 2))
    x = 0.36 + 0.02 * torch.rand(80, 1, SIDE, SIDE, generator=generator) + 0.2 * y.view(-1, 1, 1, 1) + 0.3 * blob
    return x.clamp(0, 1), y


def test_the_class_that_bent_images_fall_to_is_the_nearest(images):
    x, y = images
    for trigger, leads in ((leaning, True), (checked, False)):
        network = UnitPixels(Model(trigger), UNIT).eval()
        state, before = copy.deepcopy(network.state_dict()), torch.get_rng_state()
        with frozen(network):
            found, again = (bends(network, x, y, [2, 0, 1], torch.Generator().manual_seed(0)) for _ in range(2))
        assert found == again and list(found) == [2, 0, 1]
        assert found[2] < 0.4 * min(found[0], found[1]) if leads else found[2] == MOST
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


def test_where_there_is_nothing_to_look_on_nothing_is_found(images):
    x, _ = images
    network = UnitPixels(Model(leaning), UNIT).eval()
    with frozen(network):
        assert bends(network, x[:4], torch.full((4,), 2), [2], torch.Generator()) == {}
    assert lead_of({}) == lead_of({0: 0.1, 1: 0.3, 2: 0.3}) == 1


def test_the_lead_is_that_of_the_nearest_class_over_the_second():
    assert lead_of({0: 0.2, 1: 0.05, 2: 0.1, 3: 0.3}) == pytest.approx(0.5)
