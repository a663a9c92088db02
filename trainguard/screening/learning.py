r"""Training a probe within a screening: seeded epoch by epoch, kept epoch by epoch, so that a kill costs one epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.models import load_tensors, tensors_of
from trainguard.rng import seed_devices
from trainguard.screening.pipeline import Run
from trainguard.screening.probe import Probe
from trainguard.training import Recipe, at_once, batches, outputs, run_epoch

BATCHES = 48  # of one pass over a small data set, about
DOMINANT = 0.8  # share of one class from which a probe must be told to look for the others
MEASURED = 2000  # images that the spread of pixels is taken from; of large ones fewer
USUAL_PASSES = 8  # of a warm-up; with more of them images are moved further, lest they are learned by heart

Loss = Callable[[Tensor, np.ndarray], Tensor]


def fresh_probe(run: Run, seed: int) -> Probe:
    """A probe with seeded weights, on the run's device."""
    index = np.random.default_rng(0).permutation(run.store.readable)
    some = run.store.batch(index[: at_once(run.store.shape, MEASURED)])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        probe = Probe(run.store.shape, run.store.num_classes, some.mean((0, 2, 3)), some.std((0, 2, 3)))
    return probe.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def recipe_for(run: Run, samples: int, share: float, shift: float) -> Recipe:
    """How a probe learns: for a share of what may be spent, but long enough to learn and no longer than need be.

    Args:
        run: the screening.
        samples: that it learns from.
        share: of what may be spent.
        shift: random translation, as a share of the side; more, up to `settings.shift`, where passes are many.
    """
    settings = run.settings
    size = int(np.clip(2 ** round(np.log2(max(1, samples / BATCHES))), 16, settings.batch_size))
    steps = max(1, samples // size)
    epochs = round(share * run.spend * len(run.store.readable) / samples)
    seen = min(settings.least_epochs, math.ceil(settings.least_seen / samples))
    least = max(seen, math.ceil(settings.least_steps / steps))
    epochs = int(np.clip(epochs, least, max(2, settings.most_steps // steps)))
    epochs = max(2, epochs)
    shift = max(shift, min(settings.shift, shift * epochs / USUAL_PASSES))
    return Recipe(epochs=epochs, batch_size=size, rate=0.2 * (size / 128) ** 0.5, shift=shift)


def shares(store: ImageStore, index: np.ndarray) -> np.ndarray:
    """(K,) the logarithms of the classes' shares of the samples `index`; of one without any as if it had one."""
    return np.log(np.maximum(np.bincount(store.labels[index], minlength=store.num_classes), 1) / len(index))


def is_dominated(store: ImageStore, index: np.ndarray) -> bool:
    """Whether one class is so much of the samples that a probe may learn to name it always, and nothing else."""
    return bool(np.bincount(store.labels[index]).max() > DOMINANT * len(index))


def label_loss(store: ImageStore, often: np.ndarray | None = None) -> Loss:
    """Cross-entropy to the given labels.

    Args:
        store: the images.
        often: (K,) added to the logits: of the classes' `shares`, what is learned are answers as if all classes had as
            many samples (logit adjustment, Menon et al. 2021).
    """
    labels = torch.from_numpy(store.labels)
    added = None if often is None else torch.from_numpy(often).float()

    def loss(logits: Tensor, index: np.ndarray) -> Tensor:
        given = labels[torch.from_numpy(index)].to(logits.device)
        return F.cross_entropy(logits if added is None else logits + added.to(logits.device), given)

    return loss


def train(run: Run, name: str, model: nn.Module, index: np.ndarray, recipe: Recipe, loss: Loss | None = None) -> None:
    """Train `model` on the samples `index`, resuming where a killed run stopped.

    Args:
        run: the screening.
        name: of the stage; also of its file in the state folder.
        model: changed in place.
        index: (M,) int64.
        recipe: how.
        loss: None for cross-entropy to the given labels, adjusted where one class is most of the samples.

    Raises:
        ModelError: the loss is not finite any more.
    """
    loss = loss or label_loss(run.store, shares(run.store, index) if is_dominated(run.store, index) else None)
    optimizer, first = recipe.optimizer(model), 0
    if (saved := run.state.load(name)) is not None:
        load_tensors(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epochs"]
        for row in saved["rows"]:
            if run.epoch_done(**row):
                first = recipe.epochs
    rows = [row for row in run.history if row["stage"] == name]
    with run.stage(name), run.progress.stage(name, (recipe.epochs - first) * len(index)) as shown:
        for epoch in range(first, recipe.epochs):
            seed = run.seed * 7919 + epoch * 101 + sum(name.encode())
            generator = torch.Generator().manual_seed(seed)
            seed_devices(seed + run.processes.rank)  # of a user's own network: dropout, stochastic depth
            plan = list(batches(index, recipe.batch_size, generator))
            total = recipe.epochs * len(plan)
            rates = [recipe.rate_at((epoch * len(plan) + step) / total) for step in range(len(plan))]
            mean = run_epoch(
                model,
                optimizer,
                plan,
                run.store,
                loss,
                rates,
                shift=recipe.shift,
                generator=generator,
                processes=run.processes,
                stage=shown,
            )
            if not math.isfinite(mean):
                raise ModelError(
                    f"training diverged in epoch {epoch + 1} of {name}: the loss is {mean}; a network that does not "
                    "take these rates can be screened for by the default preset, whose probe is our own"
                )
            row = {"stage": name, "epoch": epoch + 1, "loss": mean}
            shown.advance(0, epoch=epoch + 1, loss=mean)
            rows.append(row)
            run.state.save(
                name,
                {
                    "model": tensors_of(model),
                    "optimizer": optimizer.state_dict(),
                    "epochs": epoch + 1,
                    "rows": rows,
                },
            )
            if run.epoch_done(**row):
                break


def logits(run: Run, model: nn.Module, index: np.ndarray) -> np.ndarray:
    """(M, K) float32 logits of the samples `index`."""
    return outputs(model, model, run.store, index, run.processes)
