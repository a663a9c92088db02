"""TensorBoard: what a screening does and finds, beside the figures of the training that it protects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainguard.progress import is_first_rank
from trainguard.results import ScreenResult


class TensorBoard:
    """A callback for `Guard` and `screen` that writes a screening to TensorBoard.

    Written are the loss and the other figures of every probe epoch, by stage; the result's figures; flagged samples by
    class; the histogram of the scores; and the verdict with its reason as text.

    Args:
        where: folder of the event files, which the main process writes; or a `torch.utils.tensorboard.SummaryWriter` of
            yours, which stays open.

    Raises:
        ImportError: `where` is a folder and TensorBoard is not installed.
    """

    def __init__(self, where: str | Path | Any) -> None:
        self._own = isinstance(where, (str, Path))
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard is not installed: pip install tensorboard") from error
            where = SummaryWriter(str(where)) if is_first_rank() else _Silent()  # type: ignore[no-untyped-call]
        self.writer: Any = where
        self._epochs: dict[str, int] = {}

    def on_probe_epoch_end(self, stage: str = "probe", **figures: Any) -> None:
        """Write one probe epoch."""
        step = self._epochs[stage] = self._epochs.get(stage, 0) + 1
        for name, value in figures.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(f"trainguard/{stage}/{name}", value, step)

    def on_result(self, result: ScreenResult) -> None:
        """Write what was found, and close the files where they are this callback's own."""
        for name, value in result.figures().items():
            self.writer.add_scalar(name, value, 0)
        counts = np.bincount(result.labels[result.suspect], minlength=len(result.class_names))
        for label, count in enumerate(counts):
            self.writer.add_scalar("trainguard/flagged_by_class", int(count), label)
        scores = result.score[np.isfinite(result.score)]
        if len(scores):
            self.writer.add_histogram("trainguard/score", scores, 0)
        self.writer.add_text("trainguard/verdict", f"{result.verdict}: {result.reason}", 0)
        self.writer.flush()
        if self._own:
            self.writer.close()


class _Silent:
    """A writer that writes nothing: the other processes see the same screening."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
