"""What screening says of poisoned data, without training anything on them: what the drill's tables do not hold.

    python docs/results/screening_alone.py --data $TRAINGUARD_DATA --out docs/results/screening_alone.json

Goes on after the last finished case when started again, as long as neither the version nor the settings have changed.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import Record, rounded

from trainguard import screen
from trainguard.data.pixels import PixelRange
from trainguard.drill.images import Images, load_images
from trainguard.drill.poison import Attack, Role, fitted, poison_arrays
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.scene import UnitImages

USUAL: dict[str, Any] = {"data": "cifar10", "rate": 0.05, "rows": 10_000, "epochs": 30, "seed": 0}
USUAL |= {"source": 0, "target": 1, "block": 0}
NAMES = ("wanet", "clean", "blend", "badnets", "sig", "physicalba", "tact", "adaptive_blend", "adaptive_patch")
NAMES += ("input_aware", "label_consistent", "low_frequency", "two_backdoors", "fragile", "spread")
CASES = (
    ("spread", {}),
    ("all_to_all", {"rate": 0.1}),
    ("wanet", {"rate": 0.1}),
    ("badnets", {"rate": 0.2}),
    ("badnets", {"rate": 0.01}),
    ("blend", {"rate": 0.01}),
    ("badnets", {"rate": 0.005}),
    ("blend", {"rate": 0.005}),
    ("two_backdoors", {"epochs": 15}),
    ("blend", {"rows": 3000}),
    ("clean", {"rows": 3000}),
    ("clean", {"seed": 1}),
    ("clean", {"seed": 2}),
    ("clean", {"seed": 3}),
    ("clean", {"seed": 4}),
    ("clean", {"data": "gtsrb"}),
    ("clean", {"data": "gtsrb", "rows": 21_748}),
    ("blend", {"data": "gtsrb"}),
    ("badnets", {"data": "gtsrb"}),
    ("wanet", {"data": "gtsrb"}),
    ("adaptive_blend", {"data": "gtsrb"}),
    ("adaptive_patch", {"data": "gtsrb"}),
    ("low_frequency", {"data": "gtsrb"}),
    ("two_backdoors", {"data": "gtsrb"}),
    ("input_aware", {"data": "gtsrb"}),
    ("physicalba", {"data": "gtsrb"}),
    ("fragile", {"data": "gtsrb"}),
    ("tact", {"data": "gtsrb", "rate": 0.03, "source": 2}),
    ("sig", {"data": "gtsrb", "rate": 0.02}),
    ("label_consistent", {"data": "gtsrb", "rate": 0.02}),
)
WHOLE = (
    *((name, {"rows": 50_000}) for name in NAMES),
    ("all_to_all", {"rows": 50_000, "rate": 0.1}),
    ("badnets", {"rows": 50_000, "rate": 0.01}),
    ("badnets", {"rows": 50_000, "rate": 0.2}),
)
COLUMNS = ("attack", "case", "verdict", "confidence", "targets", "TPR", "FPR", "seconds")


def run(images: Images, name: str, case: dict) -> dict:
    """Poison with an attack of the drill, screen, count."""
    setting = Setting(images.num_classes, case["rate"], case["target"], case["source"])
    chosen = Attack("clean") if name == "clean" else attack(name, setting)
    return screened(images, fitted(chosen, images.train, images.train_labels, case["seed"]), case)


def screened(images: Images, ready: Attack, case: dict) -> dict:
    """Poison with any attack, screen, count."""
    pixels, labels, role = poison_arrays(images.train, images.train_labels, ready, case["seed"])
    channels = pixels.shape[1]
    unit = PixelRange.from_mean_std((0.0,) * channels, (1.0,) * channels)
    found = screen(
        UnitImages(pixels, labels), epochs=case["epochs"], seed=case["seed"], pixel_range=unit, progress=False
    )
    payload, untouched = (role == Role.PAYLOAD).numpy(), (role == Role.CLEAN).numpy()
    return {
        "attack": ready.name,
        **case,
        "verdict": found.verdict,
        "confidence": found.confidence,
        "reason": found.reason,
        "target_classes": list(found.target_classes),
        "true_targets": np.unique(labels.numpy()[payload]).tolist(),
        "payload": int(payload.sum()),
        "flagged": int(found.suspect.sum()),
        "tpr": float(found.suspect[payload].mean()) if payload.any() else None,
        "fpr": float(found.suspect[untouched].mean()),
        "timing": rounded(found.timing),
        "findings": [rounded(finding) for finding in found.settings["findings"]],
    }


def block(images: Images, number: int, rows: int) -> Images:
    """The images with one block of training rows."""
    part = slice(number * rows, (number + 1) * rows)
    return replace(images, train=images.train[part], train_labels=images.train_labels[part])


def table(rows: list[dict], usual: dict = USUAL) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        case = [f"{key} {row[key]}" for key, value in usual.items() if row[key] != value]
        right = len(set(row["target_classes"]) & set(row["true_targets"]))
        wrong = len(row["target_classes"]) - right
        targets = f"{right} of {len(row['true_targets'])}" + (f", {wrong} wrong" if wrong else "")
        tpr = "" if row["tpr"] is None else f"{100 * row['tpr']:.1f}"
        cells = [row["attack"], ", ".join(case), row["verdict"], f"{row['confidence']:.2f}"]
        cells += [targets, tpr, f"{100 * row['fpr']:.2f}", f"{row['timing']['total']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def go_through(cases: Iterable[tuple[str, dict]], data: Path, out: Path) -> None:
    """Run what is not there yet, and print the table."""
    record = Record(out, USUAL)
    done = {(row["attack"], *(row[key] for key in USUAL)) for row in record.rows}
    for name, changed in cases:
        case = USUAL | changed
        if (name, *case.values()) not in done:
            images = block(load_images(data / case["data"], test_rows=100), case["block"], case["rows"])
            record.add(run(images, name, case))
            print(table(record.rows[-1:]).splitlines()[-1], flush=True)
    print(table(record.rows))


def main() -> None:
    """Run all, or some attacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--out", type=Path, default=Path("screening_alone.json"))
    parser.add_argument("--only", nargs="*", help="attacks; default: all")
    parser.add_argument("--whole", action="store_true", help="on all of CIFAR-10 in place of 10,000 rows and signs")
    args = parser.parse_args()
    cases = WHOLE if args.whole else CASES
    go_through([case for case in cases if not args.only or case[0] in args.only], args.data, args.out)


if __name__ == "__main__":
    main()
