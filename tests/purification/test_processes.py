"""Two accelerate processes purify as one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from digits_victim import MEAN, STD, small_net
from two_ranks import OPTIONS

from trainguard.purification import PurifyResult, purify

HERE = Path(__file__).parent


def test_two_processes_give_the_extra_sets_and_the_model_of_one(victim, tmp_path):
    images = (victim.store.batch(np.arange(len(victim.store))) - MEAN) / STD
    labels = torch.from_numpy(victim.store.labels)
    kept = {"model": victim.model.state_dict(), "images": images, "labels": labels}
    torch.save(kept, tmp_path / "victim.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    script = [str(HERE / "two_ranks.py"), str(tmp_path)]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one = purify(victim.model, victim.store, **OPTIONS)
    ranks = [PurifyResult.load(tmp_path / f"rank{rank}.safetensors", small_net()) for rank in (0, 1)]
    for name, value in ranks[0].model.state_dict().items():
        assert torch.equal(value, ranks[1].model.state_dict()[name])
        torch.testing.assert_close(value, one.model.state_dict()[name], atol=2e-3, rtol=2e-3)
    assert np.array_equal(ranks[0].keep, one.keep) and np.array_equal(ranks[1].keep, one.keep)
    assert (tmp_path / "state" / "purification.pt").is_file()
