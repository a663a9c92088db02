"""What purification and audit found: frozen values that can be saved, loaded, and shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trainguard.checkpoints import load_weights, read_checkpoint, weights_path, write_weights
from trainguard.files import plain, read_record, visible, write_atomically
from trainguard.purification.bending import MOST
from trainguard.results import as_html, as_text, judged_on, listed

Verdict = Literal["clean", "backdoored", "undecided"]

_FORMAT = 1
_AUDIT_ARRAYS = ("transitions", "pull", "movement", "patch", "reach", "bend", "own_patch")


@dataclass(frozen=True, repr=False, eq=False)
class PurifyResult:
    """A purified model and how it came about.

    Attributes:
        model: the purified model; its class, device, precision, mode and flags are those of the argument, without DDP
            or torch.compile around it.
        history: one row per round and step: round, step, images, batches, loss, accuracy on the judging images,
            seconds; after step 2 whether the round is within the bound, after step 3 how much the next extra set
            overlaps.
        keep: (n,) int64, the last extra set: the images that look clean, as indices of the data.
        accuracy_before: of the model as it came, on the images that judge; in [0, 1].
        accuracy_after: of `model`, on the same.
        changed: False where no round stayed within the bound and the model came back as it was.
        stopped: why it ended, in words.
        fingerprint: of the data set.
        settings: everything that made this result, with seed and versions; plain JSON values.
        timing: wall seconds: total, and by step.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    keep: NDArray[np.int64]
    accuracy_before: float
    accuracy_after: float
    changed: bool
    stopped: str
    fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain JSON values."""
        names = (
            "history",
            "accuracy_before",
            "accuracy_after",
            "changed",
            "stopped",
            "fingerprint",
            "settings",
            "timing",
        )
        own = {name: getattr(self, name) for name in names}
        return plain({"format": _FORMAT, "kind": "purify", **own, "keep": self.keep})

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the weights to `path` as safetensors, and the rest beside them as JSON; each whole or not at all.

        Args:
            path: of the weights; `.safetensors` is added where it is missing.
            **about: further JSON values for the record, such as `input_sha256=`.

        Raises:
            ValueError: the record itself has a value of such a name.
            FileExistsError: see `check_free`.
        """
        check_free(path)
        taken = about.keys() & {*self.__dataclass_fields__, "format", "kind", "weights", "sha256"}
        if taken:
            raise ValueError(f"the record has a {min(taken)!r} of its own: give that of `about` another name")
        return write_weights(path, self.model, {**about, **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> PurifyResult:
        """Read what `save` wrote.

        Args:
            path: that was given to `save`.
            model: of the same architecture; gets the weights.

        Raises:
            ModelError: the weights do not fit `model`.
            ValueError: the JSON beside them is missing, of another kind, or about other weights.
        """
        path = weights_path(path)
        record = _read_record(path.with_suffix(".json"), "purify")
        found = read_checkpoint(path)
        if found.sha256 != record.get("sha256"):
            raise ValueError(f"{path} is not the file that the JSON beside it speaks of: purify or save again")
        names = cls.__dataclass_fields__.keys() & record.keys()
        try:
            values = {name: record[name] for name in names} | {"keep": np.asarray(record["keep"], dtype=np.int64)}
            result = cls(model=model, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the JSON beside {path} is no whole record of this version ({error})") from None
        load_weights(model, found)
        return result

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page."""
        from trainguard.report import build

        return build(self, path)

    def rows(self) -> list[tuple[str, str]]:
        """The short table behind `repr`: (what, value)."""
        rounds = 1 + max((row["round"] for row in self.history), default=-1)
        return [
            ("model", "purified" if self.changed else "as it came"),
            ("because", self.stopped),
            ("rounds", str(rounds)),
            (
                f"{judged_on(self.settings)} accuracy",
                f"{self.accuracy_before:.4f} before, {self.accuracy_after:.4f} after",
            ),
            ("last extra set", f"{len(self.keep)} images"),
            ("seconds", f"{self.timing.get('total', float('nan')):.1f}"),
        ]

    def __repr__(self) -> str:
        return as_text("PurifyResult", self.rows())

    def _repr_html_(self) -> str:
        return as_html("PurifyResult", self.rows())


@dataclass(frozen=True, repr=False, eq=False)
class AuditResult:
    """Whether a model of K classes has a backdoor, and what says so.

    Attributes:
        verdict: `"clean"`, `"backdoored"` or `"undecided"`.
        confidence: how sure the verdict is, in [0, 1].
        reason: one sentence: what the verdict rests on.
        target_classes: suspected targets, strongest first; empty unless the verdict is `"backdoored"`.
        transitions: (K, K) float32, the share of class i's adversarial examples that are predicted as j (PBE Figs.
            1, 4); a row sums to one, or to zero for a class without images.
        pull: (K,) float32, how much of the adversarial examples of the other classes ends in each class, in [0, 1].
        movement: (K,) float32, how much nearer the features of the other classes' adversarial examples are to the
            features of each class than before the attack, as a share of the distance (after PBE Table 5).
        patch_success: share of held-out images whose prediction one small patch changes, the same for all; in [0, 1].
        patch: (n, 2 + C) float32, that patch: row, column, and values in [0, 1] of each pixel.
        images: how many images were attacked.
        reach: (K,) float32, the root mean square, of values in [0, 1], of the faintest picture that leads nearly all
            other images to each class; 0 for classes that were not tried. Empty in older results.
        bend: (K,) float32, how far the pixels of other images must be moved, as a share of the side, until half of them
            are of each class, `bending.MOST` where they never are; likewise.
        own_patch: (K,) float32, the share of each class's held-out images that a small patch for these alone moves into
            one other class, with a probability of 0.9 or more; 0 for classes that were not tried. Empty where none was,
            and in older results.
        class_names: K names.
        fingerprint: of the data set.
        settings: everything that made this result, with seed and versions; plain JSON values.
        timing: wall seconds.
    """

    verdict: Verdict
    confidence: float
    reason: str
    target_classes: tuple[int, ...]
    transitions: NDArray[np.float32]
    pull: NDArray[np.float32]
    movement: NDArray[np.float32]
    patch_success: float
    patch: NDArray[np.float32]
    images: int
    reach: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    bend: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    own_patch: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The whole result as plain JSON values."""
        names = ("verdict", "confidence", "reason", "patch_success", "images", "fingerprint", "settings", "timing")
        parts = {name: getattr(self, name) for name in (*names, *_AUDIT_ARRAYS, "target_classes", "class_names")}
        return plain({"format": _FORMAT, "kind": "audit", **parts})

    def save(self, folder: str | Path) -> Path:
        """Write `audit.json` into `folder`, whole or not at all."""
        folder = Path(folder)
        with write_atomically(folder / "audit.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> AuditResult:
        """Read what `save` wrote.

        Raises:
            ValueError: `folder` holds no audit, or one of another format.
        """
        record = _read_record(Path(folder) / "audit.json", "audit")
        values = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        try:
            for name in _AUDIT_ARRAYS:
                values[name] = np.asarray(values.get(name, []), dtype=np.float32)
            for name in ("target_classes", "class_names"):
                values[name] = tuple(values[name])
            found = cls(**values)
            if found.verdict not in get_args(Verdict) or any(k >= len(found.pull) for k in found.target_classes):
                raise TypeError(f"verdict {found.verdict!r}, target classes {found.target_classes}")
            if found.transitions.shape != (len(found.pull),) * 2:
                raise TypeError(f"transitions of shape {found.transitions.shape} for {len(found.pull)} classes")
            return found
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}/audit.json is no whole result of this version ({error}): audit again") from None

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, with the matrix of transitions."""
        from trainguard.report import build

        return build(self, path)

    def name_of(self, k: int) -> str:
        """A class for a person: `3 (cat)`."""
        named = k < len(self.class_names) and self.class_names[k] != str(k)
        return visible(f"{k} ({self.class_names[k]})") if named else str(k)

    @property
    def nearness(self) -> NDArray[np.float32]:
        """(K,) each class's `reach` over that of the median class; NaN for classes that were not tried."""
        near = np.full(len(self.pull), np.nan, dtype=np.float32)
        if (tried := self.reach > 0).any():
            near[tried] = self.reach[tried] / np.median(self.reach[tried])
        return near

    def rows(self) -> list[tuple[str, str]]:
        """The short table behind `repr`: (what, value)."""
        strongest = int(np.argmax(self.pull)) if len(self.pull) else 0
        near = self.nearness
        faint = "not looked for"
        if np.isfinite(near).any():
            k = int(np.nanargmin(near))
            faint = f"leads to class {self.name_of(k)} at {near[k]:.0%} of the usual strength"
        bent = "not looked for"
        if (tried := np.flatnonzero(self.bend)).size:
            k = int(tried[self.bend[tried].argmin()])
            least = f"{self.bend[k]:.1%} of the side"
            bent = f"leads to class {self.name_of(k)} first, by {least}" if self.bend[k] < MOST else "leads to no class"
        own = "not looked for"
        if len(self.own_patch):
            k = int(self.own_patch.argmax())
            own = f"moves {self.own_patch[k]:.0%} of class {self.name_of(k)} into one other"
        return [
            ("verdict", f"{self.verdict} (confidence {self.confidence:.2f})"),
            ("because", self.reason),
            ("target classes", listed([self.name_of(k) for k in self.target_classes]) or "none"),
            ("strongest pull", f"{self.pull[strongest]:.3f}, class {self.name_of(strongest)}"),
            ("one small patch", f"changes {self.patch_success:.0%} of the predictions"),
            ("a patch for one class", own),
            ("one faint picture", faint),
            ("bending images", bent),
            ("images", str(self.images)),
            ("seconds", f"{self.timing.get('total', float('nan')):.1f}"),
        ]

    def __repr__(self) -> str:
        return as_text("AuditResult", self.rows())

    def _repr_html_(self) -> str:
        return as_html("AuditResult", self.rows())


def check_free(path: str | Path) -> None:
    """Refuse a place where weights, or a JSON beside them, lie that are no purification's and would be lost.

    Raises:
        FileExistsError: so it is.
    """
    weights = weights_path(path)
    beside = weights.with_suffix(".json")
    if weights.exists() and not beside.exists():
        raise FileExistsError(f"{weights} holds weights of something else: name another file")
    if beside.exists() and read_record(beside).get("kind") != "purify":
        raise FileExistsError(f"{beside} holds something else and would be overwritten: name another file")


def _read_record(path: Path, kind: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass what save() was given")
    record = read_record(path)
    if record.get("kind") != kind or record.get("format") != _FORMAT:
        raise ValueError(f'{path} holds no result of kind "{kind}" in format {_FORMAT}')
    return record
