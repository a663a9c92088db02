"""What the page of a purification says; made from its record, so that the weights are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainguard.files import visible
from trainguard.report import charts
from trainguard.report.parts import Table, costs, flattened, number
from trainguard.results import judged_on

DOES = {
    "adversarial": "fine-tunes on adversarial examples of the extra set",
    "plain": "fine-tunes on the extra set itself",
    "rank": "ranks all images to choose the next, larger set",
}


def context(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template `purification.html.j2` shows.

    Args:
        record: `PurifyResult.to_dict()`, or the JSON that `save` wrote beside the weights.
    """
    history = record["history"]
    before, after = record["accuracy_before"], record["accuracy_after"]
    rounds = 1 + max((row["round"] for row in history), default=-1)
    return {
        "title": "Purification report",
        "verdict": "done" if record["changed"] else "undecided",
        "headline": "The model was purified" if record["changed"] else "The model came back as it was",
        "sentence": f"Accuracy on {judged_on(record['settings'])} images: {before:.1%} before, {after:.1%} after.",
        "stopped": record["stopped"],
        "steps": _steps(history, rounds),
        "screening": _screening(record["settings"].get("screening")),
        "facts": [
            ("Rounds", str(rounds)),
            ("Accuracy before", f"{before:.2%}"),
            ("Accuracy after", f"{after:.2%}"),
            ("Last extra set", f"{len(record['keep']):,} images"),
        ],
        "progress": _progress(history, before),
        "judged": judged_on(record["settings"]),
        "history": _table(history),
        "cost": costs(record["timing"]),
        "settings": list(flattened(record["settings"])),
        "fingerprint": record["fingerprint"],
    }


def _steps(history: list[Mapping[str, Any]], rounds: int) -> str:
    """What every round did, of what Algorithm 1 has."""
    taken = {row["step"] for row in history if row.get("batches")} | ({"rank"} if rounds > 1 else set())
    said = [words for step, words in DOES.items() if step in taken]
    return f"Each round {', then '.join(said)}." if said else "No round was finished."


def _screening(found: Mapping[str, Any] | None) -> str:
    """What screening said of the data before the rounds; empty where there was none."""
    if not found:
        return ""
    if not found["flagged"]:
        return f"Screening the data first flagged nothing (verdict: {found['verdict']})."
    flagged, reason = found["flagged"], visible(found["reason"])
    return f"Screening the data first flagged {flagged:,} images; their labels were unlearned: {reason}."


def _progress(history: list[Mapping[str, Any]], before: float) -> Any:
    """Held-out accuracy and the overlap of extra sets, over the steps of all rounds."""
    if not history:
        return None
    steps = [f"{row['round']}" for row in history]
    names = [name for name in ("accuracy", "overlap") if any(isinstance(row.get(name), float) for row in history)]
    lines = {name: [float("nan"), *(number(row.get(name)) for row in history)] for name in names}
    if "accuracy" in lines:
        lines["accuracy"][0] = before
    stages = ["", *(f"round {int(step) + 1}" for step in steps)]
    return charts.curves(range(len(history) + 1), lines, xlabel="step", title="Step by step", stages=stages)


def _table(history: list[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in history for name in row))
    rows = [tuple(row.get(name) for name in columns) for row in ({**row, "round": row["round"] + 1} for row in history)]
    return Table("history", "Every round and step", columns, rows)
