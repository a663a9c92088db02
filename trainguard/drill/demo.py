r"""Backdoor and guard in a minute: scikit-learn's handwritten digits, poisoned, trained on unguarded and guarded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from trainguard.drill.cells import Cell
from trainguard.drill.images import load_images
from trainguard.drill.poison import Role, poison_arrays
from trainguard.drill.recipes import Setting, attack
from trainguard.drill.runner import Drill, run_drill
from trainguard.errors import StateError
from trainguard.files import results_in, writable_folder, write_atomically
from trainguard.results import ScreenResult

ATTACK, MODEL, RATE, TARGET = "badnets", "resnet9", 0.08, 1
EPOCHS = 20
SHOWN = 24  # flagged samples in the picture
NAMES = {
    "none": "unguarded",
    "guard": "guarded",
    "guard+relabel": "guarded, relabelled",
    "guard+purify": "unguarded, then purified",
}


def run_demo(*, out: str | Path | None = None, seed: int = 0, epochs: int = EPOCHS, progress: bool = True) -> Drill:
    r"""Poison the digits with a white patch, train without and with the guard, purify, print what came of it.

    Args:
        out: folder for the figures and for a picture of flagged samples; None for `trainguard-demo`.
        seed: of everything random.
        epochs: of each training.
        progress: show a bar.

    Returns:
        The drill of one attack that this is.

    Raises:
        StateError: `out` holds another result.
    """
    folder = writable_folder(out or "trainguard-demo")
    if (folder / "cells").exists() or results_in(folder, besides="drill.json"):
        raise StateError(f"{folder} holds another result, which would be overwritten: choose another folder")
    data = load_images("digits")
    with tempfile.TemporaryDirectory() as scratch:  # a demo starts afresh every time
        drill = run_drill(
            data,
            attacks=[ATTACK],
            defenses=["guard+relabel", "guard+purify"],
            out=scratch,
            model=MODEL,
            epochs=epochs,
            seeds=[seed],
            rate=RATE,
            target=TARGET,
            progress=progress,
            table=False,
        )
        result = ScreenResult.load(Path(scratch) / "cells" / f"{ATTACK}-guard-seed{seed}" / "result")
    poison = attack(ATTACK, Setting(data.num_classes, RATE, TARGET))
    images, _, role = poison_arrays(data.train, data.train_labels, poison, seed)
    drill.save(folder)
    picture = draw_flagged(images, role.numpy(), result, folder / "flagged.png")
    show(drill.cells, len(data.train), picture)
    return drill


def show(cells: tuple[Cell, ...], images: int, picture: Path) -> None:
    r"""The outcome on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("training", "accuracy", "attack succeeds", "flagged", "poison", "missed", "seconds"):
        first = column == "training"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for cell in cells:
        caught = round((cell.tpr or 0.0) * cell.payload)
        found = (str(cell.flagged), str(caught), str(cell.payload - caught)) if cell.verdict else ("", "", "")
        share = "" if cell.asr is None else f"{cell.asr:.1%}"
        table.add_row(NAMES[cell.defense], f"{cell.acc:.1%}", share, *found, f"{cell.seconds:.1f}")
    guarded = next(cell for cell in cells if cell.defense == "guard")
    named = ", ".join(map(str, guarded.target_classes)) or "none"
    console = Console()
    console.print(
        f"{guarded.payload} of {images} training images carry a small white patch and the label {TARGET}. "
        f"The verdict on the set: {guarded.verdict}, target class {named}."
    )
    console.print(table)
    console.print(f"Pictures of flagged samples: {picture}")


def draw_flagged(images: Tensor, role: np.ndarray, result: ScreenResult, path: Path) -> Path:
    r"""The most suspicious flagged samples: given label, proposed label, and by the frame whether it was poison.

    Args:
        images: (N, C, H, W) uint8, what was screened.
        role: (N,) the truth, see `poison.Role`.
        result: of the screening.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    flagged = np.flatnonzero(result.suspect)
    flagged = flagged[np.argsort(-result.score[flagged], kind="stable")][:SHOWN]
    columns = 8
    rows = max(1, -(-len(flagged) // columns))
    figure = Figure(figsize=(columns * 1.2, rows * 1.5 + 0.5), layout="constrained")
    figure.suptitle(
        "Flagged: given label \N{RIGHTWARDS ARROW} proposed label. Red: poison, blue: wrongly flagged.", fontsize=10
    )
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set(xticks=[], yticks=[])
        if place >= len(flagged):
            axes.set_axis_off()
            continue
        i = int(flagged[place])
        axes.imshow(images[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{result.labels[i]} \N{RIGHTWARDS ARROW} {result.proposed[i]}", fontsize=10)
        colour = "tab:red" if role[i] == Role.PAYLOAD else "tab:blue"
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path
