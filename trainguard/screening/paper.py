r"""AdvrBD as published: Algorithms 1 and 2 on the user's architecture; what the enhanced probe gets right is flagged.

The text at hand has lost its numbers; the substitutes stand in `Settings`. The paper has no verdict: a set is called
poisoned wherever a sample is flagged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from trainguard.models import UnitPixels
from trainguard.screening.consistency import consistency
from trainguard.screening.enhancement import enhancement_loss
from trainguard.screening.learning import fresh_probe, label_loss, logits, recipe_for, train
from trainguard.screening.partition import least_consistent
from trainguard.screening.pipeline import Decision, Run
from trainguard.training import Recipe, outputs, settle


def decide(run: Run) -> Decision:
    """Screen as the paper does: warm up; then four times score, partition, unlearn and relearn; then identify."""
    store, settings = run.store, run.settings
    index, labels = store.readable, store.labels
    probe: Any = fresh_probe(run, run.seed)
    if run.model is not None:
        probe = UnitPixels(run.model, store.pixel_range).to(run.device).eval()
        settle(probe, store.batch(index[:1], run.device))
        run.processes.align(probe)  # the ranks' copies may have been initialised each in its own way
    for parameter in probe.parameters():
        parameter.requires_grad_(True)
    recipe = recipe_for(run, len(index), settings.warmup_share, settings.shift)
    train(run, "warm-up", probe, index, recipe, label_loss(store))
    trusted = np.zeros(len(labels), dtype=bool)
    divergence = np.zeros(len(labels), dtype=np.float32)
    given = torch.from_numpy(labels)
    for iteration in range(1, settings.iterations + 1):
        name = f"enhancement {iteration}"
        divergence, trusted = _partitioned(run, probe, name, trusted)
        recipe = dataclasses.replace(
            Recipe(epochs=settings.unlearn_epochs, batch_size=settings.batch_size),
            rate=settings.unlearn_rate,
            weight_decay=0.0,
        )
        train(run, name, probe, index, recipe, enhancement_loss(torch.from_numpy(trusted), given))
        right = logits(run, probe, index).argmax(1) == labels[index]
        run.history[-1].update(accuracy=float(right.mean()), trusted=float(trusted[index].mean()))
    probability = outputs(lambda x: probe(x).softmax(1), probe, store, index, run.processes)
    suspect, score = np.zeros(len(labels), dtype=bool), np.full(len(labels), np.nan)
    suspect[index] = probability.argmax(1) == labels[index]
    score[index] = probability[np.arange(len(index)), labels[index]]
    counts = np.bincount(labels[suspect], minlength=store.num_classes)
    targets = tuple(int(k) for k in np.argsort(-counts) if counts[k] > 0.5 * counts.max(initial=0) and counts[k])
    return Decision(
        score=score,
        consistency=divergence,
        suspect=suspect,
        thresholds=np.full(store.num_classes, np.inf),  # which answer is the first decides, no value of its own
        proposed=labels.copy(),
        verdict="poisoned" if suspect.any() else "clean",
        confidence=0.5,
        reason=f"the enhanced probe puts {int(suspect.sum())} samples into their given class (AdvrBD has no verdict)",
        target_classes=targets,
        details={"probe_accuracy": float(suspect[index].mean())},
    )


def _partitioned(run: Run, probe: nn.Module, name: str, trusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score what is not trusted yet and move the least consistent share of the data to D_c."""
    settings, store = run.settings, run.store
    if (saved := run.state.load(f"{name} partition")) is not None:
        return saved["divergence"].numpy(), saved["trusted"].numpy()
    with run.stage("scoring"), run.progress.stage("scoring", len(store.readable)) as shown:
        divergence = consistency(
            probe,
            store,
            side=max(1, round(settings.patch_side * min(store.shape[1:]))),
            eps=settings.eps,
            steps=settings.attack_steps,
            seed=run.seed,
            processes=run.processes,
            stage=shown,
        )
    open_to = np.where(trusted, np.nan, divergence)
    rate = min(1.0, settings.partition_rate * len(store.readable) / max(1, int(np.isfinite(open_to).sum())))
    trusted = trusted.copy()
    trusted[least_consistent(open_to, rate)] = True
    run.state.save(f"{name} partition", {"divergence": divergence, "trusted": trusted})
    return divergence, trusted
