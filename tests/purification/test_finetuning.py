import copy

import numpy as np
import pytest
import torch
from digits_victim import RANGE
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.errors import ModelError
from trainguard.models import UnitPixels, copy_of
from trainguard.progress import Progress
from trainguard.purification.augmentation import random_view
from trainguard.purification.finetuning import (
    WORN,
    FineTuning,
    accuracy,
    attacked,
    fine_tune,
    fitting_radius,
    mirrors_alike,
    shuffled_batches,
    usual_rate,
)
from trainguard.purification.network import check_outputs
from trainguard.purification.universal import Patch

UNIT = PixelRange((0.0,), (1.0,), "given")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_view_without_movement_is_the_image_or_its_mirror():
    x = torch.rand(40, 3, 8, 6, generator=seeded())
    views = random_view(x, seeded(1), shift=0)
    same = torch.tensor([torch.equal(view, image) for view, image in zip(views, x, strict=True)])
    mirror = torch.tensor([torch.equal(view, image.flip(2)) for view, image in zip(views, x, strict=True)])
    assert (same ^ mirror).all() and 8 < same.sum() < 32
    assert torch.equal(random_view(x, seeded(1), shift=0, flip=False), x)


def test_random_view_moves_whole_pixels_and_leaves_black_behind():
    x = torch.rand(60, 1, 16, 8, generator=seeded()) + 0.5
    padded = torch.nn.functional.pad(x, (1, 1, 2, 2))
    seen = set()
    for view, image in zip(random_view(x, seeded(3), flip=False), padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(3) if torch.equal(view, image[:, i : i + 16, j : j + 8])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 15


def test_random_view_is_reproducible_stays_in_range_and_uses_no_global_numbers():
    x, before = torch.rand(9, 1, 8, 8, generator=seeded()), torch.get_rng_state()
    view = random_view(x, seeded(2))
    assert torch.equal(view, random_view(x, seeded(2))) and not torch.equal(view, random_view(x, seeded(3)))
    assert view.min() >= 0 and view.max() <= 1 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("images", "size", "batches"), [(10, 4, 3), (9, 4, 7), (5, 8, 4), (129, 128, 2)])
