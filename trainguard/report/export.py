"""The decision on every sample as a table for other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from trainguard.files import write_atomically
from trainguard.results import ScreenResult

HEADER = b'"index","label","proposed","score","flagged","keep"'


def write_decisions(result: ScreenResult, page: Path) -> tuple[str, str]:
    """Write one row per sample as CSV and as parquet: index, label, proposed label, score, flagged, keep.

    Args:
        result: the screening.
        page: the report they lie next to: `keep.csv` beside `report.html`, `X.keep.csv` beside `X.html`.

    Returns:
        The names of the two files.

    Raises:
        ValueError: there is another list of that name.
    """
    stem = "keep" if page.stem == "report" else f"{page.stem}.keep"
    listed = page.with_name(f"{stem}.csv")
    if listed.is_file() and not listed.read_bytes()[: len(HEADER)].startswith(HEADER):
        raise ValueError(f"{listed} is there already and is not of a screening: move it, or name another page")
    keep = np.zeros(len(result.score), dtype=bool)
    keep[result.keep] = True
    table = pa.table(
        {
            "index": np.arange(len(keep)),
            "label": result.labels,
            "proposed": result.proposed,
            "score": result.score,
            "flagged": result.suspect,
            "keep": keep,
        }
    )
    for suffix, write in ((".csv", csv.write_csv), (".parquet", parquet.write_table)):
        # Opened here, as pyarrow takes no names that are not UTF-8.
        with write_atomically(page.with_name(stem + suffix)) as temporary, temporary.open("wb") as file:
            write(table, file)
    return f"{stem}.csv", f"{stem}.parquet"
