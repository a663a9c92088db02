r"""The rounds of PBE Algorithm 1: steps 1, 2 and 3 of a purification, one after the other, from wherever it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainguard.models import held_by
from trainguard.purification.finetuning import accuracy, fine_tune, logits_of
from trainguard.purification.ranking import cleanest, logit_similarity, overlap
from trainguard.rng import isolated_rng

if TYPE_CHECKING:
    from trainguard.progress import Progress
    from trainguard.purification.state import Keeper, Run

STEPS = ("adversarial", "plain", "rank")  # 1, 2 and 3 of Algorithm 1


def alternate(run: Run, show: Progress, keeper: Keeper) -> None:
    """The loop of Algorithm 1, from wherever the run is."""
    while not run.stopped:
        step = STEPS[run.step]
        started = time.perf_counter()
        with isolated_rng(run.plan.seed + 1009 * run.round + run.step):
            if step == "rank":
                _rank(run, show)
            else:
                _fine_tune(run, step, show)
        seconds = time.perf_counter() - started
        run.history[-1]["seconds"] = seconds
        run.timing[step] = run.timing.get(step, 0.0) + seconds
        run.round, run.step = (run.round + 1, 0) if step == "rank" else (run.round, run.step + 1)
        keeper.save()


def _fine_tune(run: Run, step: str, show: Progress) -> None:
    """Steps 1 and 2 of a round; after step 2 the round is judged."""
    how = run.how
    batches = run.plan.batches(run.round, step, len(run.extra), run.how.batch_size)
    loss = 0.0
    if batches:
        images = batches * min(run.how.batch_size, len(run.extra))
        with show.stage(f"round {run.round + 1}, {step}", images) as stage:
            loss = fine_tune(
                run.network,
                run.store,
                run.extra,
                batches=batches,
                adversarial=step == "adversarial",
                teacher=run.infected if how.kept or how.mixed or how.features or how.shared else None,
                suspects=run.suspects,
                worn=run.worn,
                how=how,
                generator=torch.Generator().manual_seed(run.plan.seed + 1009 * run.round + run.step),
                processes=run.processes,
                stage=stage,
                classes=run.classes,
            )
        run.processes.align(run.network.net)
    reached = run.processes.broadcast(accuracy(run.network, *run.judge) if np.isfinite(loss) else 0.0)
    row = {"round": run.round, "step": step, "images": len(run.extra), "batches": batches, "loss": loss}
    run.history.append({**row, "accuracy": reached})
    if not np.isfinite(loss):
        run.stopped = f"fine-tuning diverged in round {run.round + 1}"
    elif step == "plain":
        lost = run.before - reached - run.plan.forgiven
        doubt = len(run.judge[1]) ** -0.5  # two standard errors at most
        run.history[-1]["within_bound"] = within = bool(lost <= run.plan.max_accuracy_loss + doubt)
        if within:
            run.best = {name: value.detach().cpu().clone() for name, value in held_by(run.network.net).items()}
            run.best_accuracy = reached


def _rank(run: Run, show: Progress) -> None:
    """Step 3: the ranking, and whether another round is worth it."""
    plan, last = run.plan, run.round + 1 == len(run.plan.shares)
    reached = run.history[-1]["accuracy"]
    row: dict[str, Any] = {"round": run.round, "step": "rank", "images": len(run.pool), "accuracy": reached}
    run.history.append(row)
    similarity = np.full(len(run.pool), np.nan, dtype=np.float32)
    if not (last and not run.callbacks):
        similarity = _similarity(run, show)
    for callback in run.callbacks:
        if hasattr(callback, "on_purify_round"):
            everywhere = np.full(len(run.store), np.nan, dtype=np.float32)
            everywhere[run.pool] = similarity
            callback.on_purify_round(round=run.round, model=run.network, extra=run.extra, similarity=everywhere)
    if not last:
        share = plan.shares[run.round + 1]
        labels = run.store.labels[run.pool]
        chosen = run.pool[cleanest(similarity, share, labels)]
        if run.previous is not None:
            row["overlap"] = overlap(chosen, run.pool[cleanest(run.previous, share, labels)])
            settled = row["overlap"] >= plan.same_set and reached - run.last_accuracy < plan.least_gain
            run.stopped = "neither the model nor the extra set changes any more" if settled else ""
        if not run.stopped:
            run.extra = chosen
    elif run.best is None:
        run.stopped = f"every round lost more than {plan.max_accuracy_loss:.3f} of held-out accuracy"
    else:
        run.stopped = "all rounds done"
    run.previous, run.last_accuracy = similarity, reached


def _similarity(run: Run, show: Progress) -> NDArray[np.float32]:
    """Eq. 9 over the pool, shared by the ranks and the same on each."""
    positions = np.arange(len(run.pool))[run.processes.rank :: run.processes.world]
    mine = run.pool[positions]
    parts = []
    with show.stage(f"round {run.round + 1}, ranking", len(mine)) as stage:
        pairs = zip(logits_of(run.infected, run.store, mine), logits_of(run.network, run.store, mine), strict=True)
        for infected, purified in pairs:
            parts.append(logit_similarity(infected, purified).cpu().numpy())
            stage.advance(len(infected))
    values = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    return np.asarray(run.processes.merge(positions, values, len(run.pool)), dtype=np.float32)
