"""The victim of these tests, trained once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits_victim import MEAN, RANGE, STD, TARGET, Victim, small_net, triggered
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from trainguard.data.store import open_images


@pytest.fixture(scope="session")
def victim() -> Victim:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images / 16).float()[order, None]
    labels = torch.from_numpy(digits.target)[order]
    train, test = images[:1000].clone(), images[1400:]
    given, poisoned = labels[:1000].clone(), np.zeros(1000, dtype=bool)
    poisoned[:100] = True
    train[:100], given[:100] = triggered(train[:100]), TARGET
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10 * 15)
        for _ in range(10):
            shuffled = torch.randperm(1000)
            for step in range(15):
                batch = shuffled[step * 64 : (step + 1) * 64]
                loss = F.cross_entropy(model((train[batch] - MEAN) / STD), given[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.zero_grad()
    store = open_images(TensorDataset((train - MEAN) / STD, given), pixel_range=RANGE)
    return Victim(model.eval(), store, poisoned, test, labels[1400:])
