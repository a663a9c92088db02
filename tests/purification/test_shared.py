import copy

import numpy as np
import pytest
import torch
from digits_victim import RANGE
from torch import nn

from trainguard.data.pixels import PixelRange
from trainguard.distributed import Processes
from trainguard.models import UnitPixels
from trainguard.progress import Progress
from trainguard.purification.defaults import (
    CLEAN,
    CLEAN_SHARED,
    CLEAN_WITH_TARGET,
    FLAGGED,
    PROGRESSIVE,
    SOUND,
    defaults_for,
)
from trainguard.purification.finetuning import FineTuning, fine_tune
from trainguard.purification.shared import shared_adversarial, unlearned
from trainguard.purification.state import Plan

UNIT = PixelRange((0.0,), (1.0,), "given")
STRIPES = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)


class Striped(nn.Module):
    """Tells dark images from bright ones; stripes, as far as it knows them, make class 2 of either."""

    def __init__(self, known=60.0):
        super().__init__()
        self.known = nn.Parameter(torch.tensor(known))

    def forward(self, x):
        level = 20 * (x[:, 0].mean((1, 2)) - 0.5)
        return torch.stack([-level, level, self.known * (x[:, 0] * STRIPES).mean((1, 2)) - 2], dim=1)


@pytest.fixture
def images():
    bright = torch.arange(16) % 2
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return 0.3 + 0.1 * x + 0.3 * bright.view(-1, 1, 1, 1), bright


def shared(net, infected, images, far=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return shared_adversarial(UnitPixels(net, UNIT), UnitPixels(infected, UNIT), *images, far=far, generator=generator)


@pytest.mark.parametrize("far", [False, True])
def test_what_both_models_know_is_found_in_the_ball(images, far):
    moved, classes = shared(Striped(), Striped(), images, far=far)
    pixels = slice(0, 9)  # of sixteen images five have pixels of their own, and four share them
    assert (classes[pixels] >= 0).all() and (classes[pixels] == 2).float().mean() > 0.8
    assert moved.min() >= 0 and moved.max() <= 1
    assert ((moved - images[0])[pixels] * STRIPES).mean() > 0.05
    assert len(moved) == len(classes) == 16


def test_what_only_one_model_knows_is_not_shared(images):
    assert (shared(Striped(0.0), Striped(), images)[1] != 2).all()
    assert (shared(Striped(), Striped(0.0), images)[1] != 2).all()


def test_the_search_repeats_itself_and_leaves_the_models_alone(images):
    net, before = Striped().train(), torch.get_rng_state()
    (one, _), (same, _), (other, _) = (shared(net, Striped(), images, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(before, torch.get_rng_state())
    assert net.training and net.known.requires_grad and net.known.grad is None


def test_a_single_image_and_a_batch_without_agreement_do(images):
    one = images[0][:1], images[1][:1]
    assert shared(Striped(), Striped(), one)[0].isfinite().all()
    assert unlearned(UnitPixels(Striped(), UNIT), images[0], torch.full((16,), -1)) == 0


def test_the_loss_is_the_disbelief_written_out(images):
    net = Striped()
    moved, classes = shared(net, Striped(), images)
    classes[:4] = -1
    loss = unlearned(UnitPixels(net, UNIT), moved, classes)
    said = net(moved).softmax(1)[4:, 2]
    assert loss.item() == pytest.approx(-(1 - said + 1e-4).log().sum().item() / 16, rel=1e-2)  # bf16
    loss.backward()
    assert net.known.grad > 0  # down with it


def test_fine_tuning_with_it_holds_batch_norm_and_unlearns(victim):
    """The victim's digits have a blended trigger; nothing is put on the images."""
    clean = np.flatnonzero(~victim.poisoned)[:256]
    net = UnitPixels(copy.deepcopy(victim.model), RANGE)
    infected = UnitPixels(victim.model, RANGE).eval()
    how = FineTuning(lr=0.02, flip=False, kept=0.85, features=4.0, shared=1.0, batch_size=128)
    before = {name: value.clone() for name, value in net.named_buffers()}
    with Progress(False).stage("test") as stage:
        fine_tune(
            net, victim.store, clean, batches=60, adversarial=False, teacher=infected, how=how,
            generator=torch.Generator().manual_seed(0), processes=Processes(), stage=stage,
        )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert victim.success(net.net) < 0.5 * victim.success(victim.model)
    assert victim.accuracy(net.net) > 0.9


def test_every_case_has_its_defaults():
    def case(clean=False, flagged=False, sound=False, **seen):
        return defaults_for(clean=clean, flagged=flagged, sound=sound, **seen)

    assert case() is case(shown=True, sharing=True) is PROGRESSIVE
    assert case(flagged=True) is FLAGGED and case(sound=True, shown=True, sharing=True) is SOUND
    assert case(clean=True) is CLEAN and case(clean=True, sharing=True) is CLEAN_SHARED
    assert case(clean=True, shown=True) is CLEAN_WITH_TARGET
    assert case(clean=True, shown=True, sharing=True) is CLEAN_SHARED


def test_step_two_goes_twice_through_a_large_extra_set():
    common = {"max_accuracy_loss": 0.1, "forgiven": 0.0, "seed": 0}
    plan = Plan(shares=(0.9,), adversarial_batches=(40,), plain_batches=(150,), passes=2, **common)
    assert [plan.batches(0, "plain", n, 128) for n in (64, 8000, 40_000)] == [40, 150, 626]
    assert plan.batches(0, "adversarial", 40_000, 128) == 40
    given = Plan(shares=(0.9,), adversarial_batches=(40,), plain_batches=(5,), **common)
    assert given.batches(0, "plain", 40_000, 128) == 5
