"""What each of several processes sees: started by torchrun, checked by test_accelerate_loop.py.

torchrun --nproc_per_node 2 two_processes.py FOLDER
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from flagged import result_for
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import trainguard.screening.screen
from trainguard import Guard
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.screening.consistency import consistency
from trainguard.screening.probe import Probe
from trainguard.screening.settings import PRESETS, Settings
from trainguard.training import outputs

SIZE = 101  # divisible by nothing
FLAGGED = [0, 3, 50, 77, 100]
CONFIGURATIONS = {
    "shards": {},
    "seedable": {"use_seedable_sampler": True},
    "dispatcher": {"dispatch_batches": True},
    "split batches": {"split_batches": True},
    "split dispatcher": {"split_batches": True, "dispatch_batches": True},
    "uneven": {"even_batches": False},
}
if find_spec("torchdata"):
    CONFIGURATIONS["stateful"] = {"use_stateful_dataloader": True}


def data():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (SIZE, 3, 16, 16))).float() / 255
    return images, torch.arange(SIZE) % 3


class Numbered(Dataset):
    def __init__(self):
        self.images, self.labels = data()

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index]), index


class Always(nn.Linear):
    """Gives class 2 to every image."""

    def forward(self, x):
        return torch.tensor([[0.0, 0.0, 5.0]]).expand(len(x), 3)


def scores(processes):
    """Consistency and logits of one and the same probe."""
    store = open_images(TensorDataset(*data()))
    torch.manual_seed(0)
    probe = Probe(store.shape, 3, torch.full((3,), 0.5), torch.full((3,), 0.3))
    with torch.no_grad():
        probe.head.weight.mul_(50)  # as sure of itself as a trained one
        for _ in range(3):  # running statistics that fit the images
            probe(store.batch(np.arange(64)))
    probe.eval()
    moved = consistency(probe, store, side=8, eps=8 / 255, steps=2, seed=3, processes=processes)
    return {"consistency": moved, "logits": outputs(probe, probe, store, store.readable, processes)}


def screened(accelerator):
    """A whole screening, cut short."""
    PRESETS["default"] = Settings(default_epochs=0.2, least_steps=8, least_epochs=0, most_steps=8, least_members=8)
    result = trainguard.screen(TensorDataset(*data()), accelerator=accelerator, progress=False)
    return {"score": result.score, "keep": result.keep, "screened consistency": result.consistency}


def flagging(images, model=None, **options):
    """In place of a screening: rank 0 flags `FLAGGED`, and whoever decided alone would flag something else."""
    processes = options["processes"]
    return result_for(images, processes.broadcast(FLAGGED if processes.is_main else [1, 2]))


def epoch(loader):
    """(row, label) of an epoch on this rank, batch by batch."""
    return [list(zip(rows.tolist(), labels.tolist(), strict=True)) for _, labels, rows in loader]


def protected(when, configuration):
    """Two epochs of a protected loader on this rank, and one after relabelling."""
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**CONFIGURATIONS[configuration]))
    guard = Guard(accelerator, progress=False)
    loader = DataLoader(Numbered(), batch_size=8, shuffle=True)
    if when == "before prepare":
        loader = accelerator.prepare(guard.protect(loader))
    else:
        prepared = accelerator.prepare(loader)
        loader = guard.protect(prepared)
        assert loader is prepared and loader in accelerator._dataloaders
    epochs = [epoch(loader), epoch(loader)]
    lengths = [len(loader)]
    gathered = torch.cat([accelerator.gather_for_metrics(rows) for _, _, rows in loader]).tolist()
    guard.relabel(Always(1, 1))
    epochs.append(epoch(loader))
    return {"epochs": epochs, "lengths": [*lengths, len(loader)], "gathered": gathered}


def unnamed(rows):
    """What a guard that was given no accelerator keeps of these rows."""
    data = Subset(Numbered(), rows)
    loader = Guard(progress=False).protect(DataLoader(data, batch_size=8))
    return [row for batch in epoch(loader) for row, _ in batch]


def main(folder):
    accelerator = Accelerator(cpu=True)
    processes = Processes.of(accelerator)
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        PRESETS["default"] = Settings(default_epochs=0.2, least_steps=8, least_epochs=0, most_steps=8)
        if processes.rank == 1:
            Processes.share = lambda *_: 1 / 0  # where nobody expects it
        trainguard.screen(TensorDataset(*data()), accelerator=accelerator, progress=False)
        return
    seen = scores(processes) | screened(accelerator)
    trainguard.screening.screen.screen_images = flagging
    for configuration in CONFIGURATIONS:
        for when in ("before prepare", "after prepare"):
            seen[f"{configuration}, {when}"] = protected(when, configuration)
    seen["unnamed"] = unnamed(range(SIZE))
    seen["unnamed, apart"] = unnamed(list(range(SIZE))[:: -1 if processes.rank else 1])
    torch.save(seen, Path(folder) / f"{processes.rank} of {processes.world}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
