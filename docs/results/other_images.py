"""What screening says of images and classes of other sizes: grey ones, larger ones, a long tail, a hundred classes.

    python docs/results/other_images.py --data $TRAINGUARD_DATA --out docs/results/other_images.json

Made of CIFAR-10 and of traffic signs, then poisoned at the size they have then; settings for 30 epochs. Goes on after
the last finished case when started again, as long as neither the version nor the settings have changed.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import Record
from screening_alone import USUAL, block, run, table
from sklearn.cluster import KMeans
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from trainguard.drill.images import Images, load_images

MOST, LEAST = 3_000, 60  # of a class in the long tail
TOLD = {"kind": "", "rate": 0.05}  # of a case in the table


def sized(images: Images, side: int) -> Images:
    """Scaled to another side, in pixels."""
    pixels = F.interpolate(images.train.float(), size=(side, side), mode="bicubic", align_corners=False)
    return changed(images, pixels.round().clamp(0, 255).to(torch.uint8))


def grey(images: Images) -> Images:
    """With one channel."""
    return changed(images, rgb_to_grayscale(images.train))


def changed(images: Images, train: Tensor) -> Images:
    """With other training images in the place of the same number."""
    return replace(images, train=train, test=train[:1], test_labels=images.train_labels[:1])


def long_tail(images: Images) -> Images:
    """Classes from `MOST` down to `LEAST` images, in a geometric series."""
    rng, chosen = np.random.default_rng(9), []
    for label, share in enumerate(np.linspace(0, 1, images.num_classes)):
        size = round(MOST * (LEAST / MOST) ** share)
        chosen.append(rng.permutation(np.flatnonzero(images.train_labels.numpy() == label))[:size])
    index = np.sort(np.concatenate(chosen))
    return replace(images, train=images.train[index], train_labels=images.train_labels[index])


def hundred(images: Images) -> Images:
    """Ten classes as a hundred: each in ten, by what its images look like at four pixels each way."""
    labels = torch.zeros_like(images.train_labels)
    for label in range(images.num_classes):
        own = torch.nonzero(images.train_labels == label).flatten()
        small = F.adaptive_avg_pool2d(images.train[own].float(), 4).flatten(1).numpy()
        groups = KMeans(10, n_init=1, random_state=0).fit_predict(small)
        labels[own] = torch.from_numpy(groups).long() + 10 * label
    names = tuple(f"{name} {k}" for name in images.class_names for k in range(10))
    return changed(replace(images, train_labels=labels, class_names=names), images.train)


KINDS: dict[str, tuple[dict[str, Any], Callable[[Images], Images]]] = {
    "grey, 28 pixels": ({"block": 2}, lambda images: sized(grey(images), 28)),
    "64 pixels": ({"block": 6, "rows": 5_000}, lambda images: sized(images, 64)),
    "long tail": ({"rows": 50_000}, long_tail),
    "grey signs": ({"data": "gtsrb"}, grey),
    "signs, 48 pixels": ({"data": "gtsrb", "rows": 5_000}, lambda images: sized(images, 48)),
    "a hundred classes": ({"rows": 20_000, "seed": 4}, hundred),
}
ATTACKS = ("clean", "badnets", "blend", "wanet", "sig")
TAIL = (("clean", {}), ("badnets", {"target": 8, "rate": 0.01}), ("blend", {"target": 2}), ("wanet", {"target": 5}))
HUNDRED = (("clean", {}), ("badnets", {"target": 17}), ("wanet", {"target": 52}))


def cases() -> list[tuple[str, str, dict]]:
    """Kind, attack and settings; targets go round, but for uneven classes, which may be too small for them."""
    uneven = {"long tail": TAIL, "a hundred classes": HUNDRED}
    out = [(kind, name, USUAL | KINDS[kind][0] | case) for kind, cases in uneven.items() for name, case in cases]
    for number, (kind, (settings, _)) in enumerate(KINDS.items()):
        if kind in uneven:
            continue
        shared = USUAL | settings
        for k, name in enumerate(ATTACKS):
            case: dict[str, Any] = {"seed": 3 + k, "target": (4 + 3 * k + number) % 10}
            if name == "sig" and shared["data"] == "gtsrb":
                case |= {"rate": 0.02, "target": 2}  # of all: few classes of signs hold as many to poison, and none 5%
            out.append((kind, name, shared | case))
    return out


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--out", type=Path, default=Path("other_images.json"))
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    done = {(row["kind"], row["attack"]) for row in record.rows}
    for kind, name, case in cases():
        if (kind, name) not in done:
            images = block(load_images(args.data / case["data"], test_rows=100), case["block"], case["rows"])
            record.add(run(KINDS[kind][1](images), name, case) | {"kind": kind})
            print(table(record.rows[-1:], TOLD).splitlines()[-1], flush=True)
    print(table(record.rows, TOLD))


if __name__ == "__main__":
    main()
