"""Hugging Face Trainer: its training loader is protected when the Trainer builds it."""

from __future__ import annotations

from typing import Any

from trainguard.guard import Guard


def protect(trainer: Any, guard: Guard | None = None, **options: Any) -> Guard:
    """Let a guard protect what a Trainer trains on; call it once, before `trainer.train()`.

    The Trainer builds its loader when training starts, before it counts steps and makes the scheduler, so that both fit
    what is kept. Screening happens there, on all processes of the Trainer together. To take up a run from a checkpoint
    without screening again, give the guard a `state_dir`.

    Args:
        trainer: a `transformers.Trainer`.
        guard: None for one with the Trainer's accelerator, number of epochs and seed.
        **options: of `Guard.protect`. With `steps="keep"` flagged samples may come back in mid-run (`guard.relabel`): a
            Trainer does not take a longer epoch.

    Returns:
        The guard; its `result` is there once training has started.
    """
    if guard is None:
        epochs = max(1, round(trainer.args.num_train_epochs))
        guard = Guard(trainer.accelerator, epochs=epochs, seed=trainer.args.seed)
    make = trainer.get_train_dataloader

    def protected_loader() -> Any:
        return guard.protect(make(), trainer.model, **options)

    trainer.get_train_dataloader = protected_loader
    return guard