def test_batches_go_through_all_images_before_they_repeat(images, size, batches):
    index = np.arange(100, 100 + images)
    parts = list(shuffled_batches(index, batches, size, seeded()))
    assert len(parts) == batches
    each = -(-images // size)
    assert sorted(np.concatenate(parts[:each])) == index.tolist()
    assert min(map(len, parts)) >= images // each > 1 and max(map(len, parts)) <= size


@pytest.mark.parametrize(
    ("adversarial", "mixed", "alike"), [(False, 0.0, 0.0), (True, 0.0, 0.0), (True, 0.0, 3.0), (False, 1.5, 3.0)]
)
def test_fine_tuning_takes_the_steps_of_sgd(victim, adversarial, mixed, alike):
    """Against a loop written out, on plain images, with a patch on some of them, and on adversarial ones."""
    how = FineTuning(batch_size=16, flip=False, eps=0.1, attack_steps=2, lr=2e-3, kept=0.5, mixed=mixed, features=alike)
    corner = Patch(torch.zeros(8, 8), torch.ones(1, 8, 8))
    corner.mask[:2, :2] = 1
    extra, suspects = np.arange(200, 240), np.arange(100)
    network, teacher = (UnitPixels(copy.deepcopy(victim.model), RANGE).eval() for _ in range(2))
    with Progress(False).stage("test") as stage:
        loss = fine_tune(
            network, victim.store, extra, batches=5, adversarial=adversarial, teacher=teacher, suspects=suspects,
            worn=[[corner]] if alike else [], how=how, generator=seeded(4), processes=Processes(), stage=stage,
        )  # fmt: skip
    slow, generator, losses = UnitPixels(copy.deepcopy(victim.model), RANGE), seeded(4), []
    optimizer = torch.optim.SGD(slow.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    wrong = shuffled_batches(suspects, 5, 4, generator)
    for step, index in enumerate(shuffled_batches(extra, 5, 16, generator)):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 if adversarial else (1 + np.cos(np.pi * (step + 0.5) / 5)) / 2)
        plain = x = random_view(victim.store.batch(index), generator, flip=False)
        y = torch.from_numpy(victim.store.labels[index])
        if adversarial:
            slow.eval()
            x = attacked(slow, x, y, how, Processes())
        elif alike:
            some = round(WORN * len(x))
            torch.randint(1, (some,), generator=generator)
            x = torch.cat([corner.on(x[:some]), x[some:]])
        flagged = next(wrong)
        bad = random_view(victim.store.batch(flagged), generator, flip=False)
        slow.train()
        optimizer.zero_grad()
        body, head = slow.net[:-1], slow.net[-1]
        seen = body(RANGE.to_model(torch.cat([x, bad])))
        logits = head(seen)
        believed = logits[len(x) :].softmax(1)[torch.arange(len(bad)), torch.from_numpy(victim.store.labels[flagged])]
        answers = teacher(plain).detach().softmax(1)
        value = 0.5 * nn.functional.cross_entropy(logits[: len(x)], y) - 0.3 * (1 - believed + 1e-4).log().mean()
        known = teacher.net[:-1](RANGE.to_model(plain)).detach()
        value = value + alike * (1 - nn.functional.cosine_similarity(seen[: len(x)], known)).mean()
        value = value + 0.5 * (answers * (answers.log() - logits[: len(x)].log_softmax(1))).sum(1).mean()
        if mixed:
            share, partner = (
                torch.rand(len(x), 1, 1, 1, generator=generator),
                torch.randperm(len(x), generator=generator),
            )
            mixture = plain + (1 - share) * (plain[partner] - plain)
            before, now = teacher(mixture).detach().softmax(1), slow(mixture)
            apart = (before * (before.log() - now.log_softmax(1))).sum(1)
            said = before.argmax(1)
            believed = (said == now.argmax(1)) & ((said == y) | (said == y[partner]))
            assert believed.any() and not believed.all()
            value = value + mixed * apart[believed].sum() / len(x)
        value.backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 10.0)
        optimizer.step()
        losses += [value.item()] * len(index)
    assert loss == pytest.approx(np.mean(losses), rel=0.05)
    for one, other in zip(network.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=4e-3, rtol=0)
    assert not any(module.training for module in network.modules())


def test_diverged_fine_tuning_says_so(victim):
    network = UnitPixels(copy.deepcopy(victim.model), RANGE)
    with Progress(False).stage("test") as stage:
        loss = fine_tune(
            network, victim.store, np.arange(50), batches=30, adversarial=False, how=FineTuning(lr=1e20),
            generator=seeded(), processes=Processes.of(None), stage=stage,
        )  # fmt: skip
    assert loss == float("inf")


def test_attack_leaves_the_model_as_it_was_and_moves_predictions(victim):
    network = UnitPixels(copy.deepcopy(victim.model), RANGE).train()
    state = copy.deepcopy(network.state_dict())
    x, y = victim.store.batch(np.arange(200, 260)), torch.from_numpy(victim.store.labels[200:260])
    other = attacked(network, x, y, FineTuning(eps=0.2), Processes.of(None))
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert (other - x).abs().max() <= 0.2 + 1e-6
    assert (network.eval()(other).argmax(1) != y).float().mean() > 0.5


def test_radius_grows_only_where_the_attack_does_not_reach(victim):
    network, index = UnitPixels(victim.model, RANGE), np.arange(200, 260)
    assert fitting_radius(network, victim.store, index, FineTuning(eps=0.3)) == 0.3
    assert fitting_radius(network, victim.store, index, FineTuning(eps=0.02)) > 0.02
    assert fitting_radius(network, victim.store, index, FineTuning(eps=1e-6)) == pytest.approx(8e-6)


def test_digits_are_not_mirrored_and_symmetric_models_are(victim):
    class Sum(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1) * self.weight

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    assert not mirrors_alike(UnitPixels(victim.model, RANGE), victim.store, np.arange(200, 300))
    assert mirrors_alike(UnitPixels(Sum(), RANGE), victim.store, np.arange(200, 300))


