import io
import os

import pytest

from trainguard import progress as progress_module
from trainguard.progress import Progress, clock, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_writes_plain_lines(monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with Progress(stream=stream).stage("probe", total=200) as stage:
        stage.advance(100, epoch=1, accuracy=0.5)
        stage.advance(100, epoch=2)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("probe, 50%, ") and lines[0].endswith("epoch 1  accuracy 0.500")
    assert " samples/s, " in lines[0] and " left, " in lines[0]
    assert lines[1].endswith("epoch 2  accuracy 0.500")
    assert lines[2] == "probe: done in 0 s, 200 samples, epoch 2  accuracy 0.500"
    assert "\x1b" not in stream.getvalue()


def test_progress_without_a_terminal_is_sparing_with_lines():
    stream = io.StringIO()
    with Progress(stream=stream).stage("scoring", total=1000) as stage:
        for _ in range(1000):
            stage.advance(1)
    assert stream.getvalue() == "scoring: done in 0 s, 1,000 samples\n"


def test_progress_on_a_terminal_draws_a_bar_with_figures(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.stage("probe", total=10) as stage:
        stage.advance(10, epoch=3)
        assert progress._bars is not None
        progress._bars.refresh()
    text = stream.getvalue()
    assert "\x1b" in text and "100%" in text and "epoch 3" in text
    assert "probe: done in 0 s, 10 samples" in text


def test_progress_nested_stages_share_one_display(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.stage("drill", total=2) as outer, progress.stage("probe") as inner:
        inner.advance(5)
        outer.advance(1)
    assert progress._bars is None
    assert "probe: done" in stream.getvalue() and "drill: done" in stream.getvalue()


def test_progress_disabled_writes_nothing():
    stream = io.StringIO()
    with Progress(enabled=False, stream=stream).stage("probe", total=2) as stage:
        stage.advance(2, loss=1.0)
    assert stage.done == 2
    assert stream.getvalue() == ""


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])  # torchrun sets both, Lightning's launcher the second
def test_progress_off_rank_zero_writes_nothing(variable, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    stream = io.StringIO()
    with Progress(stream=stream).stage("probe", total=2) as stage:
        stage.advance(2)
    assert stream.getvalue() == ""


def test_progress_says_when_a_stage_failed():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(stream=stream).stage("probe", total=2) as stage:
        stage.advance(1)
        raise RuntimeError("stop")
    assert stream.getvalue() == "probe: stopped after 0 s, 1 samples\n"


def test_progress_treats_markup_in_names_as_text():
    stream = io.StringIO()
    with Progress(stream=stream).stage("[red]x[/red]", total=1) as stage:
        stage.advance(1, note="[bold]")
    assert "[red]x[/red]" in stream.getvalue() and "[bold]" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (-1, "0 s")]
)
def test_clock_reads_like_a_person(seconds, text):
    assert clock(seconds) == text


def test_shown_rounds_floats_only():
    assert shown({"epoch": 3, "loss": 0.12345, "stage": "probe"}) == "epoch 3  loss 0.123  stage probe"


def test_work_goes_on_where_nobody_reads_any_more():
    out, into = os.pipe()
    os.close(out)
    with os.fdopen(into, "w", buffering=1) as stream:
        with Progress(stream=stream).stage("probe", total=1) as stage:
            stage.advance(1)
        with Progress(stream=stream).stage("scoring", total=1) as stage:
            stage.advance(1)
        assert stage.done == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), into)  # or closing it would raise
