"""Lightning: a training loader is protected when the Trainer asks for it, and the guard goes into the checkpoints."""

from __future__ import annotations

from typing import Any

from lightning import LightningDataModule, LightningModule

from trainguard.errors import DataError
from trainguard.guard import Guard, batches_of

KEY = "trainguard"  # in the data module's part of a checkpoint
UNGUARDED = "_unguarded"  # attribute with a data module's own hooks


def protect(
    data: Any, model: Any = None, guard: Guard | None = None, *, val_dataloaders: Any = None, **options: Any
) -> LightningDataModule:
    """Let a guard protect what a Lightning Trainer trains on: `trainer.fit(model, protect(data, model))`.

    Lightning asks for the loader after it has read the checkpoint that it resumes from and before it counts steps, so
    that schedules fit what is kept, and a resumed run does not screen again. Screening is shared among the Trainer's
    processes.

    Args:
        data: a torch `DataLoader`, or a `LightningDataModule`, whose hooks are changed in place. One that a guard
            protects already is protected by this one instead.
        model: see `Guard.protect`.
        guard: None for one with the Trainer's number of epochs.
        val_dataloaders: loaders to validate on, left as they are: beside a data module `trainer.fit` takes none.
        **options: of `Guard.protect`. With `steps="keep"` flagged samples may come back in mid-run (`guard.relabel`):
            Lightning does not take a longer epoch.

    Returns:
        The data module; the guard is its attribute `guard`.

    Raises:
        DataError: neither a loader nor a data module, or a data module and loaders beside it.
    """
    if isinstance(data, LightningModule):
        raise DataError(
            f"{type(data).__name__} is a model: pass the loader that it trains on, protect(model.train_dataloader()), "
            "or a LightningDataModule"
        )
    if not isinstance(data, LightningDataModule):
        module: LightningDataModule = _Loader(data) if val_dataloaders is None else _Loaders(data, val_dataloaders)
    elif val_dataloaders is None:
        module = data
    else:
        raise DataError("val_dataloaders= is for a loader: a LightningDataModule has its own val_dataloader()")
    own = module.train_dataloader, module.state_dict, module.load_state_dict
    own = vars(module).setdefault(UNGUARDED, own)  # protected once more: by this guard alone
    watch = module.guard = guard or Guard()  # type: ignore[attr-defined]
    hooks = _Hooks(module, own, watch, model, options)
    vars(module).update({name: getattr(hooks, name) for name in ("train_dataloader", "state_dict", "load_state_dict")})
    return module


class _Hooks:
    """A data module's hooks with a guard before its own ones; in a class, for strategies that pickle them.

    Args:
        module: the data module.
        own: its `train_dataloader`, `state_dict` and `load_state_dict`.
        guard: before them.
        model: of `Guard.protect`.
        options: likewise.
    """

    def __init__(self, module: LightningDataModule, own: tuple, guard: Guard, model: Any, options: dict) -> None:
        self._module = module
        self._make, self._state, self._load = own
        self._guard = guard
        self._model = model
        self._options = options

    def train_dataloader(self) -> Any:
        trainer, loader = self._module.trainer, self._make()
        if trainer is not None:
            self._guard.adopt(_Ranks(trainer), _epochs(trainer, loader))
        return self._guard.protect(loader, self._model, **self._options)

    def state_dict(self) -> dict[str, Any]:
        return {**self._state(), KEY: self._guard.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        own = {name: value for name, value in saved.items() if name != KEY}
        if KEY in saved:
            self._guard.load_state_dict(saved[KEY])
        if own:
            self._load(own)


def _epochs(trainer: Any, loader: Any) -> int | None:
    """How long a training will be, about, by `max_epochs` or `max_steps`, whichever comes first; None for no end."""
    most = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
    batches = batches_of(loader)
    if trainer.max_steps <= 0 or not batches:
        return most
    reached = max(1, round(trainer.max_steps * trainer.accumulate_grad_batches * trainer.world_size / batches))
    return reached if most is None else min(most, reached)


class _Loader(LightningDataModule):
    """A data module with one loader."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._loader = loader

    def train_dataloader(self) -> Any:
        return self._loader


class _Loaders(_Loader):
    """A data module with one loader, and others to validate on."""

    def __init__(self, loader: Any, others: Any) -> None:
        super().__init__(loader)
        self._others = others

    def val_dataloader(self) -> Any:
        return self._others


class _Ranks:
    """The processes of a Lightning Trainer, named as accelerate names them."""

    def __init__(self, trainer: Any) -> None:
        self.process_index = trainer.global_rank
        self.num_processes = trainer.world_size
        self.device = trainer.strategy.root_device
