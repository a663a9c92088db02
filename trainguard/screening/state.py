"""What a screening has done so far, on disk: killed at any moment, it goes on from there to the same result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainguard.distributed import Processes
from trainguard.errors import StateError
from trainguard.files import read_record, writable_folder, write_atomically, write_for_torch

ALONE = Processes()


class State:
    """A folder of finished steps; without a folder, nothing is kept.

    Only the main process reads and writes: the others, whose disks may hold something else, are told.

    Args:
        folder: where; None keeps nothing. That of the main process counts.
        key: what the state is about: plain JSON values, `fingerprint` among them.
        processes: the ranks.

    Raises:
        StateError: the folder cannot be written, or holds a state of other data or settings.
    """

    def __init__(self, folder: str | os.PathLike | None, key: dict[str, Any], processes: Processes = ALONE) -> None:
        self._folder = None if folder is None else Path(folder)
        self._key, self._processes = json.dumps(key, indent=1), processes
        self._started, self._earlier = time.perf_counter(), 0.0
        self._told(self._prepared)

    @property
    def seconds(self) -> float:
        """Wall seconds so far, with those of killed runs up to the last step that was kept and loaded."""
        return self._earlier + time.perf_counter() - self._started

    def load(self, name: str) -> dict[str, Any] | None:
        """A finished step's tensors and plain values; None where it is still to do. All ranks call this together."""
        step = self._told(lambda: self._read(name))
        if step is None:
            return None
        self._earlier = max(self._earlier, step["seconds"])
        return step["values"]

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keep a step, whole or not at all; arrays come back as tensors."""
        if self._folder is None or not self._processes.is_main:
            return
        plain = {
            k: torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for k, v in values.items()
        }
        if not self._header.is_file():  # somebody has emptied the folder meanwhile
            self._prepared()
        step = {"key": self._key, "seconds": self.seconds, "values": plain}
        write_for_torch(self._folder / f"{name}.pt", step)

    @property
    def _header(self) -> Path:
        assert self._folder is not None
        return self._folder / "screening.json"

    def _told(self, read: Callable[[], Any]) -> Any:
        """What the main process finds, if it has a folder, on every rank; what it raises, likewise."""
        return self._processes.told(lambda: None if self._folder is None else read())

    def _prepared(self) -> None:
        if self._header.is_file():
            _check(self._header, json.loads(self._key))
            return
        writable_folder(self._header.parent)
        with write_atomically(self._header) as path:
            path.write_text(self._key)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._header.with_name(f"{name}.pt")
        if not path.is_file():
            return None
        try:
            step = torch.load(path, map_location="cpu", weights_only=True)
            saved = json.loads(step["key"])
        except Exception as error:  # a damaged file fails in many ways
            raise StateError(f"{path} cannot be read: choose another state_dir or delete it") from error
        if saved != json.loads(self._key):  # as values: the command's 1.0 is the guard's 1
            raise StateError(
                f"{path} is of a screening of other data or settings: choose another state_dir or delete it"
            )
        return step


def _check(header: Path, key: dict[str, Any]) -> None:
    try:
        saved = read_record(header)
    except ValueError as error:
        raise StateError(f"{error}; choose another state_dir or delete it") from None
    if saved.get("fingerprint") != key["fingerprint"]:
        raise StateError(
            f"{header.parent} holds a screening of other data: fingerprint {saved.get('fingerprint')}, these data have "
            f"{key['fingerprint']}: choose another state_dir or delete it"
        )
    if saved != key:
        differing = sorted(k for k in saved.keys() | key.keys() if saved.get(k) != key.get(k))
        told = "; ".join(f"{k}: saved {saved.get(k)}, now {key.get(k)}" for k in differing)
        raise StateError(
            f"{header.parent} holds a screening with other settings ({told}): choose another state_dir or delete it"
        )
