"""What screening says of public data sets that nothing was made on: clean as they come, and poisoned.

    python docs/results/other_sets.py --sets SETS --out docs/results/other_sets.json
    python docs/results/other_sets.py --sets SETS --only coins --out coins.json

SETS holds an image folder for each set, one folder per class; docs/results.md says where they come from. Settings for
30 epochs. Goes on after the last finished case when started again, as long as neither the version nor the settings have
changed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from record import Record, add_only
from screening_alone import USUAL, run, table

from trainguard.drill.images import Images, load_images

MOST = 10_000  # images of a set, spread over it; all of it where it has less
TOLD = {"kind": "", "rate": 0.05, "target": 1, "seed": 0}  # of a case in the table
CASES: tuple[tuple[str, int, str, dict], ...] = (
    ("mnist", 28, "clean", {}),
    ("clothing", 32, "clean", {}),
    ("clothing", 64, "clean", {}),
    ("hands", 32, "clean", {}),
    ("hands", 64, "clean", {}),
    ("flowers", 32, "clean", {}),
    ("flowers", 64, "clean", {}),
    ("natural", 32, "clean", {}),
    ("natural", 64, "clean", {}),
    ("trash", 32, "clean", {}),
    ("trash", 64, "clean", {}),
    ("brain", 32, "clean", {}),
    ("brain", 64, "clean", {}),
    ("xray", 32, "clean", {}),
    ("smile", 32, "clean", {}),
    ("fer", 32, "clean", {}),
    ("fer", 48, "clean", {}),
    ("faces", 32, "clean", {}),
    ("caltech", 32, "clean", {}),
    ("caltech", 64, "clean", {}),
    ("pets", 32, "clean", {}),
    ("pets", 64, "clean", {}),
    ("masks", 32, "clean", {}),
    ("isl", 32, "clean", {}),
    ("vsigns", 32, "clean", {}),
    ("asl", 32, "clean", {}),
    ("asl", 64, "clean", {}),
    ("letters", 32, "clean", {}),
    ("bins", 32, "clean", {}),
    ("bins", 64, "clean", {}),
    ("expressions", 32, "clean", {}),
    ("cells", 32, "clean", {}),
    ("cells", 64, "clean", {}),
    ("monkeys", 32, "clean", {}),
    ("textures", 32, "clean", {}),
    ("fonts", 32, "clean", {}),
    ("shapes", 32, "clean", {}),
    ("tiny20", 32, "clean", {}),
    ("trash", 32, "clean", {"seed": 1}),
    ("trash", 64, "clean", {"seed": 1}),
    ("clothing", 32, "clean", {"seed": 1}),
    ("clothing", 64, "clean", {"seed": 1}),
    ("natural", 64, "clean", {"seed": 1}),
    ("brain", 32, "clean", {"seed": 1}),
    ("rooms", 32, "clean", {}),
    ("coins", 32, "clean", {}),
    ("cards", 32, "clean", {}),
    ("seedlings", 32, "clean", {}),
    ("nepali", 32, "clean", {}),
    ("scenes", 32, "clean", {}),
    ("pokemon", 32, "clean", {}),
    ("steel", 32, "clean", {}),
    ("vehicles", 32, "clean", {}),
    ("facemasks", 32, "clean", {}),
    ("gestures", 32, "clean", {}),
    ("alphabet", 32, "clean", {}),
    ("fundus", 32, "clean", {}),
    ("dogcat", 32, "clean", {}),
    ("grocery", 32, "clean", {}),
    ("sports", 32, "clean", {}),
    ("devanagari", 32, "clean", {}),
    ("satellite", 32, "clean", {}),
    ("dementia", 32, "clean", {}),
    ("leaves", 32, "clean", {}),
    ("captcha", 32, "clean", {}),
    ("mnist", 28, "badnets", {}),
    ("mnist", 28, "blend", {}),
    ("mnist", 28, "wanet", {}),
    ("mnist", 28, "sig", {}),
    ("flowers", 32, "badnets", {}),
    ("flowers", 32, "wanet", {}),
    ("natural", 32, "blend", {}),
    ("natural", 64, "badnets", {}),
    ("brain", 32, "badnets", {}),
    ("xray", 32, "badnets", {}),
    ("smile", 32, "blend", {}),
    ("faces", 32, "badnets", {}),
    ("faces", 32, "badnets", {"target": 4}),
    ("fer", 32, "tact", {}),
    ("clothing", 64, "blend", {}),
    ("hands", 32, "badnets", {}),
    ("caltech", 32, "badnets", {}),
    ("letters", 32, "badnets", {"target": 20}),
    ("cells", 32, "sig", {}),
    ("cells", 64, "badnets", {}),
    ("rooms", 32, "blend", {"target": 7}),
    ("coins", 32, "badnets", {"target": 5}),
    ("cards", 32, "wanet", {"target": 30}),
    ("seedlings", 32, "sig", {"target": 10}),
    ("scenes", 32, "adaptive_patch", {"target": 3}),
    ("pokemon", 32, "badnets", {"target": 100}),
    ("grocery", 32, "blend", {"target": 40}),
    ("sports", 32, "wanet", {"target": 12}),
    ("devanagari", 32, "sig", {"target": 20, "rate": 0.01}),
    ("satellite", 64, "badnets", {"target": 5}),
    ("dementia", 32, "input_aware", {"target": 0}),
    ("leaves", 64, "blend", {"target": 3}),
    ("captcha", 32, "adaptive_patch", {"target": 7}),
)


def spread(images: Images) -> Images:
    """At most `MOST` of them."""
    index = np.linspace(0, len(images.train) - 1, min(MOST, len(images.train))).astype(int)
    return replace(images, train=images.train[index], train_labels=images.train_labels[index])


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder with an image folder for each set")
    add_only(parser, list(dict.fromkeys(name for name, *_ in CASES)))
    parser.add_argument("--out", type=Path, default=Path("other_sets.json"))
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    done = {(row["kind"], row["attack"], row["target"], row["seed"]) for row in record.rows}
    for name, side, attack, changed in (case for case in CASES if case[0] in args.only):
        kind, case = f"{name}, {side} pixels", USUAL | changed
        if (kind, attack, case["target"], case["seed"]) not in done:
            folder = args.sets / name
            images = spread(load_images(folder, test=folder, test_rows=1, size=side))
            record.add(run(images, attack, case | {"data": name, "rows": len(images.train)}) | {"kind": kind})
            print(table(record.rows[-1:], TOLD).splitlines()[-1], flush=True)
    print(table(record.rows, TOLD))


if __name__ == "__main__":
    main()
