"""Two accelerate processes purify as one does."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, debug_launcher
from digits_victim import Victim, small_net

from trainguard.purification import PurifyResult, purify

STEPS = {"rounds": 2, "adversarial_batches": (10, 5), "epochs": 2}
OPTIONS = STEPS | {"lr": 5e-3, "batch_size": 48, "eps": 0.1, "progress": False}


def work(victim: Victim, out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    result = purify(victim.model, victim.store, accelerator=accelerator, state_dir=out / "state", **OPTIONS)
    result.save(out / f"rank{accelerator.process_index}of{accelerator.num_processes}")


def test_two_processes_give_the_extra_sets_and_the_model_of_one(victim, tmp_path):
    debug_launcher(work, (victim, tmp_path), num_processes=2)
    one = purify(victim.model, victim.store, **OPTIONS)
    ranks = [PurifyResult.load(tmp_path / f"rank{rank}of2.safetensors", small_net()) for rank in (0, 1)]
    for name, value in ranks[0].model.state_dict().items():
        assert torch.equal(value, ranks[1].model.state_dict()[name])
        torch.testing.assert_close(value, one.model.state_dict()[name], atol=2e-3, rtol=2e-3)
    assert np.array_equal(ranks[0].keep, one.keep) and np.array_equal(ranks[1].keep, one.keep)
    assert (tmp_path / "state" / "purification.pt").is_file()
