"""Lightning: a training loader is protected when the Trainer asks for it, and the guard goes into the checkpoints."""

from __future__ import annotations

from typing import Any

from lightning import LightningDataModule

from trainguard.guard import Guard

KEY = "trainguard"  # in the data module's part of a checkpoint


def protect(data: Any, model: Any = None, guard: Guard | None = None, **options: Any) -> LightningDataModule:
    """Let a guard protect what a Lightning Trainer trains on: `trainer.fit(model, protect(data, model))`.

    Lightning asks for the loader after it has read the checkpoint that it resumes from and before it counts steps, so
    that schedules fit what is kept, and a resumed run does not screen again. Screening is shared among the Trainer's
    processes.

    Args:
        data: a torch `DataLoader`, or a `LightningDataModule`, whose hooks are changed in place.
        model: see `Guard.protect`.
        guard: None for one with the Trainer's number of epochs.
        **options: of `Guard.protect`. With `steps="keep"` flagged samples may come back in mid-run (`guard.relabel`):
            Lightning does not take a longer epoch.

    Returns:
        The data module; the guard is its attribute `guard`.
    """
    module = data if isinstance(data, LightningDataModule) else _Loader(data)
    make, state, load = module.train_dataloader, module.state_dict, module.load_state_dict
    watch = module.guard = guard or Guard()  # type: ignore[attr-defined]

    def train_dataloader() -> Any:
        trainer = module.trainer
        if trainer is not None:
            watch.adopt(_Ranks(trainer), trainer.max_epochs)
        return watch.protect(make(), model, **options)

    def state_dict() -> dict[str, Any]:
        return {**state(), KEY: watch.state_dict()}

    def load_state_dict(saved: dict[str, Any]) -> None:
        own = {name: value for name, value in saved.items() if name != KEY}
        if KEY in saved:
            watch.load_state_dict(saved[KEY])
        if own:
            load(own)

    vars(module).update(train_dataloader=train_dataloader, state_dict=state_dict, load_state_dict=load_state_dict)
    return module


class _Loader(LightningDataModule):
    """A data module with one loader."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._loader = loader

    def train_dataloader(self) -> Any:
        return self._loader


class _Ranks:
    """The processes of a Lightning Trainer, named as accelerate names them."""

    def __init__(self, trainer: Any) -> None:
        self.process_index = trainer.global_rank
        self.num_processes = trainer.world_size
        self.device = trainer.strategy.root_device
