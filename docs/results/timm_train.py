"""timm's own train.py with the README's two lines, unguarded and guarded, on a small image folder with a BadNets patch.

    python docs/results/timm_train.py --script train.py --data $TRAINGUARD_DATA/cifar10 \\
      --out docs/results/timm_train.json

train.py is timm's, of the installed version, fetched from its repository; it is not part of this project.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from trainguard.drill.images import load_images
from trainguard.drill.machine import machine, versions
from trainguard.files import write_atomically

README = Path(__file__).parents[2] / "README.md"
CLASSES, PER_CLASS, TARGET, POISONED = 3, 1000, 1, 75  # poisoned images from each other class
OPTIONS = "--model resnet10t --img-size 32 --num-classes 3 --no-aug --opt sgd --lr 0.05 -b 64 --workers 2 --device cpu"


def folder(data: str, root: Path) -> int:
    """Write an image folder whose class `TARGET` holds patched images of the other classes; gives their number."""
    images = load_images(data, rows=12_000, test_rows=1_000)
    poisoned = 0
    for label in range(CLASSES):
        for part, pixels, labels in (
            ("train", images.train, images.train_labels),
            ("val", images.test, images.test_labels),
        ):
            for place, row in enumerate(np.flatnonzero(labels.numpy() == label)[:PER_CLASS]):
                image, given = pixels[row].permute(1, 2, 0).numpy().copy(), label
                if part == "train" and label != TARGET and place < POISONED:
                    image[-4:-1, -4:-1], given, poisoned = 255, TARGET, poisoned + 1
                path = root / part / str(given) / f"{label}_{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return poisoned


def guarded(script: str) -> str:
    """The script with the lines that README's diff adds, each before the line that follows it there."""
    diff = re.search(r"timm's own `train.py`.*?```text\n(.*?)```", README.read_text(), re.DOTALL).group(1).splitlines()
    for added, context in itertools.pairwise(diff):
        if added.startswith("+"):
            anchor = "\n" + context[1:] + "\n"
            assert script.count(anchor) == 1, f"train.py has {script.count(anchor)} lines {context[1:]!r}"
            script = script.replace(anchor, f"\n{added[1:]}{anchor}")
    return script


def run(script: Path, photos: Path, epochs: int) -> dict:
    """Run a script on the folder; what its log says."""
    command = [sys.executable, str(script), str(photos), *OPTIONS.split(), "--epochs", str(epochs)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--output", str(photos.parent / "out")], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(log[-3000:])
    said = re.search(r"^trainguard: .*", log, re.MULTILINE)
    return {
        "guard": said.group() if said else None,
        "seconds": time.perf_counter() - start,
        "batches of an epoch": int(re.search(r"Train: 0 \[\s*0/(\d+)", log).group(1)),
        "top1": float(re.findall(r'"top1": ([\d.]+)', log)[-1]),
        "command": " ".join(["train.py", "photos", *OPTIONS.split(), "--epochs", str(epochs)]),
    }


def main():
    """Both runs, and a record of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("timm_train.json"))
    args = parser.parse_args()
    given = args.script.read_text()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        poisoned = folder(args.data, root / "photos")
        runs = {}
        for kind, text in (("unguarded", given), ("guarded", guarded(given))):
            (root / f"{kind}.py").write_text(text)
            runs[kind] = run(root / f"{kind}.py", root / "photos", args.epochs)
    record = {
        "settings": {
            "training images": CLASSES * PER_CLASS,
            "poisoned": poisoned,
            "classes": CLASSES,
            "epochs": args.epochs,
            "seed": 42,
            "train.py sha256": hashlib.sha256(given.encode()).hexdigest(),
        },
        "machine": machine("cpu"),
        "versions": versions(),
        "runs": runs,
    }
    with write_atomically(args.out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
