"""PBE's figures on our own runs: how clean the ranking is (Fig. 6), and what the model knows (Fig. 7), round by round.

    trainguard drill $TRAINGUARD_DATA/cifar10 --attacks badnets,blend,sig --defenses none --model resnet9 --rows 10000 \
      --test-rows 2000 --epochs 15 --out runs/drill
    python docs/pictures/rounds.py runs/drill --data $TRAINGUARD_DATA/cifar10

Purifies the undefended models by rounds alone: no screening, no clean data, four rounds of the paper's shares. Writes
`precision_recall.png` and `rounds.png` beside this file, and their figures to `docs/results/rounds.json`.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import torch

from trainguard import purify
from trainguard.data.pixels import PixelRange
from trainguard.drill.cells import measure
from trainguard.drill.defenses import Outcome
from trainguard.drill.images import load_images
from trainguard.drill.machine import machine, versions
from trainguard.drill.poison import Role
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.scene import Scene, UnitImages, Victim
from trainguard.drill.train import Recipe
from trainguard.files import write_atomically
from trainguard.purification.ranking import precision_recall

HERE = Path(__file__).parent
RECORD = HERE.parent / "results" / "rounds.json"
SHARES = (0.05, 0.2, 0.5, 0.7)
RECALLS = np.linspace(0.02, 1, 50)


class Watch:
    """A callback of `purify` that knows the truth."""

    def __init__(self, scene):
        self.scene, self.rows = scene, []

    def look(self, model):
        """Accuracy, and success rate of the attack."""
        nothing = np.zeros(len(self.scene.labels), dtype=bool)
        cell = measure(self.scene, "none", Outcome(model, nothing, None, 0.0, 0.0), 0)
        return {"acc": cell.acc, "asr": cell.asr}

    def on_purify_round(self, round, model, extra, similarity):
        """Note what a round came to."""
        ranked = np.isfinite(similarity)
        poison = self.scene.role == Role.PAYLOAD
        precision, recall = precision_recall(similarity[ranked], ~poison[ranked])
        row = self.look(model) | {
            "poison in the extra set": float(poison[np.asarray(extra)].mean()),
            "precision": np.interp(RECALLS, recall, precision).tolist(),
        }
        self.rows.append(row)
        print(self.scene.attack.name, round, {k: v for k, v in row.items() if k != "precision"}, flush=True)


def main():
    """Purify, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--attacks", default="badnets,blend,sig")
    args = parser.parse_args()
    settings = json.loads((args.drill / "settings.json").read_text())
    data = load_images(args.data, rows=settings["train_images"], test_rows=settings["test_images"])
    recipe = Recipe.for_model(settings["model"], settings["recipe"]["epochs"], flip=data.flip)
    victim = Victim(settings["model"], recipe, torch.device("cpu"))
    attacks = args.attacks.split(",")
    unit = PixelRange.from_mean_std((0.0,) * 3, (1.0,) * 3)
    found = {}
    for name in attacks:
        scene = Scene.make(data, attack(name, Setting(data.num_classes, settings["rate"])), victim, 0)
        model = scene.fresh_model()
        model.load_state_dict(
            safetensors.torch.load_file(args.drill / "cells" / f"{name}-none-seed0" / "model.safetensors")
        )
        watch = Watch(scene)
        watch.rows.append(watch.look(model.eval()))
        purify(
            model,
            UnitImages(scene.images, scene.labels),
            screening=False,
            patches=0,
            shares=SHARES,
            max_accuracy_loss=1.0,
            pixel_range=unit,
            callbacks=[watch],
            progress=False,
        )
        found[name] = watch.rows
    record = {
        "settings": settings | {"shares": SHARES, "seed": 0, "screening": False, "patches": 0},
        "machine": machine("cpu"),
        "versions": versions(),
        "attacks": found,
    }
    with write_atomically(RECORD) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    draw(found)


def draw(found):
    """Both pictures."""
    size = (3.2 * len(found), 2.6)
    figure, axes = plt.subplots(1, len(found), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        for number, row in enumerate(rows[1:], 1):
            axis.plot(RECALLS, row["precision"], label=f"round {number}", color=plt.cm.viridis(number / 4.5))
        axis.set_title(name)
        axis.set_xlabel("recall of the clean images")
    axes[0][0].set_ylabel("precision (share that is clean)")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(HERE / "precision_recall.png", dpi=110)
    figure, axes = plt.subplots(1, len(found), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        for key, colour in (("acc", "#2c7fb8"), ("asr", "#c0392b")):
            axis.plot([100 * row[key] for row in rows], color=colour, marker="o", label=key.upper())
        axis.set_title(name)
        axis.set_xlabel("round")
        axis.set_ylim(0, 100)
        axis.set_xticks(range(len(rows)))
    axes[0][0].set_ylabel("%")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(HERE / "rounds.png", dpi=110)


if __name__ == "__main__":
    main()
