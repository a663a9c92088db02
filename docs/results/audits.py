"""What the audit says of models of several architectures, lengths of training and data sets, infected and benign.

    python docs/results/audits.py --data $TRAINGUARD_DATA --runs runs/audits --out docs/results/audits.json

Every model is trained by the drill, without a defence, and audited with its training set. Goes on where it was when
started again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from record import add_only

from trainguard.drill.machine import machine, versions
from trainguard.drill.runner import run_drill
from trainguard.files import write_atomically
from trainguard.purification.results import AuditResult

DRILLS = {
    "resnet9": {"epochs": 30, "attacks": ["badnets", "blend", "sig", "input_aware", "clean"]},
    "resnet9-10-percent": {"epochs": 30, "rate": 0.1, "attacks": ["wanet", "all_to_all"]},
    "resnet9-15-epochs": {"epochs": 15, "attacks": ["physicalba"]},
    "resnet9-15-epochs-seeds": {"epochs": 15, "attacks": ["clean"], "seeds": (1, 2)},
    "resnet10t": {"model": "resnet10t", "epochs": 20, "attacks": ["clean", "badnets"]},
    "convnext_atto": {"model": "convnext_atto", "epochs": 20, "attacks": ["clean", "blend"]},
    "gtsrb": {"data": "gtsrb", "epochs": 15, "attacks": ["clean", "badnets"]},
    "vit": {"model": "vit", "epochs": 20, "attacks": ["blend"]},
}
COLUMNS = ("data", "model", "epochs", "attack", "seed", "ACC", "ASR", "verdict", "targets", "because", "nearest", "s")


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        asr = "" if row["asr"] is None else f"{100 * row['asr']:.1f}"
        right = len(set(row["target_classes"]) & set(row["true_targets"]))
        targets = f"{right} of {len(row['true_targets'])}" if row["true_targets"] else ""
        wrong = len(row["target_classes"]) - right
        targets += f", {wrong} wrong" if wrong else ""
        attack = row["attack"] + (f" {row['rate']:.0%}" if row["rate"] != 0.05 else "")
        cells = [row["data"], row["model"], row["epochs"], attack, row["seed"], f"{100 * row['acc']:.1f}", asr]
        cells += [row["verdict"], targets, row["reason"], f"{row['nearest']:.2f}", f"{row['screen_seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is not trained yet, audit, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--runs", type=Path, default=Path("runs/audits"))
    parser.add_argument("--out", type=Path, default=Path("audits.json"))
    add_only(parser, DRILLS)
    args = parser.parse_args()
    rows = []
    for name in args.only:
        how = {"model": "resnet9", "rate": 0.05, "rows": 10_000, "test_rows": 2000} | DRILLS[name]
        data = how.pop("data", "cifar10")
        folder = args.runs / name
        drill = run_drill(args.data / data, defenses=["none", "audit"], out=folder, progress=False, table=False, **how)
        for cell in drill.cells:
            if cell.defense == "audit":
                found = AuditResult.load(folder / "cells" / f"{cell.attack}-audit-seed{cell.seed}")
                about = {"data": data, "model": how["model"], "epochs": how["epochs"], "rate": how["rate"]}
                seen = {
                    "patch_success": found.patch_success,
                    "pull": float(found.pull.max()),
                    "reach": found.reach.tolist(),
                    "nearest": float(np.nanmin(found.nearness)),
                    "settings": found.settings,
                }
                rows.append(about | asdict(cell) | seen)
    record = {"versions": versions(), "machine": machine("cpu"), "rows": rows}
    with write_atomically(args.out) as path:
        path.write_text(json.dumps(record, indent=1, default=list) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
