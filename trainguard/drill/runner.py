r"""The drill itself: every attack against every defence, one saved cell after the other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from trainguard.data.reading import shown
from trainguard.data.samples import Key
from trainguard.drill import pictures, tables
from trainguard.drill.cells import Cell, measure
from trainguard.drill.defenses import DEFENSES, RELABEL, defend, relabel
from trainguard.drill.images import Images, load_images
from trainguard.drill.machine import commit, machine, peak_memory, reset_peak_memory, versions
from trainguard.drill.models import build
from trainguard.drill.poison import Attack, plan, plan_test
from trainguard.drill.recipes import RECIPES, Setting, attack
from trainguard.drill.repairs import NEEDED, REPAIRS, repair
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.train import Recipe
from trainguard.errors import ModelError, StateError
from trainguard.files import plain, read_record, results_in, writable_folder, write_atomically
from trainguard.progress import Progress
from trainguard.purification.finetuning import has_batch_norm
from trainguard.rng import isolated_rng
from trainguard.screening.settings import check_length
from trainguard.warning import warn

CLEAN = "clean"


@dataclass(frozen=True)
class Drill:
    r"""The outcome of a fire drill.

    Attributes:
        settings: what was asked for, with the fingerprint of the data.
        cells: one for each attack, defence and seed.
        versions: of Python and the packages.
        machine: what it ran on.
    """

    settings: dict[str, Any]
    cells: tuple[Cell, ...]
    versions: dict[str, str]
    machine: dict[str, str | int]

    def markdown(self) -> str:
        r"""The tables as Markdown: every cell, then a line for each defence."""
        return tables.markdown(self.cells)

    def save(self, folder: Path) -> None:
        r"""Write `drill.json` and `table.md`."""
        with write_atomically(folder / "drill.json") as path:
            path.write_text(json.dumps(asdict(self), indent=1))
        with write_atomically(folder / "table.md") as path:
            path.write_text(self.markdown() + "\n")


def run_drill(
    data: Any,
    *,
    attacks: Sequence[str],
    defenses: Sequence[str],
    out: str | Path,
    model: str = "resnet9",
    epochs: int = 30,
    seeds: Sequence[int] = (0,),
    rows: int | None = None,
    test: Any = None,
    test_rows: int | None = None,
    size: int | None = None,
    rate: float = 0.05,
    target: int = 1,
    source: int = 0,
    cover_rate: float | None = None,
    trigger_file: str | Path | None = None,
    budget: float = 0.5,
    flip: bool | None = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    table: bool = True,
) -> Drill:
    r"""Poison copies of a data set in known ways, train with and without a defence, and measure.

    An interrupted drill, started again with the same settings, goes on after the last finished cell.

    Args:
        data: what `images.load_images` reads, or `images.Images`.
        attacks: names of `recipes.RECIPES`, `"clean"` for the set as it is, or `"all"` for all of these that the data
            and the rate allow.
        defenses: names of `defenses.DEFENSES` (`"all"` for these) and of `repairs.REPAIRS` (`"repairs"` for these).
            `"none"` is always run: without the undefended success rate the defended one says nothing.
            `"guard+relabel"` and `"guard+purify"` need, and so bring, `"guard"`.
        out: folder for one file per cell, `drill.json` and `table.md`.
        model: name for `models.build`.
        epochs: of each training.
        seeds: each is a whole repetition: poison, initial weights and order.
        rows: the first so many training images; None for all.
        test: test set, where `data` has none beside it.
        test_rows: the first so many test images; None for all.
        size: side in pixels that images are scaled to; None for the size of the first one.
        rate: payload as a share of the training set.
        target: label of the payload.
        source: source class of source-specific attacks.
        cover_rate: cover samples as a share of the training set; None for each attack's own.
        trigger_file: a picture to use as trigger by the attacks that have one.
        budget: see `trainguard.Guard`.
        flip: whether training may mirror images; None for yes, but not for digits.
        image_column: column of the images, needed only where there are several.
        label_column: likewise of the labels.
        device: where to train; None for the accelerator if there is one.
        progress: show a bar and the time left.
        table: print the tables at the end.

    Raises:
        ValueError: an unknown name, or a rate that the data cannot give.
        StateError: `out` holds cells of another data set or of other settings.
    """
    for name, listed in (("attacks", attacks), ("defenses", defenses)):
        if isinstance(listed, str):
            raise ValueError(f"expected {name}= as a list of names, got {listed!r}: write {name}=[{listed!r}]")
    check_length(epochs, budget, 0)
    given = (epochs, budget, rate, target, source)
    plainly: Any = (n.item() if isinstance(n, np.generic) else n for n in given)  # numpy's numbers are none to JSON
    epochs, budget, rate, target, source = plainly
    asked = {"test": test, "rows": rows, "test_rows": test_rows, "size": size, "flip": flip}
    asked |= {"image_column": image_column, "label_column": label_column}
    if isinstance(data, Images) and (said := [name for name, value in asked.items() if value is not None]):
        raise ValueError(f"{', '.join(said)} say how data are read, and these are Images already: leave them out")
    images = data if isinstance(data, Images) else load_images(data, **asked)
    place = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    picture = pictures.from_file(trigger_file) if trigger_file else None
    setting = Setting(images.num_classes, rate, target, source, cover_rate, picture, images.flip)
    recipe = Recipe.for_model(model, epochs, flip=images.flip, batch_norm=_try(images, model))
    victim = Victim(model, recipe, place, budget)
    seeds = tuple(dict.fromkeys(plain(list(seeds))))
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"expected seeds from 0, got {min(seeds)}")
    chosen = _attacks(attacks, setting)
    wanted = _defenses(defenses)
    settings = {
        "data": images.fingerprint(),
        "classes": list(images.class_names),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "model": model,
        "recipe": asdict(victim.recipe),
        "budget": budget,
        "rate": rate,
        "target": target,
        "source": source,
        "cover_rate": cover_rate,
        "trigger_file": hashlib.sha256(Path(trigger_file).read_bytes()).hexdigest()[:16] if trigger_file else None,
    }
    scenes = [(name, seed) for name in _possible(images, chosen, seeds, attacks) for seed in seeds]
    folder = writable_folder(out)
    if found := results_in(folder, besides="drill.json"):  # no report can be made of two results
        raise StateError(f"{folder} holds another result ({', '.join(found)}) already: choose another folder")
    _same_settings(folder, settings)
    before = _finished(folder / "cells")
    if older := sorted({cell.commit for cell in before if cell.commit} - {commit()}):
        warn(
            f"cells in {folder} are of another commit ({', '.join(older)}): "
            "what depends on the code, and times, stands beside what is new"
        )
    drill = Drill(settings, (), versions(), machine(place))
    done = {(cell.attack, cell.seed, cell.defense) for cell in before}
    left = sum((*scene, defense) not in done for scene in scenes for defense in wanted)
    with Progress(progress).stage("drill", left * epochs * len(images.train)) as stage:
        for name, seed in scenes:
            cells = _scene_cells(images, chosen[name], victim, seed, wanted, folder / "cells", stage)
            drill = replace(drill, cells=(*drill.cells, *cells))
            others = [cell for cell in before if not any(_is_same(cell, new) for new in drill.cells)]
            replace(drill, cells=(*drill.cells, *others)).save(folder)  # to be read while the rest is running
    if table:
        tables.show(drill.cells)
    return drill


def _usable(device: str | torch.device) -> torch.device:
    """The device, if this machine has it."""
    try:
        place = torch.device(device)
        torch.ones(1, device=place).cpu()
    except Exception as error:  # kinds that this torch was not built for raise many things
        raise ValueError(f"device {str(device)!r} cannot be used here: {shown(error)}") from None
    return place


def _try(images: Images, model: str) -> bool:
    """Build the model and send two images through it, before anything is trained; whether it has BatchNorm."""
    _, channels, height, width = images.train.shape
    with isolated_rng(0):
        try:
            net = build(model, images.num_classes, channels, min(height, width)).eval()
            with torch.no_grad():
                net(images.train[:2].float() / 255)
        except ValueError:  # no such model: its message says so
            raise
        except Exception as error:  # a stranger's model may raise anything
            raise ModelError(f"{model} cannot take images of {height}x{width}: {shown(error)}") from error
    return has_batch_norm(net)


def _finished(folder: Path) -> list[Cell]:
    """The finished cells of earlier runs, by name."""
    found = [Cell.load(place) for place in sorted(folder.glob("*"))]
    return [cell for cell in found if cell is not None]


def _is_same(one: Cell, other: Cell) -> bool:
    return (one.attack, one.defense, one.seed) == (other.attack, other.defense, other.seed)


def _scene_cells(
    images: Images, chosen: Attack, victim: Victim, seed: int, wanted: Sequence[str], folder: Path, stage: Any
) -> list[Cell]:
    whole = victim.recipe.epochs * len(images.train)
    cells: list[Cell] = []
    scene = None  # poisoning may have to fit something first: not for cells that are finished
    for defense in wanted:
        place = folder / f"{chosen.name}-{defense}-seed{seed}"
        cell = Cell.load(place)
        if cell is None:
            done = 0
            scene = scene or Scene.make(images, chosen, victim, seed)
            figures = {"attack": chosen.name, "defense": defense}

            def tick(count: int, figures: dict = figures) -> None:
                nonlocal done
                done += count
                stage.advance(count, **figures)

            stage.advance(0, **figures)
            cell = _run(scene, defense, place, tick)
            stage.advance(whole - done)
        cells.append(cell)
    return cells


def _run(scene: Scene, defense: str, place: Path, tick: Any) -> Cell:
    reset_peak_memory(scene.victim.device)
    if defense.endswith(RELABEL):
        base = place.with_name(place.name.replace(RELABEL, ""))
        before = Cell.load(base)
        assert before is not None  # the plan puts it first
        outcome = relabel(scene, base, (before.screen_seconds, before.train_seconds), tick)
    elif defense in REPAIRS:
        names = {name: place.with_name(place.name.replace(defense, name)) for name in ("none", "guard")}
        outcome = repair(scene, defense, names)
    else:
        outcome = defend(scene, defense, place, tick)
    cell = measure(scene, defense, outcome, peak_memory(scene.victim.device))
    outcome.save(place)
    cell.save(place)
    shutil.rmtree(place / "state", ignore_errors=True)
    return cell


def _attacks(names: Sequence[str], setting: Setting) -> dict[str, Attack]:
    every = (*RECIPES, CLEAN) if "all" in names else ()
    listed = dict.fromkeys((*every, *(name for name in names if name != "all")))
    made = {}
    for name in listed:
        try:
            made[name] = Attack(CLEAN) if name == CLEAN else attack(name, setting)
        except ValueError as error:  # such as one that needs a source beside the target
            if name in names:
                raise
            warn(f"{name} is left out: {error}")
    return made


def _possible(images: Images, chosen: dict[str, Attack], seeds: Sequence[int], named: Sequence[str]) -> Iterator[str]:
    """The attacks that the data can give, found out before hours have gone by; what was asked for by name must be."""
    for name, each in chosen.items():
        try:
            for seed in seeds:
                plan(images.train_labels.numpy(), each, seed)
                if each.test:
                    plan_test(images.test_labels.numpy(), each, seed)
        except ValueError as error:
            if name in named:
                raise
            warn(f"{name} is left out: {error}")
        else:
            yield name


def _defenses(names: Sequence[str]) -> tuple[str, ...]:
    known = (*DEFENSES, *REPAIRS)
    unknown = sorted(set(names) - {*known, "all", "repairs"})
    if unknown:
        raise ValueError(f"no defence {', '.join(unknown)}: choose from {', '.join(known)}")
    needed = set(names) | {"none"}
    needed |= set(DEFENSES) if "all" in names else set()
    needed |= set(REPAIRS) if "repairs" in names else set()
    needed |= {NEEDED.get(name, name.removesuffix(RELABEL)) for name in needed}
    return tuple(name for name in known if name in needed)


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if any(folder.glob("cells/*/cell.json")):
        if not path.is_file():
            raise StateError(f"{folder} holds cells without the settings.json that says of what: remove it")
        before = read_record(path, StateError)
        different = [key for key in settings if key in before and before[key] != settings[key]]
        if different:
            told = ", ".join(_difference(key, before[key], settings[key]) for key in different)
            raise StateError(f"{folder} holds a drill of other settings ({told}): choose another folder or remove it")
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs between two values of a setting, in words; of several values in it the first that does."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next((key for key in before | now if before.get(key) != now.get(key)), None)
        if key is not None:
            return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        place = next(place for place, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
        return _difference(f"{name}[{place}]", before[place], now[place])
    return f"{name} {shorten(str(before), 60)} against {shorten(str(now), 60)}"
