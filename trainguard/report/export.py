"""The decision on every sample as a table for other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from trainguard.files import write_atomically
from trainguard.results import ScreenResult

COLUMNS = ("index", "label", "proposed", "score", "flagged", "keep")


def write_decisions(result: ScreenResult, page: Path) -> tuple[str, str]:
    """Write one row per sample as CSV and as parquet: index, label, proposed label, score, flagged, keep.

    Args:
        result: the screening.
        page: the report they lie next to: `keep.csv` beside `report.html`, `X.keep.csv` beside `X.html`.

    Returns:
        The names of the two files.

    Raises:
        ValueError: there is another list of one of these names.
    """
    stem = "keep" if page.stem == "report" else f"{page.stem}.keep"
    for listed in (page.with_name(f"{stem}.csv"), page.with_name(f"{stem}.parquet")):
        if listed.is_file() and not _is_of_a_screening(listed):
            raise ValueError(f"{listed} is there already and is not of a screening: move it, or name another page")
    keep = np.zeros(len(result.score), dtype=bool)
    keep[result.keep] = True
    index = np.arange(len(keep))
    columns = (index, result.labels, result.proposed, result.score, result.suspect, keep)
    table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
    for suffix, write in ((".csv", csv.write_csv), (".parquet", parquet.write_table)):
        # Opened here, as pyarrow takes no names that are not UTF-8.
        with write_atomically(page.with_name(stem + suffix)) as temporary, temporary.open("wb") as file:
            write(table, file)
    return f"{stem}.csv", f"{stem}.parquet"


def _is_of_a_screening(listed: Path) -> bool:
    """Whether a list that is there has the columns of those that are written here."""
    with listed.open("rb") as file:
        if listed.suffix == ".csv":
            header = ",".join(f'"{name}"' for name in COLUMNS).encode()
            return file.read(len(header)) == header
        try:
            return tuple(parquet.read_schema(file).names) == COLUMNS
        except (pa.ArrowException, OSError):  # no parquet file at all
            return False
