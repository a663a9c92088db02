"""What purification makes of models that its settings were not chosen on: other architectures, and signs.

    python docs/results/repairs_elsewhere.py --data $TRAINGUARD_DATA --runs runs/audits --out repairs_elsewhere.json

Goes on where it was when started again. What `audits.py` has trained in the same folder is not trained again.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from record import Record, add_only, rounded

from trainguard.drill.cells import Cell
from trainguard.drill.runner import run_drill

USUAL = {"model": "resnet9", "epochs": 20, "rate": 0.05, "rows": 10_000, "test_rows": 2000}
DEFENSES = ["none", "fine-tune", "purify", "purify-clean"]
DRILLS = {
    "resnet10t": {"model": "resnet10t", "attacks": ["clean", "badnets"]},
    "convnext_atto": {"model": "convnext_atto", "attacks": ["clean", "blend"]},
    "cnn": {"model": "cnn", "attacks": ["clean", "blend"]},
    "vit": {"model": "vit", "attacks": ["blend"]},
    "gtsrb": {"data": "gtsrb", "epochs": 15, "attacks": ["clean", "badnets"]},
}


def table(rows: list[dict]) -> str:
    """A line for each model: ACC / ASR under each defense."""
    lines = ["| data | model | attack | " + " | ".join(DEFENSES) + " |", "|" + " --- |" * (3 + len(DEFENSES))]
    cells = {(row["data"], row["model"], row["attack"], row["defense"]): row for row in rows}
    for data, model, attack in dict.fromkeys(key[:3] for key in cells):
        shown = []
        for defense in DEFENSES:
            row = cells.get((data, model, attack, defense), {"acc": None, "asr": None})
            shown.append(" / ".join(f"{100 * x:.1f}" for x in (row["acc"], row["asr"]) if x is not None))
        lines.append("| " + " | ".join((data, model, attack, *shown)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train and mend what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--runs", type=Path, default=Path("runs/audits"))
    parser.add_argument("--out", type=Path, default=Path("repairs_elsewhere.json"))
    add_only(parser, DRILLS)
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    record.rows = []
    for name in args.only:
        how = USUAL | DRILLS[name]
        data = how.pop("data", "cifar10")
        drill = run_drill(args.data / data, defenses=DEFENSES, out=args.runs / name, progress=False, table=False, **how)
        about = {"data": data, "model": how["model"], "epochs": how["epochs"]}
        record.rows += [rounded(about | _figures(cell)) for cell in drill.cells]
        record.save()
    print(table(record.rows))


def _figures(cell: Cell) -> dict:
    wanted = ("attack", "defense", "seed", "acc", "asr", "verdict", "screen_seconds", "train_seconds")
    return {key: value for key, value in asdict(cell).items() if key in wanted}


if __name__ == "__main__":
    main()
