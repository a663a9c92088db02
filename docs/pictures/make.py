"""Make the pages that the documentation shows, and photograph them.

    python docs/pictures/make.py --data path/to/cifar10 --pages runs/pages

The first rows of CIFAR-10 are poisoned with a patch, a blended picture and (labels left as they are) stripes, and
screened; so are they untouched. The model that falls for the patch is audited and purified, and a small drill runs on
scikit-learn's digits. Needs Chromium. About ten minutes on two free cores.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import trainguard
from trainguard.drill.images import load_images
from trainguard.drill.poison import Attack
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.runner import run_drill
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.train import Recipe
from trainguard.report import build

HERE = Path(__file__).parent
EPOCHS = 16
COLOURS = 96  # of each picture: they stay small


class Poisoned(torch.utils.data.Dataset):
    """The training set of a scene as an ordinary data set."""

    def __init__(self, scene):
        self.images, self.labels, self.classes = scene.images, scene.labels, list(scene.data.class_names)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index].float() / 255, int(self.labels[index])


def photograph(page, name, *, part="", width=1000, height=900, dark=False):
    """One picture of a page: from the heading `part` on, as large as a screen of that size."""
    chromium = shutil.which("chromium") or "google-chrome"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    target = HERE / f"{name}.png"
    address = page.resolve().as_uri() + (f"#{part}" if part else "")
    subprocess.run([chromium, *options, f"--screenshot={target}", address], check=True, capture_output=True)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(COLOURS)
    small.save(target, optimize=True)


def main():
    """Pages first, then the pictures of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--pages", type=Path, default=Path("runs/pages"), help="where the pages go")
    parser.add_argument("--rows", type=int, default=3000, help="training images to use")
    args = parser.parse_args()

    data = load_images(args.data, rows=args.rows, test_rows=500)
    setting = Setting(data.num_classes, 0.05, 1)
    victim = Victim("resnet9", Recipe.for_model("resnet9", EPOCHS), torch.device("cpu"))
    for name in ("clean", "sig", "blend", "badnets"):
        scene = Scene.make(data, Attack("clean") if name == "clean" else attack(name, setting), victim, 0)
        page = args.pages / name / "report.html"
        if page.exists():
            result = trainguard.ScreenResult.load(page.parent)
        else:
            result = trainguard.screen(Poisoned(scene), epochs=EPOCHS)
            result.save(page.parent)
        result.report(page)
        print(result)
        photograph(page, f"{name}_top")
        if result.suspect.any():
            photograph(page, f"{name}_in_common", part="in-common", height=520)
    photograph(page, "badnets_samples", part="flagged-samples", height=1100)
    photograph(page, "badnets_phone", part="flagged-samples", width=390, height=800, dark=True)
    photograph(page, "badnets_scores", part="scores", height=700)

    model = scene.fresh_model()
    scene.train(model, np.arange(len(scene.labels)), scene.labels, victim.recipe, lambda count: None)
    photograph(trainguard.audit(model, Poisoned(scene)).report(args.pages / "audit.html"), "audit", height=1400)
    outcome = trainguard.purify(model, Poisoned(scene), initial=result)
    photograph(outcome.report(args.pages / "purification.html"), "purification", height=1100)

    folder = args.pages / "drill"
    run_drill("digits", attacks=("badnets", "blend", "clean"), defenses=("guard", "oracle"), out=folder, epochs=EPOCHS)
    photograph(build(folder, folder / "report.html"), "drill", height=1400)


if __name__ == "__main__":
    main()
