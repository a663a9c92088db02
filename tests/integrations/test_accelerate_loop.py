import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from flagged import SCREENING, result_for
from torch import nn
from torch.utils.data import DataLoader
from two_processes import CONFIGURATIONS, FLAGGED, SIZE, Numbered

from trainguard import Guard

HERE = Path(__file__).parent
KEPT = [i for i in range(SIZE) if i not in FLAGGED]


def launch(*arguments, processes=2):
    """`two_processes.py`, under torchrun if need be, on one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python = [sys.executable, *(launcher if processes > 1 else [])]
    command = [*python, str(HERE / "two_processes.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What one process, and each of two, saw."""
    folder = tmp_path_factory.mktemp("ranks")
    for processes in (1, 2):
        done = launch(folder, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    names = ("0 of 1", "0 of 2", "1 of 2")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}


def test_two_processes_give_the_scores_of_one(seen):
    alone, *ranks = seen.values()
    for name in ("consistency", "logits"):
        assert np.isfinite(alone[name]).all() and len(alone[name]) == SIZE and np.ptp(alone[name]) > 1e-3
        for rank in ranks:
            np.testing.assert_allclose(rank[name], alone[name], atol=1e-5, rtol=0)
    assert alone["consistency"].min() >= 0


def test_every_rank_ends_a_screening_with_the_same_arrays(seen):
    _, first, second = seen.values()
    for name in ("score", "keep", "screened consistency"):
        np.testing.assert_array_equal(first[name], second[name])


def test_processes_without_an_accelerator_share_a_screening_of_the_same_data(seen):
    _, first, second = seen.values()
    assert first["unnamed"] == second["unnamed"] == KEPT
    assert first["unnamed, apart"] == KEPT and second["unnamed, apart"] == [SIZE - 1 - row for row in KEPT]


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_epochs_of_two_processes_have_every_kept_sample(configuration, when, seen):
    ranks = [seen[f"{rank} of 2"][f"{configuration}, {when}"] for rank in (0, 1)]
    evened = 0 if configuration == "uneven" else 16  # accelerate fills up the last batches from the first ones
    for epoch, expected in enumerate((KEPT, KEPT, range(SIZE))):
        rows = Counter(row for rank in ranks for batch in rank["epochs"][epoch] for row, _ in batch)
        assert sorted(rows) == list(expected)
        assert sum(rows.values()) - len(expected) <= evened
        if configuration == "uneven":
            assert max(rows.values()) == 1
    labels = dict(pair for rank in ranks for batch in rank["epochs"][2] for pair in batch)
    assert labels == {row: 2 if row in FLAGGED else row % 3 for row in range(SIZE)}
    first, second = ([rank["epochs"][epoch] for rank in ranks] for epoch in (0, 1))
    assert first != second  # another order in every epoch
    for rank in ranks:
        assert [len(rank["epochs"][1]), len(rank["epochs"][2])] == rank["lengths"]


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if name != "uneven"])
def test_gathering_for_metrics_gives_every_kept_sample_once(configuration, when, seen):
    for rank in (0, 1):
        assert sorted(seen[f"{rank} of 2"][f"{configuration}, {when}"]["gathered"]) == KEPT


def test_a_sampler_of_no_length_is_followed_under_several_processes(monkeypatch):
    monkeypatch.setattr(SCREENING, lambda images, *_, **__: result_for(images, FLAGGED))

    class Endless(torch.utils.data.Sampler):
        def __init__(self, data):
            self.data = data

        def __iter__(self):
            return iter(torch.randperm(len(self.data)).tolist())

    data = Numbered()
    loader = DataLoader(data, 4, sampler=Endless(data))
    prepared = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
    protected = Guard(progress=False).protect(prepared)
    assert {int(index) for _, _, indices in protected for index in indices} <= set(KEPT)


def test_a_rank_that_fails_takes_the_others_down_with_its_message(tmp_path):
    done = launch(tmp_path, "fail")
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr


def trained(folder, monkeypatch, *, protect_first, epoch, kill=False, resume=False, stateful=False):
    """Weights, and the rows of each batch, after three epochs; samples come back after the first of them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    screenings = []
    monkeypatch.setattr(
        SCREENING,
        lambda images, *_, **__: screenings.append(1) or result_for(images, FLAGGED),
    )
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=stateful)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    guard = Guard(accelerator, progress=False)
    loader = DataLoader(Numbered(), batch_size=8, shuffle=True)
    if protect_first:
        loader = guard.protect(loader)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(guard)
    first, step = 0, -1
    if resume:
        accelerator.load_state(folder)
        first, step = epoch, 4
    if not protect_first:
        loader = guard.protect(loader)
    seen = []
    for number in range(first, 3):
        loader.set_epoch(number)
        skips = resume and number == first and not stateful
        batches = accelerator.skip_first_batches(loader, step + 1) if skips else loader
        for position, (x, y, rows) in enumerate(batches, step + 1 if resume and number == first else 0):
            seen.append(rows.tolist())
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            if kill and (number, position) == (epoch, 4):
                accelerator.save_state(folder)
                return None
        if number == 0:
            guard.relabel(model)
    return seen, [parameter.detach().clone() for parameter in model.parameters()], len(screenings)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("protect_first", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_a_run_killed_in_mid_epoch_ends_as_the_uninterrupted_one(stateful, protect_first, epoch, tmp_path, monkeypatch):
    if stateful:
        pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    how = {"protect_first": protect_first, "epoch": epoch, "stateful": stateful}
    seen, weights, _ = trained(tmp_path, monkeypatch, **how)
    trained(tmp_path, monkeypatch, **how, kill=True)
    again, resumed, screenings = trained(tmp_path, monkeypatch, **how, resume=True)
    assert len(seen) == 12 + 13 + 13 and again == seen[12 * epoch + 5 :]
    assert all(torch.equal(one, other) for one, other in zip(weights, resumed, strict=True))
    assert screenings == (1 if protect_first else 0)
