"""Shared by all tests: small data, one thread, random streams that do not leak from test to test."""

import numpy as np
import pytest
import torch

from trainguard.rng import isolated_rng


@pytest.fixture(autouse=True)
def _own_streams():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with isolated_rng(0):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def images():
    """(60, 3, 8, 8) float32 with exactly 8 bits per value, so that nothing is lost in a store."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8))).float() / 255


@pytest.fixture
def labels():
    """(60,) int64, three classes in turn."""
    return torch.arange(60) % 3
