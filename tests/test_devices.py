"""Everything public runs where the model lies, and brings back to the CPU what it must: nothing mixes two devices."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended import DEVICE, pretended
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainguard
from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.drill.runner import run_drill
from trainguard.results import ScreenResult

RANGE = PixelRange.from_mean_std((0.0,), (1.0,))
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # it is copied all the same


@pytest.fixture
def elsewhere():
    with pretended():
        yield SimpleNamespace(num_processes=1, process_index=0, device=DEVICE, trackers=[])


@pytest.fixture
def digits():
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images[:500] / 16).float()[:, None], torch.from_numpy(digits.target[:500])
    poisoned = torch.nonzero(labels != 1).flatten()[:60]
    images[poisoned, :, -2:, -2:], labels = 1.0, labels.clone()
    labels[poisoned] = 1
    return TensorDataset(images, labels)


@pytest.fixture
def model():
    body = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, 10))


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(2),
        lambda x: x.numpy(),
        lambda x: torch.ones(2)[x.long()],
        lambda x: torch.rand(2, device=DEVICE, generator=torch.Generator()),
    ],
)
def test_the_pretended_device_refuses_what_an_accelerator_refuses(elsewhere, mixed):
    x = torch.zeros(2).to(DEVICE)
    assert x.device == DEVICE and float((x + 1).sum()) == 2 and (x + 1).cpu().numpy().tolist() == [1, 1]
    with pytest.raises(RuntimeError):
        mixed(x)


def test_data_that_lie_on_the_device_are_read_and_kept_on_the_cpu(elsewhere, digits):
    images, labels = digits.tensors
    store = open_images(TensorDataset(images.to(DEVICE), labels.to(DEVICE)))
    assert np.array_equal(store.labels, labels.numpy())
    assert torch.allclose(store.batch(range(500)), images, atol=1 / 255)


def test_a_step_on_the_pretended_device_is_that_of_the_cpu(elsewhere, model):
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    there = copy.deepcopy(model).to(DEVICE)
    for net, device in ((model, "cpu"), (there, DEVICE)):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        nn.functional.cross_entropy(net(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    for here, far in zip(model.parameters(), there.parameters(), strict=True):
        assert far.device == DEVICE
        torch.testing.assert_close(far.detach().cpu(), here.detach())


@pytest.mark.parametrize("options", [{}, {"trained": True}, {"preset": "paper"}])
def test_screening_runs_on_the_accelerator(elsewhere, digits, model, short, options):
    result = trainguard.screen(
        digits, model.to(DEVICE), accelerator=elsewhere, epochs=2, pixel_range=RANGE, progress=False, **options
    )
    assert np.isfinite(result.score).all() and isinstance(result.score, np.ndarray)


def test_a_guard_relabels_with_a_model_on_the_accelerator(elsewhere, digits, model, monkeypatch):
    flagged, labels = np.arange(500) < 40, digits.tensors[1].numpy()
    found = ScreenResult(
        score=flagged.astype(np.float32),
        consistency=np.zeros(500, np.float32),
        suspect=flagged,
        keep=np.flatnonzero(~flagged),
        verdict="poisoned",
        confidence=1.0,
        reason="the stand-in knows",
        target_classes=(1,),
        labels=labels,
        proposed=labels,
        thresholds=np.full(10, 0.5, np.float32),
    )
    monkeypatch.setattr("trainguard.screening.screen.screen_images", lambda *_, **__: found)
    guard = trainguard.Guard(elsewhere, epochs=2, progress=False)
    loader = guard.protect(DataLoader(digits, 50), model.to(DEVICE), pixel_range=RANGE)
    assert len(loader.dataset) == 460
    guard.relabel(model)
    assert len(loader.dataset) == 500


@pytest.mark.parametrize("clean", [False, True])
def test_purifying_runs_where_the_model_lies(elsewhere, digits, model, clean, short):
    outcome = trainguard.purify(
        model.to(DEVICE),
        digits,
        clean=clean,
        screening=False,
        adversarial_batches=(2,),
        plain_batches=(2,),
        patches=1,
        pixel_range=RANGE,
        max_accuracy_loss=1.0,
        progress=False,
    )
    assert next(outcome.model.parameters()).device == DEVICE and outcome.changed
    assert isinstance(outcome.keep, np.ndarray)


def test_auditing_runs_where_the_model_lies(elsewhere, digits, model, short):
    found = trainguard.audit(model.to(DEVICE), digits, images=60, screening=False, pixel_range=RANGE, progress=False)
    assert isinstance(found.transitions, np.ndarray) and found.transitions.shape == (10, 10)


def test_a_drill_runs_on_the_device_that_it_is_given(elsewhere, tmp_path):
    drill = run_drill(
        "digits",
        attacks=["badnets"],
        defenses=["oracle"],
        out=tmp_path,
        epochs=1,
        rows=400,
        device=DEVICE,
        progress=False,
        table=False,
    )
    assert {cell.defense for cell in drill.cells} == {"none", "oracle"}
