"""What screening says of photographs as large as most people train on: 128 to 224 pixels a side.

    python docs/results/large_images.py --sets SETS --out docs/results/large_images.json

SETS holds an image folder for each set, one folder per class; docs/results_screening.md says where they come from. At
most 4,000 images of each, spread over it, brought to one size; settings for 30 epochs; 5% poison. The drill's triggers
grow with the image; the *small square* has a twenty-fourth of its side. Goes on after the last finished case when
started again, as long as neither the version nor the settings have changed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from other_sets import TOLD
from record import Record, add_only
from screening_alone import USUAL, run, screened, table
from torch import Tensor
from unseen_triggers import attacks, faint_noise, moved

from trainguard.drill.images import Images, load_images

MOST = 4_000  # images of a set
CASES: tuple[tuple[str, int, str, dict], ...] = (
    ("sports", 224, "badnets", {"target": 5}),
    ("sports", 224, "clean", {}),
    ("sports", 224, "a small square", {"target": 9}),
    ("rooms", 200, "blend", {"target": 7}),
    ("rooms", 200, "a small square", {"target": 3}),
    ("rooms", 200, "clean", {}),
    ("grocery", 224, "clean", {}),
    ("scenes", 128, "sig", {"target": 3}),
    ("scenes", 128, "adaptive_patch", {"target": 2}),
    ("scenes", 128, "clean", {}),
    ("seedlings", 128, "wanet", {"target": 6}),
    ("seedlings", 128, "clean", {}),
    ("satellite", 224, "a small square", {"target": 2}),
    ("satellite", 224, "clean", {}),
    ("leaves", 224, "blend", {"target": 3}),
    ("leaves", 224, "clean", {}),
    ("grocery", 224, "badnets", {"target": 40}),
    ("sports", 224, "wanet", {"target": 12}),
    ("sports", 224, "faint noise", {"target": 2}),
    ("rooms", 200, "input_aware", {"target": 11}),
)


def small_square(x: Tensor, own: np.random.Generator) -> Tensor:
    """A green square of a twenty-fourth of the side, a little away from the lower right corner."""
    out, size = x.clone(), max(2, x.shape[-1] // 24)
    out[:, -2 * size : -size, -2 * size : -size] = x.new_tensor((0.0, 1.0, 0.0))[:, None, None]
    return out


OWN = {"a small square": small_square, "faint noise": faint_noise}


def spread(images: Images) -> Images:
    """At most `MOST` of them."""
    index = np.linspace(0, len(images.train) - 1, min(MOST, len(images.train))).astype(int)
    return replace(images, train=images.train[index], train_labels=images.train_labels[index])


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder with an image folder for each set")
    add_only(parser, list(dict.fromkeys(name for name, *_ in CASES)))
    parser.add_argument("--out", type=Path, default=Path("large_images.json"))
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    done = {(row["kind"], row["attack"]) for row in record.rows}
    for name, side, attack, changed in (case for case in CASES if case[0] in args.only):
        kind, case = f"{name}, {side} pixels", USUAL | changed
        if (kind, attack) not in done:
            images = spread(load_images(args.sets / name, test=args.sets / name, test_rows=1, size=side))
            case |= {"data": name, "rows": len(images.train)}
            if attack in OWN:
                row = screened(images, attacks({attack: [moved(OWN[attack], case["target"])]})[0], case)
            else:
                row = run(images, attack, case)
            record.add(row | {"kind": kind})
            print(table(record.rows[-1:], TOLD).splitlines()[-1], flush=True)
    print(table(record.rows, TOLD))


if __name__ == "__main__":
    main()
