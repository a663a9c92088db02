r"""PBE Algorithm 1: erase a backdoor by alternately purifying the model and the set that it is purified with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from trainguard.data.pixels import given_range
from trainguard.distributed import Processes
from trainguard.models import UnitPixels, copy_of, load_tensors
from trainguard.perturbation import Norm
from trainguard.progress import Progress
from trainguard.purification.arguments import check_arguments
from trainguard.purification.defaults import PASSES, defaults_for
from trainguard.purification.finetuning import (
    RADIUS,
    FineTuning,
    accuracy,
    fitting_radius,
    has_batch_norm,
    mirrors_alike,
    usual_rate,
)
from trainguard.purification.network import guessing, renew_head
from trainguard.purification.opening import opened
from trainguard.purification.overlay import Overlay, leading_overlays
from trainguard.purification.poison import screened
from trainguard.purification.results import PurifyResult
from trainguard.purification.rounds import alternate
from trainguard.purification.state import Indices, Keeper, Plan, Run, round_shares, split
from trainguard.purification.universal import Patch, breaking_patches
from trainguard.results import ScreenResult
from trainguard.rng import isolated_rng, undisturbed
from trainguard.screening.settings import check_callbacks
from trainguard.versions import versions
from trainguard.warning import warn

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange
    from trainguard.data.samples import Key
    from trainguard.data.store import ImageStore, OnError

SAMPLE = 512  # images on which the model is tried


@undisturbed(0)
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
    screening: bool = True,
    validation: Any = None,
    pixel_range: PixelRange | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    bounds: tuple[float, float] | None = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
    on_error: OnError = "raise",
    rounds: int | None = None,
    shares: Sequence[float] | None = None,
    adversarial_batches: Sequence[int] | None = None,
    plain_batches: Sequence[int] | None = None,
    eps: float | None = None,
    norm: Norm = "linf",
    attack_steps: int = 3,
    lr: float | None = None,
    batch_size: int = 128,
    kept: float | None = None,
    mixed: float | None = None,
    features: float | None = None,
    shared: float | None = None,
    patches: int = 4,
    flip: bool | None = None,
    max_accuracy_loss: float = 0.15,
    poison_share: float = 0.1,
    callbacks: Sequence[Any] = (),
) -> PurifyResult:
    r"""Erase a backdoor from a trained model by progressive adversarial fine-tuning (PBE, Algorithm 1).

    Each round fine-tunes the model on untargeted adversarial examples of an extra set (steps 1a and 1b, Eq. 6 and
    8), then on the set itself (step 2), then ranks all images by how little purification changed their logits (step
    3, Eq. 9) and takes the top of that ranking as the next, larger extra set.

    With clean data, step 2 alone runs, once, and unlearns what misleads the model and the one being mended alike (after
    Wei et al. 2023, shared adversarial unlearning): changed pixels, waves and warps. A model without BatchNorm keeps
    more of the trigger so; there steps 1 and 2 run once, from a new last layer (after Min et al. 2023, feature shift
    tuning), which has to learn its answers again from clean images.

    A round is worth another one while it still changes something. When the accuracy on images that were held out no
    longer rises and the ranking would choose the same set again, the alternation has reached its fixed point and
    stops; nothing about the attack is needed to see that.

    Without clean data, the data are screened first, with the model itself in the place of the first probe: it has
    learned whatever there is to be learned from them. What screening flags stays out of every extra set, and its labels
    are unlearned beside each batch; one round is then enough. One is enough as well where it calls the data clean: the
    backdoor, if there is one, came from elsewhere.

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
            `ScreenResult` the least suspicious kept images are taken; what it flagged stays out of the later sets too
            and is unlearned.
        screening: screen the data first where they are not clean and `initial` says nothing.
        validation: labelled images that can be trusted and that the model has not seen, to judge accuracy on. None:
            10% of `data` are held out for it.
        pixel_range: what the model's input values mean. None: found from the data set's transforms.
        mean: the normalisation that the model was trained with, in [0, 1] pixels, together with `std`: another way to
            say the same.
        std: see `mean`.
        bounds: the model inputs of black and white, equal for all channels: a third way.
        image_column: key or position of the image in a sample, needed only where several could be meant.
        label_column: likewise of the label.
        on_error: `"raise"`, or `"skip"` to leave out samples that cannot be read.
        rounds: at most how many; None: as many as there are shares. With clean data there is one.
        shares: size of each round's extra set as a share of the data; the last one holds for further rounds. None: 0.9
            where screening flagged something or calls the data clean, else 0.05 and 0.5.
        adversarial_batches: optimizer steps on adversarial examples in each round; the last one holds for further
            rounds, and the extra set is gone through 40 times at most. None: 40; none at all where screening flagged
            something, because unlearning that is both surer and cheaper, or where `shared` takes its place.
        plain_batches: likewise of step 2, by the same bound. None: 150; with clean data 240 (160 over 450 images), or
            300 without `shared`; but at least two passes over the extra set.
        eps: radius of the adversarial perturbation in unit pixel space. None: 6/255 (for `"l2"` 0.5), as in the
            authors' code, doubled up to three times where it moves less than a quarter of the images across a class
            border.
        norm: `"linf"` or `"l2"`.
        attack_steps: gradient steps per adversarial example, each of `eps / 5`.
        lr: learning rate of step 1, and the one that step 2 starts from. None: 0.02; with clean data 0.03; a third of
            that where the model has no BatchNorm.
        batch_size: images per batch.
        kept: weight of the model's own answers to unperturbed images against the labels, in [0, 1]. None: 0.5; with
            clean data 0.85.
        mixed: weight of the model's own answers to mixtures of two images, as far as they name one of the two labels
            and the model being mended agrees: more accuracy, and more of a blended trigger. None: 0; with clean data 1.
        features: weight of the model's own features, what enters its last layer, of unperturbed images: more accuracy,
            and more of any trigger. None: 12 with clean data, but 4 without `shared` where no faint picture (below)
            shows which class the backdoor leads to; 3 where screening calls the data clean, else 0.
        shared: weight of unlearning, in step 2, adversarial images that mislead the model and the one being mended
            alike. None: 0.5 with clean data where the model has BatchNorm, in the place of the new last layer and of
            step 1, which 0 brings back; else 0.
        patches: how often to search for one small patch that breaks the model on most images, as the audit does; and,
            for each class to which a much fainter picture leads nearly all images than to others, for such a picture.
            What is found is put on a quarter of the images of step 2 (15% each if both are), and the pictures follow
            the model as it changes: a trigger lies far outside the ball of step 1. With `shared` they mark images to be
            unlearned instead: pictures, fainter ones, or patches where there are none. Not where screening flagged
            something; 0: never.
        flip: mirror images at random. None: if the model takes mirrored images for the same.
        max_accuracy_loss: a round that loses more accuracy than this, in [0, 1], is not returned; if every round
            does, the model comes back as it was, with a warning. Two standard errors are added, which is much where few
            images judge. Images held out of the training data are a strict
            judge: the model has learned them by heart, so that new images lose less.
        poison_share: of held-out images, how many may lose their label without counting as lost accuracy:
            purification is meant to unlearn the labels of poison. 0.1 is the rate that the paper defends against; 0 is
            used with `clean`, with `validation` and where screening flagged something.
        callbacks: objects with `on_purify_round(round, model, extra, similarity)`, called after each round with the
            network in unit pixels, its extra set, and the next ranking: similarity over all images, NaN where there
            is none.

    Returns:
        The purified model, without DDP or torch.compile around it, and how it came about.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be copied, or does not fit the data.
        StateError: `state_dir` holds the state of another purification.
        ValueError: a number is out of its range.

    Deviation from the paper: images are held out to judge accuracy; one setting serves all attacks, where the paper
    adapts the perturbation to each; the model's own answers beside the labels; where the data are clean, unlearning of
    what both models share or a new last layer; where they are not, screening and unlearning; the extra sets are drawn
    class by class; rounds end early at a fixed point; the last round within the bound is returned. Near the paper's
    own: `kept=0, screening=False, patches=0, attack_steps=7, lr=1e-3, shares=(0.05, 0.2, 0.5, 0.7),
    adversarial_batches=(200, 30), plain_batches=(0, 800)`.
    """
    check_arguments(
        norm,
        eps,
        seed,
        rounds=rounds,
        shares=shares,
        adversarial_batches=adversarial_batches,
        plain_batches=plain_batches,
        attack_steps=attack_steps,
        lr=lr,
        batch_size=batch_size,
        kept=kept,
        mixed=mixed,
        features=features,
        shared=shared,
        patches=patches,
        max_accuracy_loss=max_accuracy_loss,
        poison_share=poison_share,
    )
    check_callbacks(callbacks)
    started, seed = time.perf_counter(), int(seed)
    processes = Processes.of(accelerator)
    show = Progress(progress and processes.is_main)
    reading = {"image_column": image_column, "label_column": label_column, "on_error": on_error}
    given = given_range(pixel_range, mean, std, bounds)
    subject = opened(model, data, given, accelerator=accelerator, seed=seed, **reading)
    store, infected = subject.store, subject.network
    timing = {}
    with isolated_rng(seed):
        network = subject.to_tune()
        trusted = None if validation is None else subject.more(validation, **reading)  # before hours have gone by
        if screening and not clean and initial is None:
            apart = time.perf_counter()
            initial = screened(
                subject.another().net,
                store,
                device=subject.device,
                accelerator=accelerator,
                seed=seed,
                progress=progress,
                state_dir=state_dir,
            )
            timing["screening"] = time.perf_counter() - apart
    flagged = isinstance(initial, ScreenResult) and bool(initial.suspect.any())
    sound = isinstance(initial, ScreenResult) and initial.verdict == "clean" and not flagged
    case = {"clean": clean, "flagged": flagged, "sound": sound}
    sizes = round_shares(defaults_for(**case).shares if shares is None else shares, rounds, clean)
    pool, held_out, first = split(store, sizes[0], seed, initial=initial, hold_out=validation is None)
    judge = (store, held_out) if trusted is None else (trusted, np.asarray(trusted.readable, dtype=np.int64))
    starts = 0 if flagged else patches
    sharing = clean and shared != 0 and has_batch_norm(infected.net)
    with isolated_rng(seed):
        how = FineTuning(
            lr=usual_rate(infected.net, clean=clean) if lr is None else lr,
            batch_size=batch_size,
            norm=norm,
            eps=RADIUS[norm] if eps is None else eps,
            attack_steps=attack_steps,
        )
        sample = np.random.default_rng(seed).permutation(pool)[:SAMPLE]
        how = replace(
            how,
            eps=fitting_radius(infected, store, sample[:128], how) if eps is None else eps,
            flip=mirrors_alike(infected, store, sample) if flip is None else flip,
        )
        how = processes.broadcast(how)
        apart = time.perf_counter()
        broken, leading = processes.broadcast(_pictures(infected, store, first, how, starts, seed, faint=sharing))
        if starts:
            timing["search"] = time.perf_counter() - apart
    pictures = [picture for overlays in leading.values() for picture in overlays]
    usual = defaults_for(**case, shown=bool(pictures), sharing=sharing)
    weights = {"kept": kept, "mixed": mixed, "features": features, "shared": shared}
    how = replace(how, **{name: getattr(usual, name) if value is None else value for name, value in weights.items()})
    plan = Plan(
        shares=sizes,
        adversarial_batches=(usual.adversarial,) if adversarial_batches is None else tuple(adversarial_batches),
        plain_batches=(usual.plain,) if plain_batches is None else tuple(plain_batches),
        passes=PASSES if plain_batches is None else 0,
        max_accuracy_loss=max_accuracy_loss,
        forgiven=0.0 if clean or validation is not None or flagged or sound else poison_share,
        seed=seed,
        patches=starts,
    )
    run = Run(
        network=network,
        infected=infected,
        store=store,
        pool=pool,
        judge=judge,
        plan=plan,
        how=how,
        processes=processes,
        classes=subject.classes,
        extra=first,
        suspects=initial.suspect.nonzero()[0] if isinstance(initial, ScreenResult) and flagged else None,
        worn=[kind for kind in (broken, pictures) if kind],
        callbacks=tuple(callbacks),
        started=started,
    )
    with isolated_rng(seed):
        if usual.renewed:
            renew_head(network, subject.classes, subject.few)
        run.before = accuracy(infected, *judge)
        if said := guessing(accuracy(infected, store, sample), store.labels[sample]):
            warn(said)
        keeper = Keeper(state_dir, run)
        keeper.restore()
        alternate(run, show, keeper)
    purified = copy_of(model)
    if run.best is not None:
        load_tensors(purified, run.best)
    else:
        warn(
            f"the model is returned as it came: {run.stopped}; raise max_accuracy_loss=, lower lr= or eps=, or give "
            f"{'more of these images' if clean else 'validation= or clean data'}"
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
            "plain_batches": list(plan.plain_batches),
            "clean": clean,
            "judged on": {"held out": trusted is None, "images": len(judge[1]), "fingerprint": judge[0].fingerprint},
            "patches found": len(broken),
            "overlays lead to": sorted(leading),
            "screening": {"verdict": initial.verdict, "flagged": int(initial.suspect.sum()), "reason": initial.reason}
            if isinstance(initial, ScreenResult)
            else None,
            "pixel_range": {"low": list(store.pixel_range.low), "high": list(store.pixel_range.high)},
            "versions": versions(),
        },
        timing={"total": run.seconds, **timing, **run.timing},
    )


def _pictures(
    network: UnitPixels, store: ImageStore, index: Indices, how: FineTuning, starts: int, seed: int, *, faint: bool
) -> tuple[list[Patch], dict[int, list[Overlay]]]:
    """Patches that break the model, and overlays that lead to each of some classes; see `patches` of `purify`."""
    if not starts:
        return [], {}
    leading = leading_overlays(network, store, index, how.eps, how.norm, faint=faint, starts=starts, seed=seed)
    if faint and leading:
        return [], leading
    return breaking_patches(network, store, index, starts=starts, seed=seed), leading
