"""What a model learns of triggers that the drill does not have where some of their poison stays in.

    python docs/results/guarded_triggers.py --data $TRAINGUARD_DATA --out docs/results/guarded_triggers.json

Cases of `unseen_triggers.py` of which screening flags a part, on their rows, seeds and targets: trained on without a
defence, with the guard, and with what was flagged given back, for 30 epochs; five minutes each. Goes on after the last
finished case when started again, as long as neither the version nor the settings have changed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import unseen_triggers as unseen
from record import Record, add_only, rounded
from screening_alone import block

from trainguard.drill.cells import measure
from trainguard.drill.defenses import defend, relabel
from trainguard.drill.images import load_images
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.train import Recipe

USUAL = {"model": "resnet9", "epochs": 30, "rows": 10_000, "test_rows": 10_000}
ROUNDS = {
    "another hue": 2,
    "upside down": 2,
    "a faint picture": 2,
    "a negative": 6,
    "tiles take three classes round in a circle": 6,
    "a picture, more or less of it": 5,
}
KEPT = ("acc", "asr", "untriggered", "tpr", "fpr", "flagged", "verdict", "screen_seconds", "train_seconds", "commit")
COLUMNS = ("trigger", "ACC", "ASR", "guarded", "relabelled", "untriggered", "TPR", "FPR")


def scene_of(data: Path, name: str) -> Scene:
    """The poisoned images of a case, as `unseen_triggers.py` has them."""
    number = ROUNDS[name]
    images = load_images(data / "cifar10", test_rows=USUAL["test_rows"])
    pictures = images.test[92:100]
    made = {2: lambda: unseen.more_cases(pictures[0]), 5: lambda: unseen.later_cases(pictures)}
    made |= {6: lambda: unseen.further_cases(pictures)}
    first = 100 * unseen.BLOCKS[number]
    seed, attack = next((k, a) for k, a in enumerate(made[number](), first) if a.name == name)
    victim = Victim(USUAL["model"], Recipe.for_model(USUAL["model"], USUAL["epochs"]), torch.device("cpu"))
    return Scene.make(block(images, unseen.BLOCKS[number], USUAL["rows"]), attack, victim, seed)


def run(scene: Scene, folder: Path) -> dict:
    """The three models of a case."""
    found = {}
    for defense in ("none", "guard"):
        outcome = defend(scene, defense, folder, lambda count: None)
        outcome.save(folder)
        found[defense] = measure(scene, defense, outcome, 0)
    seconds = found["guard"].screen_seconds, found["guard"].train_seconds
    found["guard+relabel"] = measure(scene, "guard+relabel", relabel(scene, folder, seconds, lambda count: None), 0)
    return {name: rounded({key: getattr(cell, key) for key in KEPT}) for name, cell in found.items()}


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [row[name] for name in ("none", "guard", "guard+relabel")]
        accuracy = " / ".join(f"{100 * cell['acc']:.1f}" for cell in cells)
        shares = [*(cell["asr"] for cell in cells), cells[1]["untriggered"], cells[1]["tpr"], cells[1]["fpr"]]
        lines.append(
            f"| {row['trigger']} | {accuracy} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/")
    parser.add_argument("--out", type=Path, default=Path("guarded_triggers.json"))
    add_only(parser, ROUNDS)
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    for name in args.only:
        if name not in {row["trigger"] for row in record.rows}:
            with tempfile.TemporaryDirectory() as folder:
                record.add({"trigger": name} | run(scene_of(args.data, name), Path(folder)))
            print(table(record.rows[-1:]).splitlines()[-1], flush=True)
    print(table(record.rows))


if __name__ == "__main__":
    main()
