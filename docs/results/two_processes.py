"""One process and two, one thread each: does screening come to the same result, and how much faster does it score?

    python docs/results/two_processes.py --data $TRAINGUARD_DATA/cifar10 --out docs/results/two_processes.json

Both screen the same rows with the same attack; the figures in docs/scaling.md are the JSON's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import trainguard
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.drill.images import load_images
from trainguard.drill.machine import machine, versions
from trainguard.drill.poison import Role
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.scene import Scene, UnitImages, Victim
from trainguard.drill.train import Recipe
from trainguard.files import write_atomically
from trainguard.screening.consistency import consistency
from trainguard.screening.probe import Probe


def scored(images, processes):
    """Scores of one and the same untrained probe, and the seconds of the second of two passes."""
    store = open_images(images)
    torch.manual_seed(0)
    mean = torch.full((store.shape[0],), 0.5)
    probe = Probe(store.shape, store.num_classes, mean, mean / 2).to(memory_format=torch.channels_last).eval()
    for _ in range(2):
        processes.barrier()
        start = time.perf_counter()
        scores = consistency(probe, store, side=16, eps=8 / 255, steps=1, seed=0, processes=processes)
        processes.barrier()
        seconds = time.perf_counter() - start
    return scores, seconds


def worker(args):
    """What one of the processes does."""
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    processes = Processes.of(accelerator)
    data = load_images(args.data, rows=args.rows, test_rows=10)
    victim = Victim("resnet9", Recipe.for_model("resnet9", args.epochs, flip=data.flip), torch.device("cpu"))
    scene = Scene.make(data, attack(args.attack, Setting(data.num_classes)), victim, args.seed)
    images = UnitImages(scene.images, scene.labels)
    scores, seconds = scored(images, processes)
    start = time.perf_counter()
    result = trainguard.screen(
        images, epochs=args.epochs, seed=args.seed, accelerator=accelerator, progress=False, bounds=(0, 1)
    )
    payload = scene.role == Role.PAYLOAD
    torch.save(
        {
            "scores": scores,
            "keep": result.keep,
            "scoring_seconds": seconds,
            "screening_seconds": time.perf_counter() - start,
            "verdict": result.verdict,
            "target_classes": list(result.target_classes),
            "tpr": float(result.suspect[payload].mean()),
            "fpr": float(result.suspect[~payload].mean()),
        },
        Path(args.folder) / f"{processes.rank} of {processes.world}.pt",
    )
    accelerator.end_training()


def main():
    """Start the processes and compare what they saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("two_processes.json"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=15, help="length of the protected training")
    parser.add_argument("--attack", default="badnets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # says that this is one of the processes
    args = parser.parse_args()
    if args.folder:
        worker(args)
        return
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--folder", folder]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for path in Path(folder).glob("*.pt"):
            seen[path.stem] = torch.load(path, weights_only=False)
    alone, *ranks = (seen[name] for name in ("0 of 1", "0 of 2", "1 of 2"))
    one, two = (set(found["keep"].tolist()) for found in (alone, ranks[0]))
    settings = {name: value for name, value in vars(args).items() if name in ("rows", "epochs", "attack", "seed")}
    record = {
        "settings": settings,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "largest difference of scores": float(np.abs(alone["scores"] - ranks[0]["scores"]).max()),
        "overlap of kept samples": len(one & two) / len(one | two),
        "same kept samples on both ranks": bool(np.array_equal(ranks[0]["keep"], ranks[1]["keep"])),
        "speed-up of scoring": alone["scoring_seconds"] / ranks[0]["scoring_seconds"],
        "speed-up of screening": alone["screening_seconds"] / ranks[0]["screening_seconds"],
        "processes": {
            name: {key: value for key, value in found.items() if key not in ("scores", "keep")}
            for name, found in sorted(seen.items())
        },
    }
    with write_atomically(args.out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
