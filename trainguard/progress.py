"""How far a long step has come: a live bar on a terminal, plain lines elsewhere, silence where nobody reads."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as LiveBars
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0  # a log file of a ten-minute screening stays on one page


class Stage:
    """One long step that counts samples. Made by `Progress.stage`; call `advance` after each batch."""

    def __init__(self, name: str, total: int | None, console: Console | None, bars: LiveBars | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.figures: dict[str, object] = {}
        self._console = console
        self._bars = bars
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        if bars is not None:
            self._task = bars.add_task(name, total=total, figures="")

    def advance(self, n: int = 1, **figures: object) -> None:
        """Count `n` more samples and show the current figures.

        Args:
            n: samples finished since the last call, at least 0.
            **figures: what else to show, by name: `epoch=3, accuracy=0.91`. A figure stays until it is replaced.
        """
        self.done += n
        self.figures.update(figures)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=n, figures=shown(self.figures))
        elif self._console is not None and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print(self._line())

    @property
    def rate(self) -> float:
        """Samples a second since the stage began."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> str:
        parts = [self.name]
        if self.total:
            parts.append(f"{self.done / self.total:.0%}")
        parts.append(f"{self.rate:,.0f} samples/s")
        if self.total and self.done:
            parts.append(f"{clock((self.total - self.done) / self.rate)} left")
        return ", ".join([*parts, shown(self.figures)] if self.figures else parts)

    def _finish(self, failed: bool) -> None:
        seconds = time.monotonic() - self._start
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
        if self._console is not None:
            end = "stopped after" if failed else "done in"
            figures = f", {shown(self.figures)}" if self.figures else ""
            self._print(f"{self.name}: {end} {clock(seconds)}, {self.done:,} samples{figures}")

    def _print(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines(Console):
    """A console that falls silent where nobody reads any more: the work goes on."""

    def on_broken_pipe(self) -> None:
        """In the place of rich's way, which ends the program."""
        self.quiet = True


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all: by its group, before there is one by what launchers set."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


class Progress:
    """Shows the stages of one long call.

    Args:
        enabled: False shows nothing. Ranks other than 0 show nothing either way.
        stream: where to write; standard error unless told, so that a command's own output can be piped.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        enabled = enabled and is_first_rank()
        self._console = Lines(file=stream or sys.stderr) if enabled else None
        self._bars: LiveBars | None = None

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Open a stage; it is closed with a line that says how long it took. Stages may be nested.

        Args:
            name: what is being done, for a person: `"probe"`, `"scoring"`.
            total: how many samples the stage will count in all its epochs; None where nobody knows.
        """
        opened = self._console is not None and self._console.is_terminal and self._bars is None
        if opened:
            self._bars = _live_bars(self._console)
            self._bars.start()
        stage = Stage(name, total, self._console, self._bars)
        failed = True
        try:
            yield stage
            failed = False
        finally:
            stage._finish(failed)
            if opened and self._bars is not None:
                self._bars.stop()
                self._bars = None


class _Rate(ProgressColumn):
    """Samples a second over the last moments."""

    def render(self, task: Task) -> Text:
        """The rate, or nothing before the first batch."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} samples/s" if speed else "", style="progress.data.speed")


def _live_bars(console: Console | None) -> LiveBars:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    return LiveBars(*columns, console=console, transient=True)


def shown(figures: dict[str, object]) -> str:
    """Figures as one short line: floats with three digits, the rest as they are."""
    return "  ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )


def clock(seconds: float) -> str:
    """A duration for a person: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
