r"""What a screening found: one frozen value, saved whole or not at all, and shown as a short table."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainguard.files import plain, read_record, visible, writable_folder, write_atomically

Verdict = Literal["clean", "poisoned", "undecided"]

_ARRAYS = ("score", "consistency", "suspect", "keep", "labels", "proposed", "thresholds")
_FORMAT = 2
NAMED = 8  # target classes in the short table


@dataclass(frozen=True, repr=False, eq=False)
class ScreenResult:
    r"""The outcome of screening a data set of N samples and K classes.

    Arrays are aligned with the data set's own indices: entry `i` speaks of sample `i`, whatever was flagged.

    Attributes:
        score: (N,) float32, higher is more suspicious; NaN for an unreadable sample.
        consistency: (N,) float32, the divergence of AdvrBD Eq. 3 (low: the prediction holds under perturbation).
        suspect: (N,) bool, True for samples that training should leave out.
        keep: (M,) int64, the indices that are left, in ascending order.
        verdict: `"clean"`, `"poisoned"` or `"undecided"`.
        confidence: How sure the verdict is, in [0, 1].
        reason: One sentence: what the verdict rests on.
        target_classes: The classes that the flagged samples are labelled with, largest first.
        labels: (N,) int64 as given; -1 for an unreadable sample.
        proposed: (N,) int64, the label that the purified probe gives to a flagged sample; the given label elsewhere.
        thresholds: (K,) float32, the score from which a sample of each class is flagged; inf where none is.
        unreadable: Indices that could not be read (only with `on_error="skip"`).
        class_names: K names.
        fingerprint: Fingerprint of the data set.
        settings: Everything that made this result, with seed and versions; plain JSON values.
        timing: Wall seconds by stage.
        history: One row per probe epoch: stage, epoch and loss; by the paper's preset also accuracy, trusted share.
        evidence: Thumbnails for the report, or None.
    """

    score: NDArray[np.float32]
    consistency: NDArray[np.float32]
    suspect: NDArray[np.bool_]
    keep: NDArray[np.int64]
    verdict: Verdict
    confidence: float
    reason: str
    target_classes: tuple[int, ...]
    labels: NDArray[np.int64]
    proposed: NDArray[np.int64]
    thresholds: NDArray[np.float32]
    unreadable: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    evidence: Any = None

    def apply(self, dataset: Any) -> Any:
        """The kept part of `dataset`, of the data set's own type where it has `select` (Hugging Face), else a `Subset`.

        Raises:
            ValueError: `dataset` has another length than the one that was screened, or its labels in another order.
        """
        self._check_order(dataset)
        from trainguard.data.loaders import part_of
        from trainguard.data.sources import is_hugging_face

        if is_hugging_face(dataset):
            return dataset.select(self.keep)
        return part_of(dataset, self.keep)

    def annotate(self, dataset: Any) -> Any:
        """A Hugging Face `dataset` with two more columns: `poison_score` (float32) and `keep` (bool).

        Those of an earlier screening are replaced.

        Raises:
            TypeError: `dataset` has no columns.
            ValueError: `dataset` has another length than the one that was screened, or other labels, or another column
                of the name `keep`.
        """
        if not hasattr(dataset, "add_column"):
            raise TypeError(
                f"expected a Hugging Face Dataset, got {type(dataset).__name__}: use result.score and result.keep"
            )
        self._check_order(dataset)
        kept = np.zeros(len(self.score), dtype=bool)
        kept[self.keep] = True
        columns = {"poison_score": self.score, "keep": kept}
        form = dataset.format
        # Columns are added through whatever format is set, a training transform included.
        dataset = dataset.with_format(None)
        if "keep" in dataset.column_names and "poison_score" not in dataset.column_names:
            raise ValueError("the data set has a column 'keep' of its own: rename it first")
        dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        chosen = [name for name in form["columns"] if name not in columns]
        if len(chosen) == len(dataset.column_names) - len(columns):
            chosen = dataset.column_names
        return dataset.with_format(form["type"], chosen, form["output_all_columns"], **form["format_kwargs"])

    def _check_order(self, dataset: Any) -> None:
        from trainguard.data.sources import unwrap

        try:
            length = len(dataset)
        except TypeError:
            raise TypeError(
                f"expected the data set that was screened, got {type(dataset).__name__}, which has no length"
            ) from None
        if length != len(self.score):
            raise ValueError(
                f"this result is about {len(self.score)} samples, the data set has {length}: "
                "pass the data set that was screened"
            )
        self._check_files(dataset)
        read = self.labels >= 0
        dataset, index = unwrap(dataset)
        size = len(dataset) if hasattr(dataset, "__len__") else -1  # a subset needs none of what is below it
        every = [values for values in _listed_labels(dataset) if len(values) == size]
        listed = [(values if index is None else values[index])[read] for values in every]
        if any(np.array_equal(values, self.labels[read]) for values in listed):
            return
        # Numbers of another meaning may be there as well: the same ones in another order are the labels. What
        # torchvision's own classes list are the labels in any case, and so is a single column of class labels.
        if getattr(dataset, "target_transform", None) is not None:
            return  # what it lists are not the labels that were screened
        reads = getattr(getattr(type(dataset), "__getitem__", None), "__module__", "")
        given = reads.startswith("torchvision.") or _has_one_label(dataset)
        if listed and (given or any(np.array_equal(np.sort(v), np.sort(self.labels[read])) for v in listed)):
            raise ValueError(
                "the labels that were screened are others, or have another order here: pass the data set that was "
                "screened, and shuffle or sort it later"
            )

    def _check_files(self, dataset: Any) -> None:
        """The samples that the evidence names by their files must be in these, where a data set lists any."""
        from trainguard.data.sources import path_at, unwrap

        if self.evidence is None:
            return
        base, index = unwrap(dataset)
        for row, name in zip(self.evidence.named.tolist(), self.evidence.names.tolist(), strict=True):
            path = path_at(base, row if index is None else int(index[row]))
            before = name.removeprefix(f"row {row} (").replace("\\", "/")
            if path and before != name and f"/{Path(path).name})" not in f"/{before}":
                raise ValueError(
                    f"the data set has other files than when it was screened: row {row} was {before.split(')')[0]} "
                    f"and is {path} here; screen it anew"
                )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays of evidence, as plain JSON values (NaN becomes None)."""
        return plain({name: getattr(self, name) for name in _ARRAYS} | self._header())

    def _header(self) -> dict[str, Any]:
        names = ("verdict", "confidence", "reason", "fingerprint", "settings", "timing", "history")
        header = {name: getattr(self, name) for name in names}
        return header | {
            "format": _FORMAT,
            "target_classes": list(self.target_classes),
            "unreadable": list(self.unreadable),
            "class_names": list(self.class_names),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes `result.json` and `arrays.npz` (and `evidence.npz`) into `folder`, each whole or not at all.

        `result.json` comes last and holds the digests of the others, so that `load` refuses a folder in which a save
        was interrupted. What lay there before stays as it was where there is no room for the new one.

        Raises:
            StateError: the folder cannot be written.
        """
        folder = writable_folder(folder)
        parts = {"arrays.npz": _npz({name: getattr(self, name) for name in _ARRAYS})}
        if self.evidence is not None:
            parts["evidence.npz"] = _npz(self.evidence.to_arrays())
        digests = {"digests": {name: _digest(content) for name, content in parts.items()}}
        header = json.dumps(plain(self._header() | digests), indent=1, allow_nan=False).encode()
        with ExitStack() as written:  # all of them, before the first takes its place; the last to begin is the first to
            for name, content in {"result.json": header, **parts}.items():
                written.enter_context(write_atomically(folder / name)).write_bytes(content)
        if self.evidence is None:
            (folder / "evidence.npz").unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ScreenResult:
        """Reads what `save` wrote; nothing in the folder can run code.

        Raises:
            ValueError: `folder` holds no screening result, one of another format, or files that do not belong together.
        """
        folder = Path(folder)
        if not (folder / "result.json").is_file():
            raise ValueError(f"{folder} holds no screening result (no result.json): pass the folder given to save()")
        header = read_record(folder / "result.json")
        if header.pop("format", None) != _FORMAT:
            raise ValueError(f"{folder}/result.json has another format than {_FORMAT}: screen again")
        digests = header.pop("digests", {})
        if not isinstance(digests, dict):
            raise ValueError(f"{folder}/result.json is no whole result of this version (digests): screen again")
        values: dict[str, Any] = _arrays_in(folder / "arrays.npz", digests)
        evidence = None
        try:
            if "evidence.npz" in digests:  # one that is not named is left over from a result before
                from trainguard.evidence import Evidence

                evidence = Evidence.from_arrays(_arrays_in(folder / "evidence.npz", digests))
            for name in ("target_classes", "unreadable", "class_names"):
                header[name] = tuple(header[name])
            if header["verdict"] not in get_args(Verdict):
                raise TypeError(f"verdict {header['verdict']!r}")
            return cls(**values, **header, evidence=evidence)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}/result.json is no whole result of this version ({error}): screen again"
            ) from None

    def report(
        self,
        path: str | Path,
        dataset: Any = None,
        image_column: str | int | None = None,
        label_column: str | int | None = None,
    ) -> Path:
        """Writes one self-contained HTML page.

        Args:
            path: the HTML file.
            dataset: what was screened, to show images where the result kept no thumbnails.
            image_column: as screening was told, where it was.
            label_column: likewise.
        """
        from trainguard.report import build

        return build(self, path, dataset, image_column, label_column)

    def figures(self) -> dict[str, float]:
        """What an experiment tracker can draw: flagged samples (count and share), verdict, confidence, seconds."""
        return {
            "trainguard/flagged": float(self.suspect.sum()),
            "trainguard/flagged_share": float(self.suspect.sum()) / max(1, len(self.suspect)),
            "trainguard/poisoned": float(self.verdict == "poisoned"),
            "trainguard/confidence": float(self.confidence),
            "trainguard/seconds": float(self.timing.get("total", 0.0)),
        }

    def rows(self) -> list[tuple[str, str]]:
        """The short table behind `repr`: (what, value)."""
        flagged = int(self.suspect.sum())
        n = max(1, len(self.suspect))
        known = self.class_names
        names = [f"{k} ({known[k]})" if k < len(known) else str(k) for k in self.target_classes]
        table = [
            ("verdict", f"{self.verdict} (confidence {self.confidence:.2f})"),
            ("because", self.reason),
            ("flagged", f"{flagged} of {len(self.suspect)} ({100 * flagged / n:.2f}%)"),
            ("target classes", listed(names) or "none"),
            ("unreadable", str(len(self.unreadable))),
            ("probe epochs", str(len(self.history) or "")),
            ("seconds", f"{self.timing.get('total', float('nan')):.1f}"),
        ]
        return [(what, visible(value)) for what, value in table if value and (what, value) != ("unreadable", "0")]

    def __repr__(self) -> str:
        return as_text("ScreenResult", self.rows())

    def _repr_html_(self) -> str:
        return as_html("ScreenResult", self.rows())


def judged_on(settings: Mapping[str, Any]) -> str:
    """Which images a purification's accuracy was measured on, by its settings: `held-out` or `validation` ones."""
    return "held-out" if settings.get("judged on", {}).get("held out", True) else "validation"


def as_text(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A two-column table for a terminal."""
    rows = list(rows)
    width = max(len(what) for what, _ in rows)
    return title + "\n" + "\n".join(f"  {what:<{width}}  {value}" for what, value in rows)


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """The first `most` of some names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def as_html(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A two-column table for a notebook."""
    cells = "".join(f"<tr><th align=left>{escape(what)}</th><td>{escape(value)}</td></tr>" for what, value in rows)
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def _has_one_label(dataset: Any) -> bool:
    """Whether a Hugging Face data set has one column of class labels, and gives it as it is."""
    features = getattr(dataset, "features", None)
    if not hasattr(dataset, "select") or not isinstance(features, Mapping) or dataset.format["type"] == "custom":
        return False
    return sum(type(feature).__name__ == "ClassLabel" for feature in features.values()) == 1


def _listed_labels(dataset: Any) -> Iterator[NDArray[Any]]:
    """The whole numbers that a data set lists by sample, without reading an image."""
    from torch.utils.data import TensorDataset

    features = getattr(dataset, "features", None)
    if hasattr(dataset, "select") and isinstance(features, Mapping):
        plain = {"Value", "ClassLabel"}  # an array of numbers may be an image
        kinds = {n: getattr(f, "dtype", "") for n, f in features.items() if type(f).__name__ in plain}
        for name in (name for name, kind in kinds.items() if str(kind).lstrip("u").startswith("int")):
            yield np.asarray(dataset.with_format("numpy", columns=[name])[:][name])
        return
    if isinstance(dataset, TensorDataset):
        found: list[Any] = list(dataset.tensors)
    elif isinstance(dataset, (list, tuple)):
        found = [[row[1] for row in dataset if isinstance(row, (list, tuple)) and len(row) > 1]]
    else:
        found = [getattr(dataset, name, None) for name in ("targets", "labels")]
    for values in found:
        if isinstance(values, (list, tuple, np.ndarray)) or hasattr(values, "numpy"):
            with suppress(ValueError, TypeError):
                array = np.asarray(values)
                if array.ndim == 1 and array.dtype.kind in "iu":
                    yield array


def _npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _arrays_in(file: Path, digests: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The arrays in a file, after a check that it is the one that `result.json` speaks of."""
    content = file.read_bytes() if file.is_file() else b""
    if _digest(content) != digests.get(file.name):
        raise ValueError(f"{file} does not belong to the result.json beside it, or is damaged: save or screen again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
