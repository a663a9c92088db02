"""What the page of an audit says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trainguard.files import visible
from trainguard.purification.bending import MOST
from trainguard.report import pictures
from trainguard.report.parts import Matrix, Share, Table, costs, flattened
from trainguard.results import listed

if TYPE_CHECKING:
    from trainguard.purification.results import AuditResult

WRITTEN_OUT = 20  # classes whose matrix is a table of numbers; with more it is a picture

HEADLINES = {
    "clean": "No sign of a backdoor in this model",
    "backdoored": "This model looks backdoored",
    "undecided": "No decision: look at the evidence",
}
ADVICE = {
    "clean": "Nothing needs to be done. What the verdict assumes, and where it can be wrong, stands at the end.",
    "backdoored": "Do not deploy the model. Purify it, or train it again; and screen the data that it was trained on.",
    "undecided": "Attack more images, or purify the model to be safe: a clean model may lose a few points of accuracy.",
}

UNFIT = (
    "First make sure that the model is given what it was trained on: the order of the classes, the normalisation (mean "
    "and std), enough images. Then audit it again."
)
OF_TWO = (
    "An audit may find a backdoor in a model of two classes, but not clear one: screen the data that it was trained "
    "on, or purify it."
)


def context(result: AuditResult) -> dict[str, Any]:
    """Everything that the template `audit.html.j2` shows."""
    k = len(result.pull)
    names = [result.name_of(i) for i in range(k)]
    reason = visible(result.reason)
    found = f"{reason[:1].upper()}{reason[1:]}." if reason else ""
    return {
        "title": "Audit report",
        "verdict": result.verdict,
        "headline": HEADLINES[result.verdict],
        "sentence": found or f"{result.images:,} images were attacked to see which classes they turn into.",
        "reason": reason,
        "advice": _advice(result),
        "facts": [
            ("Confidence", f"{result.confidence:.0%}"),
            ("Suspected target", listed([names[i] for i in result.target_classes]) or "none"),
            ("Images attacked", f"{result.images:,}"),
            ("Classes", f"{k:,}"),
        ],
        "classes": _classes(result, names),
        "matrix": _matrix(result, names) if k <= WRITTEN_OUT else None,
        "picture": _picture(result) if k > WRITTEN_OUT else None,
        "patch": _patch(result),
        "patch_success": f"{result.patch_success:.0%}",
        "cost": costs(result.timing),
        "settings": list(flattened(result.settings)),
        "fingerprint": result.fingerprint,
    }


def _advice(result: AuditResult) -> str:
    """What to do next."""
    if result.verdict != "undecided" or result.confidence > 0:
        return ADVICE[result.verdict]
    return UNFIT if len(result.pull) > 2 else f"{UNFIT} {OF_TWO}"


def _classes(result: AuditResult, names: list[str]) -> Table:
    order, near = np.argsort(-result.pull, kind="stable").tolist(), result.nearness
    bend = (
        np.where((result.bend > 0) & (result.bend < MOST), result.bend, np.nan)
        if len(result.bend)
        else np.full(len(order), np.nan)
    )
    own = (
        np.where(result.own_patch > 0, result.own_patch, np.nan)
        if len(result.own_patch)
        else np.full(len(order), np.nan)
    )
    rows = [
        (
            names[i],
            Share(float(result.pull[i])),
            float(result.movement[i]),
            float(near[i]),
            float(bend[i]),
            Share(float(own[i])) if np.isfinite(own[i]) else None,
            i in result.target_classes,
        )
        for i in order
    ]
    columns = (
        "class",
        "share of other classes' images that become it",
        "movement of features",
        "faintest picture that leads there, over the usual",
        "bend that leads there, as a share of the side",
        "share of its own images that a patch for these moves into one other",
        "suspected target",
    )
    return Table("classes", "Where adversarial examples end, by class", columns, rows)


def _matrix(result: AuditResult, names: list[str]) -> Matrix:
    caption = "Share of each class's adversarial examples (rows) by the class that they become (columns)"
    return Matrix("transitions", caption, names, names, result.transitions.astype(float).tolist())


def _picture(result: AuditResult) -> str:
    """The matrix as an image of one pixel per cell, dark where the share is high."""
    grey = 255 - (np.clip(result.transitions, 0, 1) * 255).round().astype(np.uint8)
    return pictures.data_uri(grey[..., None], lossless=True)


def _patch(result: AuditResult) -> dict[str, str] | None:
    """The pixels of the best patch, cut out, on grey where it has none."""
    if not len(result.patch):
        return None
    place = result.patch[:, :2].astype(int)
    (top, left), (bottom, right) = place.min(0), place.max(0)
    canvas = np.full((bottom - top + 1, right - left + 1, result.patch.shape[1] - 2), 128, dtype=np.uint8)
    canvas[place[:, 0] - top, place[:, 1] - left] = (np.clip(result.patch[:, 2:], 0, 1) * 255).round()
    where = f"rows {top} to {bottom}, columns {left} to {right}"
    return {"src": pictures.data_uri(canvas, lossless=True), "where": where}
