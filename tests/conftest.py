"""Shared by all tests: small data, one thread, random streams that do not leak from test to test."""

import dataclasses

import numpy as np
import pytest
import torch

from trainguard.purification import overlay, universal
from trainguard.rng import isolated_rng
from trainguard.screening.settings import PRESETS

torch.set_num_threads(1)  # fixtures of a module as well: two workers share two cores, and sums keep their order


@pytest.fixture(autouse=True)
def _own_streams():
    with isolated_rng(0):
        yield


@pytest.fixture
def images():
    """(60, 3, 8, 8) float32 with exactly 8 bits per value, so that nothing is lost in a store."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8))).float() / 255


@pytest.fixture
def labels():
    """(60,) int64, three classes in turn."""
    return torch.arange(60) % 3


@pytest.fixture
def short(monkeypatch):
    """Probes and searches take a few steps: where it matters that they run, and not what they find."""
    for name in PRESETS:
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(PRESETS[name], least_steps=8, least_epochs=0))
    monkeypatch.setattr(universal, "STEPS", 8)
    monkeypatch.setattr(overlay, "GROWTH", 1.5)
