"""Which parts on record would change sides by the rules as they are: after any change of a bar, before any screening.

    python docs/results/again.py

Works out the strength of every part in the records here from its figures, and prints those that counted as poison and
no longer do, or the other way round. What a record does not hold has its default: what is printed is to be screened
again, not a result.
"""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from trainguard.screening.finding import Finding
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings

LEFT_OUT = {"label", "members", "proven"}  # the last holds what the rules of then said


def strength(part: dict) -> float:
    """Of a part on record, by the rules as they are."""
    upper = (np.arange(part["members"]) < part["suspected"]).astype(float)
    split = Split(upper, upper, part["distance"], part["valley"])
    known = {field.name for field in fields(Finding)} - LEFT_OUT
    figures = {key: value for key, value in part.items() if key in known}
    return Finding(part["label"], np.arange(part["members"]), split, **figures).strength(Settings())


def main() -> None:
    """Go through all records."""
    seen = 0
    for path in sorted(Path(__file__).parent.glob("*.json")):
        record = json.loads(path.read_text())
        rows = record.get("rows", []) if isinstance(record, dict) else []
        for row in rows if isinstance(rows, list) else []:
            for part in row.get("findings", []):
                seen += 1
                now = strength(part)
                if (now > 0.5) != (part["strength"] > 0.5):
                    kind = "poisoned" if part["label"] in row["true_targets"] else "natural"
                    figures = f"{part['suspected']} of {part['members']} labelled {part['label']}"
                    print(f"{path.name}: {row['attack']}, {figures} ({kind}): {part['strength']:.2f} -> {now:.2f}")
    print(f"{seen} parts on record")


if __name__ == "__main__":
    main()
