r"""Two published training-time defences beside trainguard: the same poisoned data, model, initial weights and machine.

    git clone https://github.com/bboylyg/ABL runs/abl
    git clone https://github.com/SCLBD/Effective_backdoor_defense runs/dbr
    python docs/results/peers.py --data $TRAINGUARD_DATA/cifar10 --abl runs/abl --dbr runs/dbr --out runs/peers

ABL (Li et al. 2021) and D-BR (Chen et al. 2022) run by their authors' own step functions, imported from their
checkouts, with the settings that their code ships with; the loops around them, data, measuring, precision and memory
format are ours. trainguard and the undefended training come from the drill in the same run. D-BR's script keeps the
epoch that does best on the test set's truth; here it is the last one. Writes `peers.json` to `--out`.
"""

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from trainguard.drill import run_drill
from trainguard.drill.cells import measure
from trainguard.drill.defenses import Outcome
from trainguard.drill.images import load_images
from trainguard.drill.machine import machine, versions
from trainguard.drill.poison import Role
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.train import Recipe
from trainguard.files import write_atomically
from trainguard.training import autocast

BATCH = 128
ABL = {"isolation epochs": 10, "fine-tuning epochs": 60, "unlearning epochs": 5, "isolated": 0.01, "lr": 0.1}
DBR = {"plain epochs": 2, "feature epochs": 10, "unlearning epochs": 20, "clean": 0.2, "poisoned": 0.05, "lr": 0.01}


class Views(Dataset):
    """Images, each through a transform of its picture, and their labels; more values after them as the peer expects."""

    def __init__(self, scene, rows, view, *more):
        self.images, self.labels, self.rows, self.view, self.more = scene.images, scene.labels, rows, view, more

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = int(self.rows[i])
        return self.view(to_pil_image(self.images[row])), int(self.labels[row]), *self.more


def imported(folder, *names):
    """Modules of a checkout. The two peers' packages share their names, so what one brought is forgotten again."""
    before, argv, path, popen = set(sys.modules), sys.argv, list(sys.path), os.popen
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # for attacks that are not used
    os.popen = lambda *_: io.StringIO("24 80")  # the width of a terminal
    with tempfile.TemporaryDirectory() as empty:
        sys.argv, sys.path = [argv[0], "--device", "cpu", "--data_root", f"{empty}/"], [str(folder), *path]
        try:
            return [importlib.import_module(name) for name in names]
        finally:
            sys.argv, sys.path, os.popen = argv, path, popen
            for name in set(sys.modules) - before:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]


