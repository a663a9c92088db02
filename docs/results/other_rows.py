"""What screening says of rows, seeds and targets that no rule was made on: every attack of the drill, and clean sets.

    python docs/results/other_rows.py --data $TRAINGUARD_DATA --out docs/results/other_rows.json

Each case takes a block of 10,000 rows of its own data set (block 1 begins at row 10,000; that of block 0 is what all
other tables use), a seed and a target of its own, settings for 30 epochs. Goes on after the last finished case when
started again, as long as neither the version nor the settings have changed.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from screening_alone import USUAL, finished, screened, table

from trainguard.drill.images import Images, load_images
from trainguard.drill.machine import machine, versions
from trainguard.drill.poison import Attack, fitted
from trainguard.drill.recipes import Setting, attack
from trainguard.files import write_atomically

OTHER = USUAL | {"block": 0, "target": 1}
ATTACKS = (
    "badnets",
    "blend",
    "sig",
    "wanet",
    "adaptive_blend",
    "tact",
    "two_backdoors",
    "low_frequency",
    "adaptive_patch",
    "input_aware",
    "label_consistent",
    "physicalba",
    "fragile",
    "spread",
    "all_to_all",
)
SIGNS = ("badnets", "blend", "wanet", "adaptive_blend")


def cases() -> list[tuple[str, dict]]:
    """Blocks, seeds and targets go round; a source is another class than the target."""
    out: list[tuple[str, dict]] = [("clean", OTHER | {"block": block, "seed": block}) for block in range(1, 5)]
    for k, name in enumerate(ATTACKS):
        target = (3 * k + 2) % 10
        case = {"block": 1 + k % 4, "seed": 11 + k, "target": target, "source": (target + 5) % 10}
        out.append((name, OTHER | case | ({"rate": 0.1} if name == "all_to_all" else {})))
    signs = OTHER | {"data": "gtsrb", "block": 1}
    out.append(("clean", signs | {"seed": 5}))
    return out + [(name, signs | {"seed": 31 + k, "target": 7 + 6 * k}) for k, name in enumerate(SIGNS)]


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--out", type=Path, default=Path("other_rows.json"))
    args = parser.parse_args()
    about = {"usual": OTHER, "versions": versions(), "machine": machine("cpu")}
    rows = finished(args.out, about)
    done = {(row["attack"], *(row[key] for key in OTHER)) for row in rows}
    for name, case in cases():
        if (name, *case.values()) in done:
            continue
        images = block(load_images(args.data / case["data"], test_rows=100), case["block"], case["rows"])
        setting = Setting(images.num_classes, case["rate"], case["target"], case["source"])
        chosen = Attack("clean") if name == "clean" else attack(name, setting)
        rows.append(screened(images, fitted(chosen, images.train, images.train_labels, case["seed"]), case))
        with write_atomically(args.out) as path:
            path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        print(table(rows[-1:], OTHER).splitlines()[-1], flush=True)
    print(table(rows, OTHER))


def block(images: Images, number: int, rows: int) -> Images:
    """The images with one block of training rows."""
    part = slice(number * rows, (number + 1) * rows)
    return replace(images, train=images.train[part], train_labels=images.train_labels[part])


if __name__ == "__main__":
    main()
