"""What the page of a screening says: every array of the result as words, tables and drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from trainguard.evidence import Evidence
from trainguard.files import visible
from trainguard.report import charts, pictures
from trainguard.report.parts import Share, Table, costs, flattened, number, percent
from trainguard.results import ScreenResult, listed

HISTOGRAMS = 12  # classes drawn; the table goes on
TOLD = 5  # target classes at the top
LISTED = 1000  # rows of a table in the page; keep.csv has all samples

FINDINGS = {
    "suspected": "part",
    "strength": "evidence",
    "distance": "distance",
    "valley": "valley",
    "agreement": "agrees",
    "reference": "rest agrees",
    "company": "company",
    "diversity": "kinds",
    "scatter": "taken for",
    "transfer": "moves others",
    "trigger": "acts as trigger",
    "at_source": "at its source",
}
SHARES = ("agreement", "reference", "transfer", "trigger", "at_source", "strength")
ALWAYS_SEEN = ("suspected", "distance", "valley", "strength")  # the rest only of parts that lie far enough apart

HEADLINES = {
    "clean": "No sign of backdoor poison",
    "poisoned": "This data set looks poisoned",
    "undecided": "No decision: look at the evidence",
}
SURE = "bright pixels are moved beyond chance"
UNSURE = "most where it is bright; too few kept samples to tell what is chance"
EXPECTED = {
    True: "kept samples with the labels these would get",
    False: "any kept samples: none is left with a label that these would get",
}
ADVICE = {
    "clean": "Nothing needs to be done. What the verdict assumes, and where it can be wrong, stands at the end.",
    "poisoned": "Train on the kept samples only, ask whoever supplied the data about the flagged rows, and audit every "
    "model that was already trained on them.",
    "undecided": "Nothing was left out: a guarded training runs on all of the data. Read the reason above. Screening "
    "for longer may decide it (a budget of 2, say); until then look at the samples with the highest scores by hand.",
}
NOTHING_KEPT = "Nothing is left to train on: ask whoever supplied the data about the flagged rows."


def context(result: ScreenResult, evidence: Evidence | None) -> dict[str, Any]:
    """Everything that the template `screening.html.j2` shows."""
    names = Names(result.class_names, evidence)
    return {
        "title": "Screening report",
        "verdict": result.verdict,
        "headline": HEADLINES[result.verdict],
        "sentence": _sentence(result, names),
        "advice": ADVICE[result.verdict] if len(result.keep) else NOTHING_KEPT,
        "facts": _facts(result, names),
        "classes": _classes(result, names),
        "findings": _findings(result, names),
        "cards": _cards(result, names, evidence),
        "traces": _traces(result, names, evidence),
        "histograms": _histograms(result, names),
        "groups": _groups(result, evidence),
        "learning": _learning(result.history),
        "map": _map(result, evidence),
        "borderline": _borderline(result, names, evidence),
        "flagged": _flagged(result, names),
        "flagged_total": int(result.suspect.sum()),
        "parted": bool(np.isfinite(result.thresholds).any()),
        "has_images": evidence is not None,
        "unreadable": [(int(i), names.sample(int(i))) for i in result.unreadable[:LISTED]],
        "cost": costs(result.timing),
        "reason": visible(result.reason),
        "unreadable_total": len(result.unreadable),
        "settings": list(flattened({name: value for name, value in result.settings.items() if name != "findings"})),
        "fingerprint": result.fingerprint,
    }


class Names:
    """How classes and samples are called; all of it comes from the data and is escaped by the template."""

    def __init__(self, class_names: Sequence[str], evidence: Evidence | None = None) -> None:
        self._classes = class_names
        named = [] if evidence is None else zip(evidence.named.tolist(), evidence.names.tolist(), strict=True)
        self._samples = dict(named)

    def label(self, k: int) -> str:
        """`3 (cat)`, or the number alone where that is the name."""
        name = self._classes[k] if 0 <= k < len(self._classes) else str(k)
        return str(k) if name == str(k) else visible(f"{k} ({name})")

    def sample(self, i: int) -> str:
        """The row, and the path where it is known."""
        return visible(self._samples.get(i, f"row {i}"))


def _sentence(result: ScreenResult, names: Names) -> str:
    flagged, total = int(result.suspect.sum()), len(result.suspect)
    counted = f"{flagged:,} of {total:,} samples ({percent(flagged, total)})"
    if result.verdict == "poisoned":
        targets = listed([names.label(k) for k in result.target_classes], TOLD)
        return f"{counted} carry what looks like a backdoor trigger" + (f" for {targets}." if targets else ".")
    if flagged:
        return f"{counted} were set aside as a precaution."
    return f"All {total - len(result.unreadable):,} readable samples were kept."


def _facts(result: ScreenResult, names: Names) -> list[tuple[str, str]]:
    total = len(result.suspect)
    flagged = int(result.suspect.sum())
    facts = [
        ("Confidence", f"{result.confidence:.0%}"),
        ("Flagged", f"{flagged:,} of {total:,} ({percent(flagged, total)})"),
        ("Suspected target", listed([names.label(k) for k in result.target_classes], TOLD) or "none"),
        ("Kept", f"{len(result.keep):,}"),
        ("Classes", f"{len(result.thresholds):,}"),
    ]
    return [*facts, ("Unreadable", f"{len(result.unreadable):,}")] if result.unreadable else facts


def _classes(result: ScreenResult, names: Names) -> Table:
    k = len(result.thresholds)
    readable = result.labels >= 0
    total = np.bincount(result.labels[readable], minlength=k)
    flagged = np.bincount(result.labels[readable & result.suspect], minlength=k)
    rows = [
        (
            names.label(i),
            int(total[i]),
            int(flagged[i]),
            Share(flagged[i] / total[i] if total[i] else 0.0),
            float(result.thresholds[i]),
            i in result.target_classes,
        )
        for i in sorted(range(k), key=lambda i: (i not in result.target_classes, -flagged[i]))[:LISTED]
    ]
    columns = ("class", "samples", "flagged", "share flagged", "threshold", "suspected target")
    return Table("classes", "Flagged samples by given label" + _first(k), columns, rows)


def _first(count: int) -> str:
    """What a caption says where not all rows are written out."""
    return f", the first {LISTED:,} of {count:,} classes" if count > LISTED else ""


def _findings(result: ScreenResult, names: Names) -> Table | None:
    """What screening saw in each class, where its variant looks class by class."""
    found = result.settings.get("findings")
    if not found:
        return None
    shown = {key: column for key, column in FINDINGS.items() if key in found[0]}
    rows = []
    ranked = sorted(found, key=lambda row: [-np.nan_to_num(number(row[key])) for key in ("strength", "distance")])
    for row in ranked[:LISTED]:
        seen = number(row["strength"]) > 0
        values = (number(row[key]) if seen or key in ALWAYS_SEEN else float("nan") for key in shown)
        cells = (Share(0.0 if v < 0 else v) if key in SHARES else v for key, v in zip(shown, values, strict=True))
        rows.append((names.label(row["label"]), *cells))
    caption = "Two parts of a class, and what speaks against one of them" + _first(len(found))
    return Table("findings", caption, ("class", *shown.values()), rows)


def _flagged(result: ScreenResult, names: Names) -> Table:
    members = np.flatnonzero(result.suspect)
    members = members[np.argsort(-result.score[members], kind="stable")][:LISTED]
    rows = [(names.sample(i), *_labels(result, names, i), float(result.score[i])) for i in members.tolist()]
    caption = "Flagged samples, most suspicious first"
    return Table("flagged", caption, ("sample", "given label", "proposed label", "score"), rows)


def _labels(result: ScreenResult, names: Names, i: int) -> tuple[str, str]:
    given, proposed = int(result.labels[i]), int(result.proposed[i])
    return names.label(given), names.label(proposed) if proposed != given else "the same"


def _cards(result: ScreenResult, names: Names, evidence: Evidence | None) -> list[dict[str, Any]]:
    """Flagged samples by given label, each with a kept one of the same label and one of the label it would get."""
    if evidence is None:
        return []
    groups: dict[int, list[dict[str, Any]]] = {int(label): [] for label in evidence.groups}
    for row in evidence.cards.tolist():
        sample, same, other = (_picture(result, names, evidence, place) for place in row)
        groups[int(result.labels[evidence.index[row[0]]])].append({"sample": sample, "same": same, "other": other})
    return [
        {"label": names.label(label), "count": int((result.suspect & (result.labels == label)).sum()), "cards": cards}
        for label, cards in groups.items()
    ]


def _picture(result: ScreenResult, names: Names, evidence: Evidence, place: int) -> dict[str, Any] | None:
    if place < 0:
        return None
    i = int(evidence.index[place])
    given, proposed = _labels(result, names, i)
    return {
        "src": pictures.data_uri(evidence.thumbnails[place]),
        "name": names.sample(i),
        "given": given,
        "proposed": proposed,
        "score": float(result.score[i]),
        "flagged": bool(result.suspect[i]),
    }


def _groups(result: ScreenResult, evidence: Evidence | None) -> str:
    """What is said where not every label with flagged samples has its own images."""
    labels = len(np.unique(result.labels[result.suspect]))
    shown = 0 if evidence is None else len(evidence.groups)
    return f"Shown are the {shown} labels with most flagged samples, of {labels}." if 0 < shown < labels else ""


def _borderline(result: ScreenResult, names: Names, evidence: Evidence | None) -> list[dict[str, Any]]:
    if evidence is None:
        return []
    shown = [_picture(result, names, evidence, place) for place in evidence.borderline.tolist()]
    return [picture for picture in shown if picture is not None]


def _traces(result: ScreenResult, names: Names, evidence: Evidence | None) -> list[dict[str, Any]]:
    if evidence is None or not len(result.keep):  # nothing is left to compare with
        return []
    drawn = []
    for g, label in enumerate(evidence.groups.tolist()):
        count = int(evidence.counts[g])
        if count < 2:  # the difference of one image is that image
            continue
        moments = (evidence.flagged_mean[g], evidence.flagged_var[g], evidence.kept_mean[g], evidence.kept_var[g])
        matched = int(evidence.kept_counts[g])
        seen = pictures.trace(*moments, count, matched)
        stretched = f"difference, {seen.gain:.0f} times" if seen.gain > 1.5 else "difference"
        views = [
            ("average of the flagged", seen.flagged, "what they share stays sharp, the rest blurs", seen.box),
            ("average they should have" if matched else "average of others", seen.kept, EXPECTED[bool(matched)], None),
            (stretched, seen.difference, "grey is none", seen.box),
            ("where it differs", seen.where, SURE if matched >= pictures.LEAST_KEPT else UNSURE, None),
            ("spectrum of the difference", seen.spectrum, "slow changes in the middle; dots are stripes", None),
        ]
        shown = [
            {"name": name, "src": pictures.data_uri(pixels), "note": note, "box": box, "shape": pixels.shape[:2]}
            for name, pixels, note, box in views
        ]
        place = pictures.place(seen.box) if seen.box else ""
        drawn.append({"label": names.label(label), "count": count, "views": shown, "place": place})
    return drawn


def _histograms(result: ScreenResult, names: Names) -> list[Markup]:
    """The whole set, then the classes that a reader asks about first: targets, most flagged, largest."""
    known = np.isfinite(result.score) & (result.labels >= 0)
    score, suspect, labels = result.score[known], result.suspect[known], result.labels[known]
    k = len(result.thresholds)
    flagged, total = np.bincount(labels[suspect], minlength=k), np.bincount(labels, minlength=k)
    target = np.isin(np.arange(k), result.target_classes)
    order = np.lexsort((-total, -flagged, ~target))
    whole = charts.histogram(score[~suspect], score[suspect], np.inf, "all classes")
    drawn = [whole]
    for i in order[:HISTOGRAMS]:
        if total[i]:
            mine = labels == i
            threshold = float(result.thresholds[i])
            name = f"class {names.label(int(i))}"
            drawn.append(charts.histogram(score[mine & ~suspect], score[mine & suspect], threshold, name))
    return drawn


def _learning(history: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The losses, the accuracy and every other share in the history, over the probes' epochs."""
    if len(history) < 2:
        return []
    stages = [str(row.get("stage", "")) for row in history]
    names = [name for name in dict.fromkeys(name for row in history for name in row) if name not in ("stage", "epoch")]
    lines = {name.replace("_", " "): [number(row.get(name)) for row in history] for name in names}
    lines = {name: values for name, values in lines.items() if np.isfinite(values).any()}
    steps = range(1, len(history) + 1)
    shares = {name: values for name, values in lines.items() if name != "loss" and np.nanmax(values) <= 1}
    drawn = []
    if "loss" in lines:
        one = {"loss": lines["loss"]}
        drawn.append(charts.curves(steps, one, xlabel="probe epoch", title="Loss", stages=stages, top=None))
    if shares:
        title = "Accuracy and shares" if "accuracy" in shares else "Shares"
        drawn.append(charts.curves(steps, shares, xlabel="probe epoch", title=title, stages=stages))
    return drawn


def _map(result: ScreenResult, evidence: Evidence | None) -> Markup | None:
    """The probe's features in the plane, a sample of them, coloured by decision."""
    if evidence is None or len(evidence.mapped) < 10:
        return None
    flagged = result.suspect[evidence.mapped]
    return charts.scatter(plane(evidence.features), flagged, "Samples as the probe sees them")


def plane(features: NDArray) -> NDArray:
    """(M, D) features as (M, 2) points: t-SNE of the main components; features that are plane stay as they are."""
    points = features.astype(np.float64)
    if points.shape[1] == 2:
        return points
    if not np.ptp(points, axis=0).any():  # all the same: t-SNE would not survive it
        return np.zeros((len(points), 2))
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = PCA(min(30, *points.shape), random_state=0).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(points)
