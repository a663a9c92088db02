"""Hugging Face Trainer: its training loader is protected when the Trainer builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trainguard.files import write_for_torch
from trainguard.guard import Guard, batches_of

STATE_FILE = "trainguard.pt"  # in each of the Trainer's checkpoints
UNGUARDED = "_unguarded"  # attribute with a Trainer's own methods


def protect(trainer: Any, guard: Guard | None = None, **options: Any) -> Guard:
    """Let a guard protect what a Trainer trains on; call it before `trainer.train()`.

    The Trainer builds its loader when training starts, before it counts steps and makes the scheduler, so that both fit
    what is kept. Screening happens there, on all processes of the Trainer together. The guard's state goes into the
    Trainer's checkpoints: `trainer.train(resume_from_checkpoint=...)` takes it up, and does not screen again.

    Args:
        trainer: a `transformers.Trainer`. One that a guard protects already is protected by this one instead.
        guard: takes the Trainer's processes and number of epochs where it was given none; None for one with the
            Trainer's seed as well.
        **options: of `Guard.protect`. With `steps="keep"` flagged samples may come back in mid-run (`guard.relabel`): a
            Trainer does not take a longer epoch.

    Returns:
        The guard; its `result` is there once training has started.
    """
    if guard is None:
        guard = Guard(seed=trainer.args.seed)
    own = trainer.get_train_dataloader, trainer.train
    make, train = vars(trainer).setdefault(UNGUARDED, own)  # protected once more: by this guard alone

    def protected_loader() -> Any:
        loader = make()
        guard.adopt(trainer.accelerator, _epochs(trainer.args, loader))
        return guard.protect(loader, trainer.model, **options)

    def resumed(resume_from_checkpoint: str | bool | None = None, *arguments: Any, **others: Any) -> Any:
        if resume_from_checkpoint is True:
            folder = get_last_checkpoint(trainer.args.output_dir)
        else:
            folder = resume_from_checkpoint or None
        if folder is not None and (saved := Path(folder) / STATE_FILE).exists():
            guard.load_state_dict(torch.load(saved, weights_only=True))
        return train(resume_from_checkpoint, *arguments, **others)

    trainer.get_train_dataloader, trainer.train = protected_loader, resumed
    trainer.remove_callback(_Saved)
    trainer.add_callback(_Saved(guard))
    return guard


def _epochs(args: Any, loader: Any) -> int | None:
    """How long a training will be, about: `max_steps` counts where it is given; None where that says nothing."""
    if args.max_steps <= 0:
        return max(1, round(args.num_train_epochs))
    batches = batches_of(loader)
    if not batches:
        return None
    return max(1, round(args.max_steps * args.gradient_accumulation_steps / batches))


class _Saved(TrainerCallback):
    """Puts a guard's state into the checkpoints that a Trainer writes."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.exists():
            write_for_torch(folder / STATE_FILE, self._guard.state_dict())