def abl(scene, folder):
    """backdoor_isolation.py and backdoor_unlearning.py: the model, and the isolated samples."""
    isolation, unlearning, data = imported(folder, "backdoor_isolation", "backdoor_unlearning", "data_loader")
    for module in (isolation, unlearning):  # theirs, for the terminal only, fails on a current torch
        module.accuracy = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
    options = types.SimpleNamespace(
        cuda=0,
        gradient_ascent_type="Flooding",
        flooding=0.5,
        print_freq=10**9,
        lr_finetuning_init=0.1,
        unlearning_epochs=ABL["unlearning epochs"],
    )
    crops = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            data.Cutout(1, 3),
        ]
    )
    plain = transforms.ToTensor()
    everything = np.arange(len(scene.labels))
    model, criterion = scene.fresh_model().to(memory_format=torch.channels_last), nn.CrossEntropyLoss()
    rule = {"lr": ABL["lr"], "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), **rule)
    for epoch in range(ABL["isolation epochs"]):
        loader = DataLoader(Views(scene, everything, plain), BATCH, shuffle=True)
        isolation.train_step(options, loader, model, optimizer, criterion, epoch + 1)
    order = isolation.compute_loss_value(options, Views(scene, everything, plain), model)
    isolated = order[: int(len(order) * ABL["isolated"])]
    optimizer = torch.optim.SGD(model.parameters(), **rule)
    rest = np.setdiff1d(everything, isolated)
    for epoch in range(ABL["fine-tuning epochs"]):
        unlearning.learning_rate_finetuning(optimizer, epoch, options)
        loader = DataLoader(Views(scene, rest, crops), BATCH, shuffle=True)
        unlearning.train_step_finetuing(options, loader, model, optimizer, criterion, epoch + 1)
    for epoch in range(1, ABL["unlearning epochs"]):  # the first of five only measures
        unlearning.learning_rate_unlearning(optimizer, epoch, options)
        loader = DataLoader(Views(scene, isolated, plain), BATCH, shuffle=True)
        unlearning.train_step_unlearning(options, loader, model, optimizer, criterion, epoch + 1)
    return model, isolated


def dbr(scene, folder, infected):
    """Steps 1 to 5 and unlearn_relearn.py: the model, and the samples that were unlearned."""
    plain, features, consistency, mending = imported(
        folder, "train_attack_noTrans", "finetune_attack_noTrans", "calculate_consistency", "unlearn_relearn"
    )
    for module in (plain, features, consistency, mending):
        module.normalization, module.progress_bar = lambda _, images: images, lambda *_: None
    torch.Tensor.cuda = lambda self: self
    mending.arg = None
    whole = transforms.ToTensor()
    moved = transforms.Compose(
        [transforms.RandomRotation(180), transforms.RandomAffine(degrees=0, translate=(0.2, 0.2)), whole]
    )
    crops = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), whole])
    everything, truth = np.arange(len(scene.labels)), (0, True)  # their figures on the way, which nobody reads
    fresh = scene.fresh_model()
    parts = nn.Sequential(nn.Sequential(Standard(fresh), fresh.net.body), fresh.net.head)
    model = nn.DataParallel(parts.to(memory_format=torch.channels_last))
    criterion = nn.CrossEntropyLoss()
    for module, epochs in ((plain, DBR["plain epochs"]), (features, DBR["feature epochs"])):
        options = types.SimpleNamespace(device="cpu", num_classes=scene.data.num_classes, target_label=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=DBR["lr"], momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        for epoch in range(epochs):
            loader = DataLoader(Views(scene, everything, lambda p: (whole(p),), *truth), BATCH, shuffle=True)
            module.train_epoch(options, loader, model, optimizer, schedule, criterion, epoch)
    exact = torch.autocast("cpu", enabled=False)
    with tempfile.TemporaryDirectory() as written, torch.no_grad(), exact:
        options = types.SimpleNamespace(device="cpu", checkpoint_load=f"{written}/model.tar")
        loader = DataLoader(Views(scene, everything, lambda p: (whole(p), 0, moved(p)), *truth), BATCH)
        consistency.calculate_consistency(options, loader, model)
        change = np.loadtxt(f"{written}/model_all.txt")
    ranked, size = np.sort(change), len(change)
    clean = np.flatnonzero(change <= ranked[int(size * DBR["clean"])])
    poisoned = np.flatnonzero(change >= ranked[size - int(size * DBR["poisoned"])])
    optimizer = torch.optim.SGD(infected.parameters(), lr=DBR["lr"], momentum=0.9, weight_decay=5e-4)
    for epoch in range(DBR["unlearning epochs"]):
        mending.learning_rate_unlearning(optimizer, epoch, None)
        for step, rows in ((mending.train_step_unlearning, poisoned), (mending.train_step_relearning, clean)):
            step(
                None,
                DataLoader(Views(scene, rows, crops, 0), BATCH, shuffle=True),
                infected,
                optimizer,
                criterion,
                epoch,
            )
    return infected, poisoned


class Standard(nn.Module):
    """The drill's standardisation as a layer."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)

    def forward(self, images):
        """Unit pixels to standardised ones."""
        return (images - self.mean) / self.std


def row(scene, name, model, chosen, seconds):
    """What a peer came to."""
    flagged = np.zeros(len(scene.labels), dtype=bool)
    flagged[chosen] = True
    cell = measure(scene, name, Outcome(model, flagged, None, 0.0, seconds), 0)
    payload, untouched = scene.role == Role.PAYLOAD, scene.role == Role.CLEAN
    figures = {"tpr": float(flagged[payload].mean()), "fpr": float(flagged[untouched].mean())}
    return {k: getattr(cell, k) for k in ("attack", "defense", "acc", "asr")} | figures | {"seconds": cell.seconds}


def main():
    """Drill, then the peers, attack by attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--abl", type=Path, required=True)
    parser.add_argument("--dbr", type=Path, required=True)
    parser.add_argument("--attacks", default="badnets,blend,tact")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = load_images(args.data, rows=args.rows, test_rows=args.test_rows)
    victim = Victim("resnet9", Recipe.for_model("resnet9", args.epochs, flip=data.flip), torch.device("cpu"))
    record = {"settings": {"rows": args.rows, "epochs": args.epochs, "seed": 0, "abl": ABL, "dbr": DBR}}
    record |= {"commits": {name: commit(folder) for name, folder in (("abl", args.abl), ("dbr", args.dbr))}}
    record |= {"versions": versions(), "machine": machine("cpu"), "rows": []}
    for name in args.attacks.split(","):
        cells = run_drill(
            data,
            attacks=[name],
            defenses=["none", "oracle", "guard", "guard+relabel"],
            out=args.out,
            epochs=args.epochs,
            progress=False,
            table=False,
        ).cells
        for cell in cells:
            kept = ("attack", "defense", "acc", "asr", "tpr", "fpr", "seconds")
            record["rows"].append({k: getattr(cell, k) for k in kept})
        scene = Scene.make(data, attack(name, Setting(data.num_classes)), victim, 0)
        infected = scene.fresh_model().to(memory_format=torch.channels_last)
        saved = args.out / "cells" / f"{name}-none-seed0"
        infected.load_state_dict(safetensors.torch.load_file(saved / "model.safetensors"))
        undefended = cells[0].seconds
        for peer in ("ABL", "D-BR"):
            torch.manual_seed(0)
            start = time.perf_counter()
            with autocast("cpu"):
                model, chosen = abl(scene, args.abl) if peer == "ABL" else dbr(scene, args.dbr, infected)
            seconds = time.perf_counter() - start + (undefended if peer == "D-BR" else 0)  # it mends a trained model
            record["rows"].append(row(scene, peer, model, chosen, seconds))
            print(record["rows"][-1], flush=True)
        with write_atomically(args.out / "peers.json") as path:
            path.write_text(json.dumps(record, indent=1))
    print(table(record["rows"]))


def commit(folder):
    """Of a checkout."""
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def table(rows):
    """Markdown."""
    lines = ["| attack | defence | ACC | ASR | TPR | FPR | wall s |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        shares = ["" if r[k] is None else f"{100 * r[k]:.1f}" for k in ("acc", "asr", "tpr", "fpr")]
        lines.append(f"| {r['attack']} | {r['defense']} | {' | '.join(shares)} | {r['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
