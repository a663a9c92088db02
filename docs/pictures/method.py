"""The papers' figures on our own runs: what holds still (AdvrBD Fig. 5), what an enhanced probe knows (AdvrBD Fig. 6).

    python docs/pictures/method.py --data $TRAINGUARD_DATA/cifar10

Writes `consistency.png` and `enhancement.png` beside this file, and their figures to `docs/results/method.json`.
Screens each attack twice, as trainguard does and as the paper does: about four minutes an attack on two cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import trainguard
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
from trainguard.models import UnitPixels

HERE = Path(__file__).parent
RECORD = HERE.parent / "results" / "method.json"
BINS = np.linspace(-7, 1, 41)  # of the logarithm to base 10 of the divergence


def known(scene, model):
    """Accuracy, and success rate of the attack, of a model of unit pixels."""
    cell = measure(scene, "none", Outcome(model, np.zeros(len(scene.labels), bool), None, 0.0, 0.0), 0)
    return {"acc": cell.acc, "asr": cell.asr}


def consistencies(scene):
    """Histograms of Eq. 3 by role, for the first probe."""
    images = UnitImages(scene.images, scene.labels)
    result = trainguard.screen(images, epochs=scene.victim.recipe.epochs, seed=scene.seed, bounds=(0, 1))
    payload = scene.role == Role.PAYLOAD
    target = np.isin(result.labels, np.unique(result.labels[payload])) & ~payload
    found = np.log10(result.consistency.clip(1e-7))
    parts = {"poison": payload, "clean, target class": target, "clean, other classes": ~payload & ~target}
    return {name: np.histogram(found[part], BINS)[0].tolist() for name, part in parts.items()}


def enhancements(scene):
    """After the warm-up and after every iteration of Algorithm 2: what the probe knows, and how clean D_c is."""
    model = scene.fresh_model()
    channels = scene.images.shape[1]
    probe = UnitPixels(model, PixelRange.from_mean_std((0.0,) * channels, (1.0,) * channels))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainguard.screen(
            UnitImages(scene.images, scene.labels),
            scene.fresh_model(),
            epochs=scene.victim.recipe.epochs,
            seed=scene.seed,
            bounds=(0, 1),
            preset="paper",
            state_dir=folder,
        )
        stages = ["warm-up", *sorted(path.stem for path in Path(folder).glob("enhancement ?.pt"))]
        for stage in stages:
            probe.load_state_dict(torch.load(Path(folder) / f"{stage}.pt", weights_only=True)["model"])
            row = known(scene, probe.eval())
            partition = Path(folder) / f"{stage} partition.pt"
            if partition.exists():
                trusted = torch.load(partition, weights_only=True)["trusted"].numpy()
                row["poison in D_c"] = float((scene.role[trusted] == Role.PAYLOAD).mean())
                row["D_c"] = float(trusted.mean())
            rows.append(row)
    return rows


def draw_consistency(attacks, figures):
    """AdvrBD Fig. 5."""
    figure, axes = plt.subplots(1, len(attacks), figsize=(3.2 * len(attacks), 2.6), sharex=True, layout="constrained")
    centres = (BINS[:-1] + BINS[1:]) / 2
    for axis, name in zip(np.atleast_1d(axes), attacks, strict=True):
        for part, colour in zip(figures[name]["consistency"], ("#c0392b", "#2c7fb8", "#999999"), strict=True):
            counts = np.array(figures[name]["consistency"][part])
            axis.plot(centres, counts / max(1, counts.sum()), color=colour, label=part, drawstyle="steps-mid")
        axis.set_title(name)
        axis.set_xlabel("log10 of the divergence (Eq. 3)")
    np.atleast_1d(axes)[0].set_ylabel("share of the part")
    np.atleast_1d(axes)[0].legend(fontsize=7, frameon=False)
    figure.savefig(HERE / "consistency.png", dpi=110)


def draw_enhancement(attacks, figures):
    """AdvrBD Fig. 6, with the purity of D_c."""
    figure, axes = plt.subplots(1, len(attacks), figsize=(3.2 * len(attacks), 2.6), sharey=True, layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), attacks, strict=True):
        rows = figures[name]["enhancement"]
        for key, colour, label in (("acc", "#2c7fb8", "ACC"), ("asr", "#c0392b", "ASR")):
            axis.plot([100 * row[key] for row in rows], color=colour, marker="o", label=label)
        steps = [step for step, row in enumerate(rows) if "D_c" in row]
        axis.plot(
            steps,
            [100 * rows[step]["poison in D_c"] for step in steps],
            color="#555555",
            ls="--",
            label="poison in D_c",
        )
        axis.set_title(name)
        axis.set_xlabel("iteration of Algorithm 2")
        axis.set_xticks(range(len(rows)))
    np.atleast_1d(axes)[0].set_ylabel("%")
    np.atleast_1d(axes)[0].legend(fontsize=7, frameon=False)
    figure.savefig(HERE / "enhancement.png", dpi=110)


def main():
    """Screen, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--attacks", default="badnets,blend,sig,tact")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=15, help="length of the protected training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    attacks = args.attacks.split(",")
    data = load_images(args.data, rows=args.rows, test_rows=2000)
    victim = Victim("resnet9", Recipe.for_model("resnet9", args.epochs, flip=data.flip), torch.device("cpu"))
    figures = {}
    for name in attacks:
        scene = Scene.make(data, attack(name, Setting(data.num_classes)), victim, args.seed)
        figures[name] = {"consistency": consistencies(scene), "enhancement": enhancements(scene)}
    settings = {name: value for name, value in vars(args).items() if name != "data"} | {"model": "resnet9"}
    record = {"settings": settings, "machine": machine("cpu"), "versions": versions(), "attacks": figures}
    with write_atomically(RECORD) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    draw_consistency(attacks, figures)
    draw_enhancement(attacks, figures)


if __name__ == "__main__":
    main()
