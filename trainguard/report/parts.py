"""The parts that every page is put together from: facts, tables, matrices, and numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainguard.files import visible

IMPLANTED = 0.5  # an attack that succeeds less often without a defence says nothing about one
ABOVE = 0.25  # of its samples, that the trigger must take beyond those that get its label without it
LEAST_REST = 0.01  # of the time, that gets a row where no stage has it
NOT_IMPLANTED = "did not implant"


@dataclass(frozen=True)
class Share:
    """A number in [0, 1] that a table draws as a bar beside its percentage."""

    value: float


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort by any column and, where it is long, filter.

    Attributes:
        name: unique on its page, used for ids.
        caption: what the rows are.
        columns: their headings; the first heads the rows.
        rows: values as they are: numbers sort as numbers, whatever they look like.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def long(self) -> bool:
        """Whether a filter is worth its place."""
        return len(self.rows) > 12


@dataclass(frozen=True)
class Matrix:
    """Numbers in [0, 1] by row and column, drawn as a heat map that can be read and copied as text; NaN is empty.

    Attributes:
        name: unique on its page.
        caption: what a cell says.
        rows: their names.
        columns: their names.
        values: the numbers, a list per row.
        notes: by (row, column) position, words that stand instead of the number.
        good: whether high numbers are good news; decides the colour.
    """

    name: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    notes: Mapping[tuple[int, int], str] = field(default_factory=dict)
    good: bool = False


def shown(value: Any) -> str:
    """A value as a person reads it: `1,204`, `0.0312`, `4.9%`, `yes`."""
    if isinstance(value, Share):
        return f"{value.value:.1%}" if math.isfinite(value.value) else "\N{EN DASH}"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "\N{EN DASH}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def sort_key(value: Any) -> str:
    """What a table sorts a cell by: a number as text, or nothing for words."""
    number = value.value if isinstance(value, Share) else value
    if not isinstance(number, int | float | np.number | np.bool_):
        return ""
    return repr(float(number)) if math.isfinite(float(number)) else "-Infinity"


def flattened(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows: `versions.torch`, `2.15`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            text = shown(value) if isinstance(value, list | tuple) or value is None else str(value)
            yield f"{prefix}{name}", visible(text)


def costs(timing: Mapping[str, Any], name: str = "seconds") -> Table:
    """Wall seconds by stage, with each stage's share of the whole."""
    seconds = {stage: value for stage, value in timing.items() if isinstance(value, int | float)}
    total = seconds.pop("total", sum(seconds.values()))
    if seconds and (rest := total - sum(seconds.values())) > LEAST_REST * total:
        seconds["everything else"] = rest
    rows = [(stage, value, Share(value / total if total else 0.0)) for stage, value in seconds.items()]
    return Table(name, "Wall time by stage", ("stage", "seconds", "share"), [*rows, ("total", total, Share(1.0))])


def number(value: object) -> float:
    """A figure of a record, to be drawn; NaN for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def percentage(value: float) -> str:
    """A share in a matrix: `63.2%`; nothing where there is no number."""
    return f"{value:.1%}" if math.isfinite(value) else ""


def percent(part: float, whole: float) -> str:
    """A share as text, fine enough for a small one: `4.9%`, `0.02%`; `>99.9%` where it is not the whole."""
    share = 100 * part / whole if whole else 0.0
    if 99.95 <= share < 100:
        return ">99.9%"
    if share >= 0.995 or share == 0:
        return f"{share:.1f}%"
    return f"{float(f'{share:.2g}'):.12f}".rstrip("0") + "%"


def implanted(success: float | None, base: float | None) -> bool:
    """Whether an attack left a backdoor in an undefended model: on at least half of the triggered samples.

    And on a quarter more of them than get its label without the trigger: a model that has one answer for all images
    has no backdoor.

    Args:
        success: the attack success rate, in [0, 1]; None where it was not measured, which speaks against nothing.
        base: the share of the samples that get the label without the trigger; None where it was not measured.
    """
    return success is None or success >= max(IMPLANTED, (base or 0.0) + ABOVE)
