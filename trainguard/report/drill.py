"""What the page of a fire drill says; made from its record, `drill.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from trainguard.report import charts
from trainguard.report.parts import NOT_IMPLANTED, Matrix, Table, flattened, implanted

FIGURES = {
    "attack": "attack",
    "defense": "defence",
    "seed": "seed",
    "acc": "ACC",
    "asr": "ASR",
    "tpr": "TPR",
    "fpr": "FPR",
    "auroc": "AUROC",
    "verdict": "verdict",
    "flagged": "flagged",
    "screen_seconds": "screening s",
    "train_seconds": "training s",
    "peak_mb": "peak MiB",
    "commit": "commit",
}


def context(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template `drill.html.j2` shows.

    Args:
        record: settings, cells, versions and machine, as the drill saves them.
    """
    cells = record["cells"]
    attacks, defenses = _names(cells, "attack"), _names(cells, "defense")
    attacking = [a for a in attacks if any(c["payload"] for c in cells if c["attack"] == a)]
    unsuccessful = [a for a in attacking if not _implanted(cells, a)]
    counted = [a for a in attacking if a not in unsuccessful]
    settings = record["settings"]
    images = f"{settings['train_images']:,} images" if "train_images" in settings else "the data"
    return {
        "title": "Fire drill",
        "verdict": "done",
        "headline": f"{_count(len(attacking), 'attack')} against {_count(len(set(defenses) - {'none'}), 'defence')}",
        "sentence": f"Poisoned copies of {images} were trained on, with and without a defence.",
        "facts": _facts(cells, counted, defenses),
        "success": _matrix(cells, "asr", "Attack success rate: lower is better", attacking, defenses, unsuccessful),
        "accuracy": _matrix(cells, "acc", "Accuracy on clean test images: higher is better", attacks, defenses),
        "found": _matrix(cells, "tpr", "Share of the poison that was flagged", attacking, defenses, unsuccessful),
        "lost": _matrix(cells, "fpr", "Share of clean samples that were flagged", attacks, defenses),
        "unsuccessful": unsuccessful,
        "trade": _trade(cells, counted),
        "cost": _cost(cells, counted, defenses),
        "cells": Table(
            "cells",
            "Every cell",
            tuple(FIGURES.values()),
            [tuple(cell.get(name) for name in FIGURES) for cell in cells],
        ),
        "settings": list(flattened({**settings, "versions": record["versions"], "machine": record["machine"]})),
        "fingerprint": settings.get("data", ""),
    }


def _names(cells: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(cell[key] for cell in cells))


def _mean(cells: Sequence[Mapping[str, Any]], key: str, **where: str) -> float:
    """Mean over the cells where attack and defence are as given; NaN where nothing was measured."""
    values = [c[key] for c in cells if all(c[name] == value for name, value in where.items()) and c[key] is not None]
    return fmean(values) if values else float("nan")


def _implanted(cells: Sequence[Mapping[str, Any]], attack: str) -> bool:
    undefended = [cell for cell in cells if cell["attack"] == attack and cell["defense"] == "none"]
    measured = ([c[key] for c in undefended if c.get(key) is not None] for key in ("asr", "untriggered"))
    return implanted(*(fmean(values) if values else None for values in measured))


def _facts(
    cells: Sequence[Mapping[str, Any]], counted: Sequence[str], defenses: Sequence[str]
) -> list[tuple[str, str]]:
    """Mean success rate of each defence over the attacks that implanted, and of how many of them, where not of all."""
    facts = []
    for defense in defenses:
        mine = [cell for cell in cells if cell["attack"] in counted and cell["defense"] == defense]
        measured = _names([cell for cell in mine if cell["asr"] is not None], "attack")
        if measured:
            part = "" if len(measured) == len(counted) else f" ({_of(measured, counted)} attacks)"
            facts.append((f"ASR, {defense}", f"{_mean(mine, 'asr'):.1%}{part}"))
    return facts


def _of(some: Sequence[str], of: Sequence[str]) -> str:
    return str(len(of)) if len(some) == len(of) else f"{len(some)} of {len(of)}"


def _matrix(
    cells: Sequence[Mapping[str, Any]],
    key: str,
    caption: str,
    attacks: Sequence[str],
    defenses: Sequence[str],
    noted: Sequence[str] = (),
) -> Matrix | None:
    values = [[_mean(cells, key, attack=a, defense=d) for d in defenses] for a in attacks]
    shown = [j for j in range(len(defenses)) if any(row[j] == row[j] for row in values)]
    if not shown:
        return None
    notes = {
        (i, place): f"{NOT_IMPLANTED} ({values[i][j]:.0%})"
        for i, attack in enumerate(attacks)
        for place, j in enumerate(shown)
        if attack in noted and values[i][j] == values[i][j]
    }
    columns, numbers = [defenses[j] for j in shown], [[row[j] for j in shown] for row in values]
    return Matrix(key, caption, attacks, columns, numbers, notes, good=key in ("acc", "tpr"))


def _trade(cells: Sequence[Mapping[str, Any]], counted: Sequence[str]) -> Markup | None:
    points = [(c["defense"], c["asr"], c["acc"]) for c in cells if c["attack"] in counted and c["asr"] is not None]
    if not points:
        return None
    title = "Each point is one training: the top left is best"
    return charts.trade(points, xlabel="attack success rate", ylabel="accuracy", title=title)


def _cost(cells: Sequence[Mapping[str, Any]], counted: Sequence[str], defenses: Sequence[str]) -> Table:
    """Means of each defence over the attacks that implanted; over all, where none did."""
    mine = [cell for cell in cells if cell["attack"] in counted] or cells
    attacks = _names(mine, "attack")
    plain = {(c["attack"], c["seed"]): _seconds(c) for c in mine if c["defense"] == "none"}
    rows = []
    for defense in defenses:
        of = [c for c in mine if c["defense"] == defense]
        times = [_seconds(c) / whole for c in of if (whole := plain.get((c["attack"], c["seed"])))]
        means = [_mean(of, key) for key in ("screen_seconds", "train_seconds", "peak_mb")]
        share = _of(_names(of, "attack"), attacks)
        rows.append((defense, share, *means[:2], fmean(times) if times else float("nan"), means[2]))
    columns = ("defence", "attacks", "screening s", "training s", "x unguarded", "peak MiB")
    return Table("cost-table", "Means over attacks", columns, rows)


def _seconds(cell: Mapping[str, Any]) -> float:
    return cell["screen_seconds"] + cell["train_seconds"]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
