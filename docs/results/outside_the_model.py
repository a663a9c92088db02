"""How much of a screening is not spent in the network? All training images of a Hugging Face data set in parquet.

    python docs/results/outside_the_model.py --data $TRAINGUARD_DATA/cifar10 --out docs/results/outside_the_model.json

In the network: the probe's forward passes, backward passes, gradients of images, optimizer steps. Outside: reading and
decoding, batches and augmentation, splits of classes, nearest neighbours, the evidence.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch

import trainguard
from trainguard.drill.machine import machine, versions
from trainguard.files import write_atomically
from trainguard.screening.probe import Probe


class Clock:
    """Seconds within the calls that it was put around."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, function):
        """The same function, timed."""

        def timed(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main():
    """Screen and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("outside_the_model.json"))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=15, help="length of the protected training")
    args = parser.parse_args()
    data = datasets.load_dataset("parquet", data_files=str(Path(args.data) / "train.parquet"), split="train")
    data = data.select(range(min(args.rows, len(data))))
    clock = Clock()
    Probe.__call__ = clock.around(Probe.__call__)
    Probe.features = clock.around(Probe.features)
    torch.Tensor.backward = clock.around(torch.Tensor.backward)
    torch.autograd.grad = clock.around(torch.autograd.grad)
    torch.optim.SGD.step = clock.around(torch.optim.SGD.step)
    start = time.perf_counter()
    result = trainguard.screen(data, epochs=args.epochs, progress=False)
    total = time.perf_counter() - start
    record = {
        "settings": {"rows": len(data), "epochs": args.epochs, "seed": 0},
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
