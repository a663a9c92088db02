r"""The drill's figures as tables, in Markdown and on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trainguard.drill.cells import Cell
from trainguard.report.parts import IMPLANTED, NOT_IMPLANTED
from trainguard.report.parts import implanted as was_implanted

CELL_COLUMNS = (
    "attack",
    "defence",
    "ACC",
    "ASR",
    "TPR",
    "FPR",
    "AUROC",
    "verdict",
    "targets right",
    "flagged",
    "screening s",
    "training s",
    "cost",
    "peak MiB",
)
SHOWN_COLUMNS = ("attack", "defence", "ACC", "ASR", "TPR", "FPR", "verdict", "cost")
SHOWN_SUMMARY = ("defence", "attacks", "ASR mean", "ASR worst", "ACC mean", "TPR", "FPR", "cost")
SUMMARY_COLUMNS = (
    "defence",
    "attacks",
    "ASR mean",
    "ASR worst",
    "ACC mean",
    "ACC below oracle",
    "TPR",
    "FPR",
    "verdict right",
    "targets right",
    "cost",
)


def cell_rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    r"""One row for each attack and defence, means over the seeds, in `CELL_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for attack, defense in dict.fromkeys((c.attack, c.defense) for c in cells):
        group = _of(cells, attack, defense)
        asr = _percent(c.asr for c in group)
        if not implanted(cells, attack):
            asr = f"{NOT_IMPLANTED} ({asr})"
        rows.append(
            (
                attack,
                defense,
                _percent(c.acc for c in group),
                asr,
                _percent((c.tpr for c in group), 1),
                _percent((c.fpr for c in group), 2),
                _number((c.auroc for c in group), ".3f"),
                ", ".join(f"{name} {count}" if count < len(group) else name for name, count in _verdicts(group)),
                _right(group, targets_right),
                _number((c.flagged for c in group), ".0f"),
                _number((c.screen_seconds for c in group), ".1f"),
                _number((c.train_seconds for c in group), ".1f"),
                _number((ratio(cells, c) for c in group), ".2f"),
                _number((c.peak_mb for c in group), ".0f"),
            )
        )
    return rows


def summary_rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    r"""One row for each defence over the attacks that implanted, in `SUMMARY_COLUMNS`; the clean set is left out."""
    rows: list[tuple[str, ...]] = []
    names = [name for name in dict.fromkeys(c.attack for c in cells) if any(c.payload for c in _of(cells, name))]
    counted = [name for name in names if implanted(cells, name)]
    for defense in dict.fromkeys(c.defense for c in cells):
        group = [c for c in cells if c.defense == defense and c.attack in counted]
        if not group:
            continue
        present = len({c.attack for c in group})
        gaps = [_mean(o.acc for o in _of(cells, c.attack, "oracle", c.seed)) for c in group]
        rows.append(
            (
                defense,
                str(present) if present == len(names) else f"{present} of {len(names)}",
                _percent(c.asr for c in group),
                _percent([max(c.asr or 0.0 for c in group)]),
                _percent(c.acc for c in group),
                _percent(gap - c.acc for gap, c in zip(gaps, group, strict=True) if gap is not None),
                _percent((c.tpr for c in group), 1),
                _percent((c.fpr for c in group), 2),
                _right(group, lambda c: c.verdict in ("poisoned", "backdoored")),
                _right(group, targets_right),
                _number((ratio(cells, c) for c in group), ".2f"),
            )
        )
    return rows


def implanted(cells: Sequence[Cell], attack: str) -> bool:
    r"""Whether the attack leaves a backdoor when nothing is done; True where nothing attacks."""
    undefended = _of(cells, attack, "none")
    return was_implanted(_mean(c.asr for c in undefended), _mean(c.untriggered for c in undefended))


def ratio(cells: Sequence[Cell], cell: Cell) -> float | None:
    r"""Wall time over that of the undefended training of the same attack and seed."""
    plain = _mean(c.seconds for c in _of(cells, cell.attack, "none", cell.seed))
    return cell.seconds / plain if plain else None


def targets_right(cell: Cell) -> bool:
    r"""Whether screening named every label of the payload, and for a clean set none."""
    return set(cell.true_targets) <= set(cell.target_classes) if cell.true_targets else not cell.target_classes


def markdown(cells: Sequence[Cell]) -> str:
    r"""Both tables."""
    note = (
        "Shares in percent, means over seeds. Cost: wall time over that of the undefended training; what mending or "
        "auditing a finished model takes stands under screening. "
        f"'{NOT_IMPLANTED}': without a defence the attack succeeds on less than {IMPLANTED:.0%} of the samples, "
        "or hardly more often than without the trigger, so it says nothing about one, and the summary leaves it out."
    )
    parts = [_table(CELL_COLUMNS, cell_rows(cells)), note]
    summary = summary_rows(cells)
    return "\n\n".join([*parts, _table(SUMMARY_COLUMNS, summary)] if summary else parts)


def show(cells: Sequence[Cell]) -> None:
    r"""Both tables on the terminal, with the columns that 80 characters hold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, columns, shown, rows in (
        ("Fire drill", CELL_COLUMNS, SHOWN_COLUMNS, cell_rows(cells)),
        ("Over the attacks that implanted", SUMMARY_COLUMNS, SHOWN_SUMMARY, summary_rows(cells)),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        for column in shown:
            name = column in ("attack", "defence")
            widest = len("implant") if column == "ASR" else None  # "did not implant" breaks between its words
            table.add_column(column, justify="left" if name else "right", no_wrap=name, min_width=widest)
        for row in rows:
            table.add_row(*(value for column, value in zip(columns, row, strict=True) if column in shown))
        console.print(table)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _of(cells: Sequence[Cell], attack: str, defense: str | None = None, seed: int | None = None) -> list[Cell]:
    return [c for c in cells if c.attack == attack and defense in (None, c.defense) and seed in (None, c.seed)]


def _verdicts(cells: Sequence[Cell]) -> list[tuple[str, int]]:
    return Counter(c.verdict for c in cells if c.verdict).most_common()


def _right(cells: Sequence[Cell], test: Callable[[Cell], bool]) -> str:
    judged = [c for c in cells if c.verdict]
    return f"{sum(map(test, judged))}/{len(judged)}" if judged else ""


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _percent(values: Iterable[float | None], digits: int = 2) -> str:
    """A mean in percent; cut, not rounded, where it would pass for all of it."""
    mean = _mean(values)
    if mean is None:
        return ""
    text = f"{100 * mean:.{digits}f}"
    return text if mean >= 1 or float(text) < 100 else f"{100 - 10**-digits:.{digits}f}"


def _number(values: Iterable[float | None], form: str) -> str:
    mean = _mean(values)
    return "" if mean is None else format(mean, form)
