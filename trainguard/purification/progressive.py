r"""PBE Algorithm 1: erase a backdoor by alternately purifying the model and the set that it is purified with."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainguard.distributed import Processes
from trainguard.models import copy_of
from trainguard.perturbation import Norm, frozen
from trainguard.progress import Progress
from trainguard.purification.finetuning import (
    RADIUS,
    FineTuning,
    accuracy,
    fine_tune,
    fitting_radius,
    logits_of,
    mirrors_alike,
)
from trainguard.purification.network import UnitPixels, check_outputs, for_training
from trainguard.purification.ranking import cleanest, logit_similarity, overlap
from trainguard.purification.results import PurifyResult
from trainguard.purification.state import Keeper, Plan, Run, open_store, round_shares, split
from trainguard.purification.universal import LIKE_A_TRIGGER, Patch, best_patch, changed_by
from trainguard.results import ScreenResult
from trainguard.rng import isolated_rng
from trainguard.training import device_of

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange

MOST_PATCHED = 512  # images on which a patch is looked for
STEPS = ("adversarial", "plain", "rank")  # 1, 2 and 3 of Algorithm 1


def purify(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    *,
    clean: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: bool = True,
    initial: ScreenResult | Sequence[int] | None = None,
    validation: Any = None,
    pixel_range: PixelRange | None = None,
    rounds: int | None = None,
    shares: Sequence[float] = (0.05, 0.2, 0.5, 0.7),
    adversarial_batches: Sequence[int] = (200, 30, 30, 30),
    epochs: int = 10,
    eps: float | None = None,
    norm: Norm = "linf",
    attack_steps: int = 7,
    lr: float = 1e-3,
    batch_size: int = 128,
    flip: bool | None = None,
    max_accuracy_loss: float = 0.1,
    poison_share: float = 0.1,
    patches: bool = True,
    callbacks: Sequence[Any] = (),
) -> PurifyResult:
    r"""Erase a backdoor from a trained model by progressive adversarial fine-tuning (PBE, Algorithm 1).

    Each round fine-tunes the model on untargeted adversarial examples of an extra set (steps 1a and 1b, Eq. 6 and
    8), then on the set itself (step 2), then ranks all images by how little purification changed their logits (step
    3, Eq. 9) and takes the top of that ranking as the next, larger extra set. With clean data, steps 1 and 2 run once.

    A round is worth another one while it still changes something. When the accuracy on images that were held out no
    longer rises and the ranking would choose the same set again, the alternation has reached its fixed point and
    stops; nothing about the attack is needed to see that.

    Args:
        model: the trained model, on any device, wrapped by DDP or torch.compile or not; never changed. Or a function
            that returns a copy of it, where it cannot be deep-copied.
        data: what the model was trained on, poison included; with `clean=True` a few images that are known to be clean.
            A map-style dataset, a Hugging Face dataset, or an opened `ImageStore`.
        clean: whether `data` are known to be clean.
        accelerator: shares the work over its processes, and says where to compute. None: where the model is.
        seed: of everything random.
        state_dir: a folder to keep the state in after every step. A call with the same arguments goes on from there and
            ends with the same result.
        progress: show it.
        initial: the first extra set: indices, or what `trainguard.screen` said of the same data. From a
            `ScreenResult` the least suspicious kept images are taken, and what it flagged stays out of the later
            sets too.
        validation: labelled images that can be trusted and that the model has not seen, to judge accuracy on. None:
            10% of `data` are held out for it.
        pixel_range: what the model's input values mean. None: found from the data set's transforms.
        rounds: at most how many; None: as many as there are shares. With clean data there is one.
        shares: size of each round's extra set as a share of the data; the last one holds for further rounds. The values
            of PBE's authors' code.
        adversarial_batches: optimizer steps on adversarial examples in each round; the last one holds for further
            rounds, and the extra set is gone through 40 times at most. 200 is 10 epochs of 5% of CIFAR-10, as in the
            authors' code, and so is 30.
        epochs: passes over the extra set in step 2, from the second round on; in the first round only with clean data.
        eps: radius of the adversarial perturbation in unit pixel space. None: 6/255 (for `"l2"` 0.5), as in the
            authors' code, doubled up to three times where it moves less than a quarter of the images across a class
            border.
        norm: `"linf"` or `"l2"`.
        attack_steps: gradient steps per adversarial example.
        lr: learning rate.
        batch_size: images per batch.
        flip: mirror images at random. None: if the model takes mirrored images for the same.
        max_accuracy_loss: a round that loses more accuracy than this, in [0, 1], is not returned; if every round
            does, the model comes back as it was, with a warning. Images held out of the training data are a strict
            judge: the model has learned them by heart, so that new images lose less.
        poison_share: of held-out images, how many may lose their label without counting as lost accuracy:
            purification is meant to unlearn the labels of poison. 0.1 is the rate that the paper defends against; 0 is
            used with `clean`, with `validation` and with a `ScreenResult`.
        patches: look for one small patch that breaks the model as a visible trigger does, and if there is one, put
            it on half of the images of step 1; False is the paper's method. On two BadNets models of digits, without
            clean data, the success rate fell to 0.15 and 0.01 where it had stayed at 0.75 and 0.61.
        callbacks: objects with `on_purify_round(round, model, extra, similarity)`, called after each round with the
            network in unit pixels, its extra set, and the next ranking: similarity over all images, NaN where there
            is none.

    Returns:
        The purified model, in the form of the argument, and how it came about.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be copied, or does not fit the data.
        StateError: `state_dir` holds the state of another purification.

    Deviation from the paper: images are held out to judge accuracy; one setting serves all attacks, where the paper
    adapts the perturbation to each; the extra sets are drawn class by class; rounds end early at a fixed point; the
    best round within the bound is returned; and with `patches`, which answers the paper's weakest rows (BadNets
    without clean data, Tables 1 and 2).
    """
    sizes = round_shares(shares, rounds, clean)
    if not adversarial_batches:
        raise ValueError("expected the number of adversarial batches of at least one round, got none")
    started = time.perf_counter()
    processes = Processes.of(accelerator)
    show = Progress(progress and processes.is_main)
    store = open_store(data, pixel_range)
    trusted = clean or validation is not None or isinstance(initial, ScreenResult)
    plan = Plan(
        shares=sizes,
        adversarial_batches=tuple(adversarial_batches),
        epochs=epochs,
        plain_in_first=clean,
        max_accuracy_loss=max_accuracy_loss,
        forgiven=0.0 if trusted else poison_share,
        seed=seed,
        patches=patches,
    )
    pool, held_out, first = split(store, plan.shares[0], seed, initial=initial, hold_out=validation is None)
    if validation is None:
        judge = store, held_out
    else:
        trusted_store = open_store(validation, store.pixel_range)
        judge = trusted_store, np.asarray(trusted_store.readable, dtype=np.int64)
    infected = copy_of(model)
    device = accelerator.device if accelerator is not None else device_of(infected)
    infected_network = UnitPixels(for_training(infected, device), store.pixel_range)
    with isolated_rng(seed):
        check_outputs(infected_network.eval(), store.batch(pool[:2], device), store.num_classes)
        how = FineTuning(lr=lr, batch_size=batch_size, eps=eps or RADIUS[norm], norm=norm, attack_steps=attack_steps)
        sample = np.random.default_rng(seed).permutation(pool)[:128]
        how = replace(
            how,
            eps=fitting_radius(infected_network, store, sample, how) if eps is None else eps,
            flip=mirrors_alike(infected_network, store, sample) if flip is None else flip,
        )
        how = processes.broadcast(how)
    run = Run(
        network=UnitPixels(for_training(copy_of(model), device), store.pixel_range),
        infected=infected_network,
        store=store,
        pool=pool,
        judge=judge,
        plan=plan,
        how=how,
        processes=processes,
        extra=first,
        callbacks=tuple(callbacks),
    )
    run.network.eval()
    with isolated_rng(seed):
        run.before = accuracy(run.infected, *judge)
        keeper = Keeper(state_dir, run)
        keeper.restore()
        _alternate(run, show, keeper)
    purified = copy_of(model)
    if run.best is not None:
        purified.load_state_dict(run.best)
    else:
        warnings.warn(
            f"the model is returned as it came: {run.stopped}; raise max_accuracy_loss=, lower lr= or eps=, "
            "or give validation= or clean data",
            UserWarning,
            stacklevel=2,
        )
    return PurifyResult(
        model=purified,
        history=run.history,
        keep=run.extra,
        accuracy_before=run.before,
        accuracy_after=run.best_accuracy if run.best is not None else run.before,
        changed=run.best is not None,
        stopped=run.stopped,
        fingerprint=store.fingerprint,
        settings={
            **asdict(plan),
            **asdict(how),
            "shares": list(plan.shares),
            "adversarial_batches": list(plan.adversarial_batches),
            "clean": clean,
            "pixel_range": {"low": list(store.pixel_range.low), "high": list(store.pixel_range.high)},
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        timing={"total": time.perf_counter() - started, **run.timing},
    )


def _alternate(run: Run, show: Progress, keeper: Keeper) -> None:
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
    batches = run.plan.batches(run.round, step, len(run.extra), run.how.batch_size)
    loss, found = 0.0, {}
    if batches:
        patch = None
        if step == "adversarial" and run.plan.patches and all(row.get("patch", True) for row in run.history):
            patch = _patch(run)
            found = {"patch": patch is not None}
        images = batches * min(run.how.batch_size, len(run.extra))
        with show.stage(f"round {run.round + 1}, {step}", images) as stage:
            loss = fine_tune(
                run.network,
                run.store,
                run.extra,
                batches=batches,
                adversarial=step == "adversarial",
                patch=patch,
                how=run.how,
                generator=torch.Generator().manual_seed(run.plan.seed + 1009 * run.round + run.step),
                processes=run.processes,
                stage=stage,
            )
        _same_weights(run)
    reached = run.processes.broadcast(accuracy(run.network, *run.judge) if np.isfinite(loss) else 0.0)
    row = {"round": run.round, "step": step, "images": len(run.extra), "batches": batches, "loss": loss}
    run.history.append({**row, **found, "accuracy": reached})
    if not np.isfinite(loss):
        run.stopped = f"fine-tuning diverged in round {run.round + 1}"
    elif step == "plain":
        lost = run.before - reached - run.plan.forgiven
        run.history[-1]["within_bound"] = within = bool(lost <= run.plan.max_accuracy_loss)
        if within:
            run.best = {name: value.detach().cpu().clone() for name, value in run.network.net.state_dict().items()}
            run.best_accuracy = reached


def _patch(run: Run) -> Patch | None:
    """The patch that most images fall for; None if they do not in the first round. The same on every rank.

    A search costs as much as four epochs of 10,000 images. Where the first finds nothing like a trigger, no round looks
    again; where it does, every round trains against the best patch there still is.
    """
    device = device_of(run.network)
    generator = torch.Generator().manual_seed(run.plan.seed + run.round)
    some = run.pool[torch.randperm(len(run.pool), generator=generator)[:MOST_PATCHED].numpy()]
    labels = torch.from_numpy(run.store.labels[some]).to(device)
    x = run.store.batch(some, device)
    with frozen(run.network):
        patch = best_patch(run.network, x, labels, generator=generator)
        like_a_trigger = run.round > 0 or changed_by(run.network, patch, x, labels) >= LIKE_A_TRIGGER
    return run.processes.broadcast(patch if like_a_trigger else None)


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


def _same_weights(run: Run) -> None:
    """Rank 0's weights for all, against drift between devices whose sums differ in the last bit."""
    if run.processes.world > 1:
        for value in run.network.net.state_dict().values():
            torch.distributed.broadcast(value, src=0)
