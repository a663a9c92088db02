"""How much of a screening is not spent in the network? All training images of a Hugging Face data set in parquet.

    python docs/results/outside_the_model.py --data $TRAINGUARD_DATA/cifar10 --out docs/results/outside_the_model.json

In the network: the probes' forward passes, backward passes, gradients of images, optimizer steps with their clipping.
Outside: reading and decoding, batches and augmentation, splits of classes, nearest neighbours, the evidence.
Importing is not counted.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch

from trainguard import screen
from trainguard.drill.machine import machine, versions
from trainguard.files import write_atomically
from trainguard.screening.probe import Probe


class Clock:
    """Seconds within the calls that it was put around; a call within another counts once."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    def around(self, function):
        """The same function, timed."""

        def timed(*arguments, **options):
            start = time.perf_counter()
            self.depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                self.seconds += 0 if self.depth else time.perf_counter() - start

        return timed


def main():
    """Screen and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("outside_the_model.json"))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, help="length of the protected training; default: not named")
    parser.add_argument("--workers", type=int, default=2, help="processes that read")
    args = parser.parse_args()
    data = datasets.load_dataset("parquet", data_files=str(Path(args.data) / "train.parquet"), split="train")
    data = data.select(range(min(args.rows, len(data))))
    clock = Clock()
    Probe.__call__ = clock.around(Probe.__call__)
    Probe.features, Probe.maps = clock.around(Probe.features), clock.around(Probe.maps)
    torch.Tensor.backward = clock.around(torch.Tensor.backward)
    torch.autograd.grad = clock.around(torch.autograd.grad)
    torch.optim.SGD.step = clock.around(torch.optim.SGD.step)
    torch.nn.utils.clip_grad_norm_ = clock.around(torch.nn.utils.clip_grad_norm_)
    start = time.perf_counter()
    result = screen(data, epochs=args.epochs, workers=args.workers, progress=False)
    total = time.perf_counter() - start
    record = {
        "settings": {"rows": len(data), "epochs": args.epochs, "workers": args.workers, "seed": 0},
        "machine": machine("cpu"),
        "versions": versions(),
        "seconds": total,
        "seconds in the network": clock.seconds,
        "share outside": 1 - clock.seconds / total,
        "timing": result.timing | {"reading": total - result.timing["total"]},
        "verdict": result.verdict,
        "flagged": int(result.suspect.sum()),
    }
    with write_atomically(args.out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
