"""The committed record of a script here: rows that are added one by one, and what they were made with."""

import argparse
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trainguard.drill.machine import machine, versions
from trainguard.files import write_atomically

DIGITS = 3  # of figures that nobody reads more closely


class Record:
    """Goes on after the last finished row when opened again, as long as neither the version nor the settings changed.

    Args:
        path: the JSON file.
        usual: the settings of a row that says nothing else.

    Attributes:
        rows: what is finished; `save` after a change.
    """

    def __init__(self, path: Path, usual: dict[str, Any]) -> None:
        self._path = path
        self._about = {"usual": usual, "versions": versions(), "machine": machine("cpu")}
        before = json.loads(path.read_text()) if path.exists() else {}
        same = all(before.get(key) == self._about[key] for key in ("usual", "versions"))
        self.rows: list[dict[str, Any]] = before["rows"] if same else []

    def add(self, row: dict[str, Any]) -> None:
        """One more row, saved."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write everything, or nothing."""
        with write_atomically(self._path) as path:
            path.write_text(readable(self._about | {"rows": self.rows}))


def readable(record: dict[str, Any]) -> str:
    """JSON with every object and list that holds no other on a line of its own."""
    indented = json.dumps(record, indent=1)
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda flat: re.sub(r"\n *", " ", flat[0]), indented) + "\n"


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Floats with a few digits only."""
    return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in figures.items()}


def add_only(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """The option `--only`: some of the known names, separated by commas; all of them where it is not given."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return chosen

    parser.add_argument("--only", type=names, default=list(known), help="some of " + ", ".join(known))
