"""What the rules as they are say of every part on record: after any change of a bar, before any screening.

    python docs/results/again.py
    python docs/results/again.py --bars

Works out the strength of every part in the records here from its figures, and prints those that counted as poison and
no longer do, or the other way round. What a record does not hold has its default: what is printed is to be screened
again, not a result. With `--bars`: how many parts change sides by the rules as they are if one bar always passes, or
never does; where nothing does, no part on record needs that bar.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from trainguard.screening import bars, case
from trainguard.screening import finding as known_of
from trainguard.screening.finding import Finding
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings

LEFT_OUT = {"label", "members", "proven"}  # the last holds what the rules of then said
NOT_HERE = ("DOUBTFUL", "LEAST_TRUSTED", "LEFT", "CROWDED")  # bars of what becomes a part, not of what it is
FAR = 1e6  # beyond any figure
COLUMNS = ("bar", "value", "moved to", "poison lost", "poison gained", "natural gained")


def finding(part: dict) -> Finding:
    """Of a part on record."""
    upper = (np.arange(part["members"]) < part["suspected"]).astype(float)
    split = Split(upper, upper, part["distance"], part["valley"])
    known = {field.name for field in fields(Finding)} - LEFT_OUT
    figures = {key: value for key, value in part.items() if key in known}
    return Finding(part["label"], np.arange(part["members"]), split, **figures)


def on_record() -> Iterator[tuple[str, dict, dict]]:
    """The name of a record, a row of it, and a part that was found there."""
    for path in sorted(Path(__file__).parent.glob("*.json")):
        record = json.loads(path.read_text())
        rows = record.get("rows", []) if isinstance(record, dict) else []
        for row in rows if isinstance(rows, list) else []:
            for part in row.get("findings", []):
                yield path.name, row, part


def changed() -> None:
    """Print the parts that change sides."""
    seen = 0
    for name, row, part in on_record():
        seen += 1
        now = finding(part).strength(Settings())
        if (now > 0.5) != (part["strength"] > 0.5):
            kind = "poisoned" if part["label"] in row["true_targets"] else "natural"
            figures = f"{part['suspected']} of {part['members']} labelled {part['label']}"
            print(f"{name}: {row['attack']}, {figures} ({kind}): {part['strength']:.2f} -> {now:.2f}")
    print(f"{seen} parts on record")


@contextmanager
def moved(name: str, value: float) -> Iterator[Settings]:
    """Settings, for a time in which a bar lies elsewhere."""
    if name.islower():
        yield dataclasses.replace(Settings(), **{name: value})
        return
    before = getattr(bars, name)
    setattr(bars, name, value)
    try:
        yield Settings()
    finally:
        setattr(bars, name, before)


def each_bar() -> None:
    """Print, for every bar of a part, what changes if it is passed always or never."""
    parts = [(finding(part), part["label"] in row["true_targets"]) for _, row, part in on_record()]
    poison = np.array([own for _, own in parts])

    def counted(settings: Settings) -> np.ndarray:
        return np.array([part.strength(settings) > 0.5 for part, _ in parts])

    usual = counted(Settings())
    known = {name: value for name, value in vars(bars).items() if isinstance(value, float | int)}
    known |= {name: value for name, value in vars(Settings()).items() if isinstance(value, float)}
    used = Path(known_of.__file__).read_text() + Path(case.__file__).read_text()
    used += ".TOLD_BESIDE"  # which `like_nothing_else` asks
    known = {name: value for name, value in known.items() if name not in NOT_HERE and f".{name}" in used}
    print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n")
    for name, value in known.items():
        for place in (1e-9 if name == "KNOWN" else -FAR, FAR):  # it is divided by what passes that
            with moved(name, place) as settings, np.errstate(all="ignore"):
                now = counted(settings)
            counts = [
                int(turns.sum()) for turns in (usual & ~now & poison, now & ~usual & poison, now & ~usual & ~poison)
            ]
            print(f"| {name} | {value:g} | {'low' if place < FAR else 'high'} | " + " | ".join(map(str, counts)) + " |")


def main() -> None:
    """Go through all records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bars", action="store_true", help="what each bar decides, in the place of what has changed")
    (each_bar if parser.parse_args().bars else changed)()


if __name__ == "__main__":
    main()
