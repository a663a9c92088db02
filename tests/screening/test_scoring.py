"""Consistency, partition and enhancement, each against a slow reference or an invariant."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainguard.perturbation import frozen, patch_mask
from trainguard.screening.consistency import divergence
from trainguard.screening.enhancement import CAP, enhancement_loss
from trainguard.screening.learning import recipe_for
from trainguard.screening.partition import least_consistent
from trainguard.screening.settings import Settings


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
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 10**6))
def test_partition_takes_the_share_that_moves_most(n, rate, seed):
    rng = np.random.default_rng(seed)
    moves = rng.random(n).astype(np.float32)
    moves[rng.random(n) < 0.1] = np.nan
    usable = np.isfinite(moves)
    plain = least_consistent(moves, rate)
    assert len(plain) == round(rate * usable.sum())
    rest = np.setdiff1d(np.flatnonzero(usable), plain)
    assert not len(plain) or not len(rest) or moves[plain].min() >= moves[rest].max()


def test_partition_refuses_a_rate_above_one():
    with pytest.raises(ValueError, match=r"1\.5"):
        least_consistent(np.zeros(3, np.float32), 1.5)


def test_enhancement_loss_rises_on_trusted_and_falls_on_the_rest():
    labels = torch.tensor([0, 1])
    logits = torch.zeros(2, 2, requires_grad=True)
    enhancement_loss(torch.tensor([True, False]), labels)(logits, np.array([0, 1])).backward()
    assert logits.grad[0, 0] > 0  # descent lowers the trusted sample's own label
    assert logits.grad[1, 1] < 0


def test_samples_that_cannot_be_read_do_not_weigh_in_the_enhancement_loss():
    trusted, labels = torch.tensor([True, False, False, False]), torch.tensor([1, 0, -1, -1])
    logits, index = torch.tensor([[0.3, -0.2], [0.1, 0.5]]), np.array([0, 1])
    whole = enhancement_loss(trusted[:2], labels[:2])(logits, index)
    assert torch.equal(enhancement_loss(trusted, labels)(logits, index), whole)


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


@pytest.mark.parametrize(
    ("samples", "epochs", "shift"), [(300, 23, 0.125), (3_000, 16, 0.125), (10_000, 6, 0.0625), (50_000, 2, 0.0625)]
)
def test_however_small_the_budget_a_probe_sees_enough_and_no_image_too_often_alike(samples, epochs, shift):
    run = SimpleNamespace(settings=Settings(), spend=0.1, store=SimpleNamespace(readable=np.arange(samples)))
    recipe = recipe_for(run, samples, 0.5, Settings().warmup_shift)
    assert (recipe.epochs, recipe.shift) == (epochs, shift)
