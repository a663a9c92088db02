import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from flagged import SCREENING, result_for
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainguard
from trainguard import Guard
from trainguard.integrations.tensorboard_log import TensorBoard
from trainguard.screening.settings import PRESETS, Settings

FLAGGED = [2, 5, 11]


def data():
    images = torch.from_numpy(np.random.default_rng(0).random((60, 3, 16, 16), dtype=np.float32))
    return TensorDataset(images, torch.arange(60) % 3)


class Notebook(GeneralTracker):
    """An accelerate tracker that keeps what it is given."""

    name, requires_logging_directory = "notebook", False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.lines.append((values, step))


def test_the_guard_s_figures_reach_accelerate_s_trackers(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(SCREENING, lambda images, *_, **__: result_for(images, FLAGGED))
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
    accelerator.init_trackers("run")
    guard = Guard(accelerator, progress=False)
    guard.protect(DataLoader(data(), batch_size=8))
    guard.relabel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)))
    (found, first), (back, later) = notebook.lines
    assert found["trainguard/flagged"] == 3 and found["trainguard/flagged_share"] == pytest.approx(0.05)
    assert found["trainguard/poisoned"] == 1 and first == 0
    assert back["trainguard/relabelled"] == 3 and 0 <= back["trainguard/labels_changed"] <= 3 and later is None


def test_without_trackers_nothing_is_logged(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(SCREENING, lambda images, *_, **__: result_for(images, FLAGGED))
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "log", lambda *_, **__: pytest.fail("logged"))
    Guard(accelerator, progress=False).protect(DataLoader(data(), batch_size=8))


SHORT = Settings(default_epochs=0.2, least_steps=8, least_epochs=0, most_steps=8, least_members=8)


def test_tensorboard_files_hold_every_probe_epoch_and_the_result(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setitem(PRESETS, "default", SHORT)
    result = trainguard.screen(data(), callbacks=[TensorBoard(tmp_path)], progress=False)
    seen = events.EventAccumulator(str(tmp_path))
    seen.Reload()
    losses = [event.value for event in seen.Scalars("trainguard/warm-up/loss")]
    expected = [row["loss"] for row in result.history if row["stage"] == "warm-up"]
    assert expected and losses == pytest.approx(expected)
    assert [event.value for event in seen.Scalars("trainguard/flagged")] == [result.suspect.sum()]
    assert [event.step for event in seen.Scalars("trainguard/flagged_by_class")] == [0, 1, 2]
    assert "trainguard/score" in seen.Tags()["histograms"]
    text = seen.Tensors("trainguard/verdict/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == f"{result.verdict}: {result.reason}"


def test_a_writer_of_the_user_stays_open(tmp_path):
    class Writer:
        def __init__(self):
            self.names = []

        def __getattr__(self, name):
            assert name != "close"
            return lambda *values: self.names.append((name, *values[:1]))

    writer = Writer()
    callback = TensorBoard(writer)
    callback.on_probe_epoch_end(stage="relearn", epoch=1, loss=0.5)
    images = type("Images", (), {"__len__": lambda _: 60, "labels": np.arange(60) % 3, "num_classes": 3})()
    images.unreadable, images.class_names, images.fingerprint = (), ("a", "b", "c"), ""
    callback.on_result(result_for(images, FLAGGED))
    assert ("add_scalar", "trainguard/relearn/loss") in writer.names and ("flush",) in writer.names


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_only_the_main_process_writes_event_files(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    ear = TensorBoard(tmp_path / "other")
    ear.on_probe_epoch_end("warm-up", epoch=1, loss=0.5)
    assert not (tmp_path / "other").exists()
    monkeypatch.setenv("RANK", "0")
    TensorBoard(tmp_path / "main").on_probe_epoch_end("warm-up", epoch=1, loss=0.5)
    assert list((tmp_path / "main").iterdir())
