"""What the audit says where nothing but clean images is at hand: a delivered model, and no training set of its.

    python docs/results/audits_on_clean_images.py --data $TRAINGUARD_DATA --runs runs --out audits_on_clean_images.json

    python docs/results/audits_on_clean_images.py --data $TRAINGUARD_DATA --families --out audits_of_families.json

A thousand test images, without screening. Models that the drill has trained in the same folders, by the commands of
results.md, are not trained again. With `--families` other networks: none of these had been audited, or anything like
them, when the audit's bars were set.
"""

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from record import Record, add_only, rounded

from trainguard import audit
from trainguard.data.pixels import PixelRange
from trainguard.drill.images import load_images
from trainguard.drill.poison import Attack
from trainguard.drill.runner import run_drill
from trainguard.drill.scene import Scene, UnitImages, Victim
from trainguard.drill.train import Recipe
from trainguard.purification.bending import lead_of

USUAL = {"model": "resnet9", "epochs": 30, "rate": 0.05, "rows": 10_000, "test_rows": 10_000}
IMAGES = 1000
SMALL_TIER = (
    "badnets,blend,physicalba,adaptive_blend,adaptive_patch,label_consistent,low_frequency,two_backdoors,fragile,sig,"
    "wanet,tact,input_aware,clean"
)
DRILLS = {
    "mended": {"attacks": SMALL_TIER.split(",")},
    "mended10": {"rate": 0.1, "attacks": ["all_to_all", "wanet"]},
    "audits/gtsrb": {"data": "gtsrb", "epochs": 15, "test_rows": 4_890, "attacks": ["clean", "badnets"]},
    "audits/resnet10t": {"model": "resnet10t", "epochs": 20, "attacks": ["clean", "badnets"]},
}
FAMILIES = {  # each with a seed and a target of its own
    f"families/{name}": {
        "model": name,
        "epochs": 20,
        "seeds": (40 + k,),
        "target": (3 * k + 2) % 10,
        "attacks": attacks,
    }
    for k, (name, attacks) in enumerate(
        {
            "regnetx_002": ["clean", "badnets", "blend", "wanet"],
            "repvgg_a0": ["clean", "badnets", "low_frequency"],
            "seresnet18": ["clean", "blend", "adaptive_patch"],
            "mobilenetv3_small_100": ["clean", "badnets", "physicalba"],
            "mobilenetv4_conv_small": ["clean", "blend"],
            "densenet121": ["clean", "badnets"],
            "efficientnet_b0": ["clean", "blend"],
        }.items()
    )
}
COLUMNS = (
    "data",
    "model",
    "attack",
    "ACC",
    "ASR",
    "verdict",
    "targets",
    "because",
    "picture",
    "bend",
    "own patch",
    "s",
)


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        asr = "" if row["asr"] is None else f"{100 * row['asr']:.1f}"
        attack = row["attack"] + (f" {row['rate']:.0%}" if row["rate"] != USUAL["rate"] else "")
        targets = ", ".join(map(str, row["target_classes"]))
        cells = [row["data"], row["model"], attack, f"{100 * row['acc']:.1f}", asr, row["verdict"], targets]
        own = "" if row["own_patch"] is None else f"{100 * row['own_patch']:.0f}"
        cells += [row["reason"], f"{row['picture']:.2f}", f"{row['bend']:.2f}", own, f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Audit every model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("audits_on_clean_images.json"))
    parser.add_argument("--families", action="store_true", help="the networks of other families in place of all these")
    add_only(parser, [*DRILLS, *FAMILIES])
    args = parser.parse_args()
    record = Record(args.out, USUAL)
    record.rows = []
    drills = FAMILIES if args.families else DRILLS
    for name in (name for name in args.only if name in drills):
        how = USUAL | drills[name]
        data = how.pop("data", "cifar10")
        folder = args.runs / name
        drill = run_drill(args.data / data, defenses=["none"], out=folder, progress=False, table=False, **how)
        images = load_images(args.data / data, rows=how["rows"], test_rows=how["test_rows"])
        recipe = Recipe.for_model(how["model"], how["epochs"], flip=images.flip)
        scene = Scene.make(images, Attack("clean"), Victim(how["model"], recipe, torch.device("cpu")), 0)
        for cell in drill.cells:
            weights = folder / "cells" / f"{cell.attack}-none-seed{cell.seed}" / "model.safetensors"
            about = {"data": data, "model": how["model"], "rate": how["rate"], "attack": cell.attack}
            about |= {"acc": cell.acc, "asr": cell.asr, "targets": list(cell.true_targets)}
            record.add(rounded(about | _audited(scene, weights)))
    print(table(record.rows))


def _audited(scene: Scene, weights: Path) -> dict:
    model = scene.fresh_model()
    model.load_state_dict(safetensors.torch.load_file(weights))
    clean = UnitImages(scene.data.test[-IMAGES:], scene.data.test_labels[-IMAGES:])
    unit = PixelRange.from_mean_std((0.0,) * 3, (1.0,) * 3)
    found = audit(model.eval(), clean, pixel_range=unit, screening=False, progress=False)
    return {
        "verdict": found.verdict,
        "confidence": found.confidence,
        "reason": found.reason,
        "picture": float(np.nanmin(found.nearness)),
        "bend": lead_of({k: float(bend) for k, bend in enumerate(found.bend) if bend}),
        "own_patch": float(found.own_patch.max()) if len(found.own_patch) else None,
        "seconds": found.timing["total"],
        "patch_success": found.patch_success,
        "target_classes": list(found.target_classes),
    }


if __name__ == "__main__":
    main()
