import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SIZE, FLAGGED = 101, [0, 3, 50, 77, 100]
KEPT = [i for i in range(SIZE) if i not in FLAGGED]
CONFIGURATIONS = ("shards", "seedable", "dispatcher", "split batches", "split dispatcher", "uneven")


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


def test_a_rank_that_fails_takes_the_others_down_with_its_message(tmp_path):
    done = launch(tmp_path, "fail")
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
