"""Hugging Face Trainer and Lightning: lengths, schedules, and runs that go on from a checkpoint."""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from flagged import SCREENING, result_for
from torch import nn
from torch.utils.data import DataLoader
from two_processes import FLAGGED, SIZE, Numbered

from trainguard import Guard
from trainguard.errors import DataError

KEPT = [i for i in range(SIZE) if i not in FLAGGED]
STEPS = math.ceil(len(KEPT) / 8)


@pytest.fixture
def screened(monkeypatch):
    """How each screening was called; `FLAGGED` is what it finds."""
    calls = []

    def screen_images(images, model=None, **options):
        calls.append(options)
        return result_for(images, FLAGGED)

    monkeypatch.setattr(SCREENING, screen_images)
    return calls


class Network(nn.Module):
    """As Trainer wants it: the loss first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 16 * 16, 3)
        self.rows = []

    def forward(self, pixels, labels=None, row=None):
        logits = self.layer(pixels.flatten(1))
        if labels is None:
            return {"logits": logits}
        self.rows += row.tolist()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Columns(Numbered):
    def __getitem__(self, index):
        pixels, label, row = super().__getitem__(index)
        return {"pixels": pixels, "labels": label, "row": row}


def hf_run(out, *, stop=None, resume=None, epochs=3, guard=None, max_steps=-1):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'trainguard[hosts]'")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == stop
            control.should_save = state.global_step == stop

    settings = transformers.TrainingArguments(
        str(out),
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Network()
    trainer = transformers.Trainer(model, settings, train_dataset=Columns(), callbacks=[Stop()])
    guard = hf_protect(trainer, guard)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, guard


def test_a_trainer_s_steps_and_schedule_fit_what_is_kept(screened, tmp_path):
    trainer, guard = hf_run(tmp_path)
    assert trainer.state.global_step == 3 * STEPS and trainer.lr_scheduler.get_last_lr()[0] == 0
    assert sorted(trainer.model.rows) == sorted(3 * KEPT)
    assert len(screened) == 1 and screened[0]["epochs"] == 3 and guard.result.verdict == "poisoned"


@pytest.mark.parametrize("how", ["path", "last"])
def test_a_trainer_s_run_goes_on_from_its_checkpoint_without_another_screening(how, screened, tmp_path):
    whole, _ = hf_run(tmp_path / "whole")
    hf_run(tmp_path / "stopped", stop=STEPS + 4)
    calls = len(screened)
    resume = True if how == "last" else str(tmp_path / "stopped" / f"checkpoint-{STEPS + 4}")
    resumed, guard = hf_run(tmp_path / "stopped", resume=resume)
    assert len(screened) == calls and guard.result.keep.tolist() == KEPT
    assert resumed.model.rows == whole.model.rows[len(KEPT) + 4 * 8 :]
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)


def test_a_trainer_s_checkpoint_of_an_unguarded_run_is_screened_for(screened, tmp_path):
    hf_run(tmp_path, stop=4)
    (tmp_path / "checkpoint-4" / "trainguard.pt").unlink()
    _, guard = hf_run(tmp_path, resume=True)
    assert len(screened) == 2 and guard.result.keep.tolist() == KEPT


def test_a_trainer_that_is_protected_again_has_the_later_guard_alone(screened, tmp_path):
    first, second = Guard(epochs=9, progress=False), Guard(epochs=7, progress=False)
    trainer, _ = hf_run(tmp_path, guard=first, epochs=1)
    assert hf_protect(trainer, second) is second
    trainer.train()
    assert [call["epochs"] for call in screened] == [9, 7] and second.result is not None
    assert sum(type(each).__name__ == "_Saved" for each in trainer.callback_handler.callbacks) == 1


def hf_protect(trainer, guard):
    from trainguard.integrations.hf_trainer import protect

    return protect(trainer, guard, label_column="labels", image_column="pixels")


def test_a_trainer_that_trains_twice_screens_once(screened, tmp_path):
    trainer, _ = hf_run(tmp_path, epochs=1)
    trainer.train()
    assert len(screened) == 1 and sorted(trainer.model.rows) == sorted(2 * KEPT)


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", reason="needs lightning: pip install 'trainguard[hosts]'")


def lightning_run(lightning, data, *, epochs=3, stop=-1, resume=None, save=None, **options):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def training_step(self, batch, index):
            pixels, labels, rows = batch
            return self.network(pixels, labels, rows)["loss"]

        def validation_step(self, batch, index):
            assert not self.training

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_stopping(lightning, stop)],
        **options,
    )
    model = Classifier()
    trainer.fit(model, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer, model.network


def _stopping(lightning, epoch):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == epoch

    return Stop()


def in_order():
    return DataLoader(Numbered(), batch_size=8)


def own_module(lightning):
    class Own(lightning.LightningDataModule):
        def setup(self, stage):
            self.ready = True

        def train_dataloader(self):
            assert self.ready
            return in_order()

        def state_dict(self):
            return {"mine": 7}

        def load_state_dict(self, state):
            self.mine = state["mine"]

    return Own()


@pytest.mark.parametrize("form", ["loader", "module"])
def test_lightning_s_steps_and_schedule_fit_what_is_kept_and_a_run_goes_on(form, lightning, screened, tmp_path):
    from trainguard.integrations.lightning_fit import protect

    def data():
        return protect(own_module(lightning) if form == "module" else in_order())

    trainer, whole = lightning_run(lightning, data())
    assert trainer.global_step == 3 * STEPS and whole.rows == 3 * KEPT
    assert len(screened) == 1 and screened[0]["epochs"] == 3
    lightning_run(lightning, data(), stop=0, save=tmp_path / "stopped.ckpt")
    calls = len(screened)
    guarded = data()
    _, resumed = lightning_run(lightning, guarded, resume=tmp_path / "stopped.ckpt")
    assert len(screened) == calls and guarded.guard.result.keep.tolist() == KEPT
    assert getattr(guarded, "mine", 7) == 7 and hasattr(guarded, "mine") == (form == "module")
    assert resumed.rows == 2 * KEPT
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("form", ["loader", "module"])
def test_lightning_builds_a_loader_anew_with_what_is_kept(form, lightning, screened):
    """As it does where it exchanges the sampler: it wrote down what a loader in a hook was built with."""
    from trainguard.integrations.lightning_fit import protect

    def shuffled():
        return DataLoader(Numbered(), batch_size=8, shuffle=True)

    class Own(lightning.LightningDataModule):
        def train_dataloader(self):
            return shuffled()

    data = protect(Own() if form == "module" else shuffled())
    _, network = lightning_run(lightning, data, epochs=1, overfit_batches=1.0)
    assert sorted(network.rows) == KEPT


def test_a_protected_data_module_can_be_pickled(lightning, screened):
    """As strategies that spawn their processes need it."""
    from trainguard.integrations.lightning_fit import protect

    data = pickle.loads(pickle.dumps(protect(in_order(), guard=Guard(epochs=5, progress=False))))
    _, network = lightning_run(lightning, data, epochs=1)
    assert network.rows == KEPT and data.guard.result.keep.tolist() == KEPT


def test_a_stream_is_refused_with_a_reason_where_its_length_is_asked_for(lightning, screened, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'trainguard[hosts]'")
    from trainguard.integrations import hf_trainer, lightning_fit

    stream = datasets.Dataset.from_dict({"x": [1, 2, 3]}).to_iterable_dataset()
    settings = transformers.TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(Network(), settings, train_dataset=stream)
    hf_trainer.protect(trainer)
    with pytest.raises(DataError, match="streaming=False"):
        trainer.train()
    with pytest.raises(DataError, match="iterable"):
        lightning_run(lightning, lightning_fit.protect(DataLoader(stream)), epochs=-1, max_steps=3)


def test_lightning_may_build_its_loader_every_epoch(lightning, screened):
    from trainguard.integrations.lightning_fit import protect

    _, network = lightning_run(lightning, protect(own_module(lightning)), reload_dataloaders_every_n_epochs=1)
    assert len(screened) == 1 and network.rows == 3 * KEPT


def test_a_data_module_that_is_protected_again_has_the_later_guard_alone(lightning, screened):
    from trainguard.integrations.lightning_fit import protect

    data = own_module(lightning)
    first, second = Guard(epochs=9, progress=False), Guard(epochs=7, progress=False)
    _, network = lightning_run(lightning, protect(protect(data, guard=first), guard=second), epochs=1)
    assert [call["epochs"] for call in screened] == [7] and network.rows == KEPT
    assert data.guard is second and first.result is None and data.state_dict().keys() == {"mine", "trainguard"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loader", "module"])
def test_two_lightning_processes_keep_what_rank_0_decides(form, lightning, tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent.parent)}
    done = subprocess.run(
        [*command, str(here / "lightning_ranks.py"), str(tmp_path), form],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [rank["keep"] for rank in ranks] == [KEPT, KEPT]
    assert sorted(row for rank in ranks for row in rank["rows"]) == KEPT  # 96: no sample twice to make ranks even


def test_lightning_keeps_what_the_user_said(lightning, screened):
    from trainguard.integrations.lightning_fit import protect

    guard = Guard(epochs=9, progress=False)
    data = protect(in_order(), guard=guard, steps="keep")
    trainer, network = lightning_run(lightning, data, epochs=1)
    assert data.guard is guard and screened[0]["epochs"] == 9
    assert trainer.global_step == math.ceil(SIZE / 8) and set(network.rows) == set(KEPT)


def test_lightning_validates_on_the_loader_that_is_given_beside(lightning, screened):
    from trainguard.integrations.lightning_fit import protect

    held = DataLoader(Numbered(), batch_size=50)
    data = protect(in_order(), val_dataloaders=held)
    assert data.val_dataloader() is held
    trainer, network = lightning_run(lightning, data, epochs=1)
    assert network.rows == KEPT and trainer.val_dataloaders is held
    with pytest.raises(DataError, match="a LightningDataModule has its own"):
        protect(own_module(lightning), val_dataloaders=held)
    with pytest.raises(DataError, match="is a model: pass the loader"):
        protect(trainer.lightning_module)


@pytest.mark.parametrize(
    ("epochs", "steps", "loader", "expected"),
    [
        (3, -1, range(10), 3),
        (-1, 100, range(10), 40),
        (None, 100, range(10), 40),
        (3, 100, range(10), 3),
        (50, 1, range(10), 1),
        (-1, 100, iter(range(10)), None),
        (-1, -1, range(10), None),
    ],
)
def test_lightning_says_how_long_training_will_be(epochs, steps, loader, expected):
    pytest.importorskip("lightning", reason="needs lightning: pip install 'trainguard[hosts]'")
    from trainguard.integrations.lightning_fit import _epochs

    trainer = SimpleNamespace(max_epochs=epochs, max_steps=steps, accumulate_grad_batches=2, world_size=2)
    assert _epochs(trainer, loader) == expected


def test_a_trainer_that_counts_steps_says_how_many_epochs_they_are(screened, tmp_path):
    hf_run(tmp_path, max_steps=50)
    assert screened[0]["epochs"] == round(50 * 8 / SIZE)
