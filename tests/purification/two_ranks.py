"""Purifies the digits' victim on each of several processes: started by torchrun, checked by test_processes.py.

torchrun --nproc_per_node 2 two_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from digits_victim import RANGE, small_net
from torch.utils.data import TensorDataset

from trainguard.data.store import open_images
from trainguard.purification import purify

OPTIONS = {
    "rounds": 2,
    "adversarial_batches": (10, 5),
    "plain_batches": (5,),
    "screening": False,
    "batch_size": 48,
    "patches": 1,
    "eps": 0.1,
    "progress": False,
}


def work(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    kept = torch.load(folder / "victim.pt", weights_only=True)
    model = small_net().eval()
    model.load_state_dict(kept["model"])
    store = open_images(TensorDataset(kept["images"], kept["labels"]), pixel_range=RANGE)
    result = purify(model, store, accelerator=accelerator, state_dir=folder / "state", **OPTIONS)
    result.save(folder / f"rank{accelerator.process_index}")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
