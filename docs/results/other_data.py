"""What screening says where labels are wrong or classes few: CIFAR-10 with other labels, made and then poisoned.

    python docs/results/other_data.py --data $TRAINGUARD_DATA --out docs/results/other_data.json

Goes on after the last finished case when started again, as long as neither the version nor the settings have changed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from record import Record
from screening_alone import USUAL, run, table

from trainguard.drill.images import Images, load_images

CASES = (
    ("a tenth of the labels drawn at random", ("clean",)),
    ("a fifth of the labels drawn at random", ("clean", "badnets", "wanet")),
    ("two fifths of the labels drawn at random", ("clean",)),
    ("the first three classes", ("badnets", "blend", "clean")),
    ("vehicles, animals", ("badnets", "blend", "clean")),
    ("five pairs of classes", ("blend", "badnets", "clean")),
)


def labelled(images: Images, change: str) -> Images:
    """The images under other labels."""
    rng, labels = np.random.default_rng(5), images.train_labels.clone()
    if change.endswith("at random"):
        share = {"a tenth": 0.1, "a fifth": 0.2, "two fifths": 0.4}[change.split(" of ")[0]]
        drawn = torch.from_numpy(rng.random(len(labels)) < share)
        labels[drawn] = torch.from_numpy(rng.integers(0, images.num_classes, len(labels)))[drawn]
        return replace(images, train_labels=labels)
    if change == "the first three classes":
        kept = labels < 3
        return replace(images, train=images.train[kept], train_labels=labels[kept], class_names=images.class_names[:3])
    if change == "vehicles, animals":
        names = ("vehicles", "animals")
        return replace(images, train_labels=((labels > 1) & (labels < 8)).long(), class_names=names)
    return replace(images, train_labels=labels % 5, class_names=tuple("abcde"))


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/")
    parser.add_argument("--out", type=Path, default=Path("other_data.json"))
    args = parser.parse_args()
    images = load_images(args.data / "cifar10", rows=USUAL["rows"], test_rows=100)
    record = Record(args.out, USUAL)
    done = {(row["labels"], row["attack"]) for row in record.rows}
    for change, attacks in CASES:
        for name in attacks:
            if (change, name) not in done:
                record.add(run(labelled(images, change), name, USUAL) | {"labels": change})
                print(table(record.rows[-1:], {"labels": ""}).splitlines()[-1], flush=True)
    print(table(record.rows, {"labels": ""}))


if __name__ == "__main__":
    main()
