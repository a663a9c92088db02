"""What a screening has done so far, on disk: killed at any moment, it goes on from there to the same result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainguard.errors import StateError
from trainguard.files import read_record, writable_folder, write_atomically


class State:
    """A folder of finished steps; without a folder, nothing is kept.

    Args:
        folder: where; None keeps nothing.
        key: what the state is about: plain JSON values, `fingerprint` among them.
        writes: False on ranks other than 0, which read but never write.

    Raises:
        StateError: the folder cannot be written, or holds a state of other data or settings.
    """

    def __init__(self, folder: str | os.PathLike | None, key: dict[str, Any], *, writes: bool = True) -> None:
        self._folder = None if folder is None else Path(folder)
        self._writes = writes
        if self._folder is None:
            return
        header = self._folder / "screening.json"
        if header.is_file():
            _check(header, key)
        elif writes:
            writable_folder(self._folder)
            with write_atomically(header) as path:
                path.write_text(json.dumps(key, indent=1))

    def load(self, name: str) -> dict[str, Any] | None:
        """A finished step's tensors and plain values; None where it is still to do."""
        path = None if self._folder is None else self._folder / f"{name}.pt"
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            raise StateError(f"{path} cannot be read: choose another state_dir or delete it") from error

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keep a step, whole or not at all; arrays come back as tensors."""
        if self._folder is None or not self._writes:
            return
        plain = {
            k: torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for k, v in values.items()
        }
        with write_atomically(self._folder / f"{name}.pt") as path:
            torch.save(plain, path)


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
    plain = json.loads(json.dumps(key))
    if saved != plain:
        differing = sorted(k for k in saved.keys() | plain.keys() if saved.get(k) != plain.get(k))
        told = "; ".join(f"{k}: saved {saved.get(k)}, now {plain.get(k)}" for k in differing)
        raise StateError(
            f"{header.parent} holds a screening with other settings ({told}): choose another state_dir or delete it"
        )