def test_a_model_that_errs_otherwise_in_a_mirror_is_symmetric_all_the_same():
    class Corners(nn.Module):  # right on nine of ten, and in the mirror on nine others
        def forward(self, x):
            return torch.stack([1 - x[:, 0, 0, 0], x[:, 0, 0, 0]], 1) * self.weight

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    x, y = torch.ones(100, 1, 4, 4), (torch.arange(100) >= 20).long()
    x[:20], x[20:30, 0, 0, 0], x[30:40, 0, 0, 3] = 0, 0, 0
    index, network = np.arange(100), UnitPixels(Corners(), UNIT)
    assert mirrors_alike(network, open_images(TensorDataset(x, y), pixel_range=UNIT), index)
    x[:, 0, 0, 3] = 0
    assert not mirrors_alike(network, open_images(TensorDataset(x, y), pixel_range=UNIT), index)
    assert not mirrors_alike(network, open_images(TensorDataset(x, 1 - y), pixel_range=UNIT), np.arange(20))


def test_accuracy_is_the_share_of_labels_met(victim):
    network = UnitPixels(victim.model, RANGE)
    index = np.arange(100, 700)
    predicted = victim.model(RANGE.to_model(victim.store.batch(index))).argmax(1).numpy()
    assert accuracy(network, victim.store, index) == pytest.approx(
        (predicted == victim.store.labels[index]).mean(), abs=0.005
    )


def test_copies_share_nothing_and_come_without_wrappers(victim):
    wrapped = nn.DataParallel(torch.compile(victim.model, backend="eager"))
    for source in (victim.model, wrapped, lambda: copy.deepcopy(wrapped)):
        copied = copy_of(source)
        assert type(copied) is nn.Sequential and copied is not victim.model
        for one, other in zip(copied.parameters(), victim.model.parameters(), strict=True):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


def test_what_cannot_be_a_model_is_refused():
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("a lock")

    with pytest.raises(ModelError, match="got a name, "):
        copy_of("resnet18")
    with pytest.raises(ModelError, match="gives dict"):
        copy_of(lambda: {})
    with pytest.raises(ModelError, match=r"Stubborn cannot be copied \(RuntimeError\)"):
        copy_of(Stubborn())


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), "7 outputs, the labels of the data need 10"),
        (nn.Sequential(nn.Flatten(), nn.Linear(99, 10)), "fails on images of shape"),
        (nn.Conv2d(1, 10, 3), r"expected logits of shape \(4, classes\)"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(64, eps=float("nan")), nn.Linear(64, 10)), "NaN"),
    ],
)
def test_models_that_do_not_fit_are_named(victim, net, words):
    with pytest.raises(ModelError, match=words):
        check_outputs(UnitPixels(net, RANGE), victim.store.batch(np.arange(4)), victim.store)


def test_a_model_that_squeezes_is_named_before_the_work(victim):
    class Squeezing(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()

    squeezing = UnitPixels(Squeezing(nn.Flatten(), nn.Linear(64, 10)), RANGE).eval()
    with pytest.raises(ModelError, match=r"shape \(10,\) for a single image, expected \(1, 10\): let it flatten"):
        check_outputs(squeezing, victim.store.batch(np.arange(4)), victim.store)

    class Stuck(Squeezing):
        def forward(self, x):
            return super().forward(x).log_softmax(1)

    stuck = UnitPixels(Stuck(nn.Flatten(), nn.Linear(64, 10)), RANGE).eval()
    with pytest.raises(ModelError, match=r"fails on a single image, where it takes 4: .*; let it flatten\(1\)"):
        check_outputs(stuck, victim.store.batch(np.arange(4)), victim.store)


@pytest.mark.parametrize(("images", "size", "sizes"), [(7, 2, {2, 3}), (6, 1, {2}), (1, 4, {2}), (128, 128, {128})])
def test_no_batch_is_of_a_single_image(images, size, sizes):
    index = np.arange(images)
    batches = list(shuffled_batches(index, 9, size, torch.Generator().manual_seed(0)))
    assert len(batches) == 9 and {len(batch) for batch in batches} == sizes
    assert set(np.concatenate(batches)) == set(index)


def test_the_usual_rate_is_a_third_without_batch_norm():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(6))
    for clean, rate in ((False, 0.02), (True, 0.03)):
        assert usual_rate(nn.Sequential(plain, nn.BatchNorm2d(2)), clean=clean) == rate
        assert usual_rate(plain, clean=clean) == pytest.approx(rate / 3)
