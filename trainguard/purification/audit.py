r"""Is this model backdoored? Where its untargeted adversarial examples fall, class by class (PBE Sec. 3.4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainguard.data.pixels import given_range
from trainguard.distributed import Processes
from trainguard.errors import DataError
from trainguard.features import classifier_layer, watched
from trainguard.models import UnitPixels, device_of
from trainguard.perturbation import Norm, frozen, untargeted
from trainguard.progress import Progress
from trainguard.purification.arguments import check_arguments
from trainguard.purification.bending import bends
from trainguard.purification.finetuning import RADIUS, FineTuning, accuracy, fitting_radius
from trainguard.purification.judging import (
    ASKED_OF_PATCH,
    into_of,
    judge,
    largest_move,
    pull_of,
    transition_counts,
)
from trainguard.purification.network import guessing
from trainguard.purification.opening import opened
from trainguard.purification.overlay import reaches
from trainguard.purification.poison import screened
from trainguard.purification.results import AuditResult
from trainguard.purification.state import Indices
from trainguard.purification.universal import Patch, best_patch, own_patches
from trainguard.rng import isolated_rng, undisturbed
from trainguard.training import autocast
from trainguard.versions import versions

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange
    from trainguard.data.samples import Key
    from trainguard.data.store import ImageStore, OnError
    from trainguard.progress import Stage

LEAST_EACH = 16  # images of a class, in either half, for it to be tried with a patch of its own
SURE = 0.9  # probability of the class that a patch of its own moves an image to; benign ones are often unsure there
LEARNED = 0.5  # share of the flagged samples that get their label from a model that has learned the poison


@undisturbed(0)
def audit(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    *,
    accelerator: Any = None,
    seed: int = 0,
    progress: bool = True,
    pixel_range: PixelRange | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    bounds: tuple[float, float] | None = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
    on_error: OnError = "raise",
    images: int = 1000,
    eps: float | None = None,
    norm: Norm = "linf",
    attack_steps: int = 7,
    batch_size: int = 128,
    screening: bool = True,
) -> AuditResult:
    r"""Look for a backdoor in a trained model, by the paper's observation that adversarial examples give it away.

    An untargeted adversarial example of a benign model may become anything; one of an infected model is more likely
    than not to become the target class, because the trigger's neurons are the shortest way out (Figs. 1 and 4).

    A trigger lies far outside that ball. It is looked for as one small patch that changes most predictions, and as
    one faint picture for all images that leads to one class far sooner than others do to theirs; and images are bent
    until they are of a class, of which a warp's target needs far less than any other. Where none of these shows one, as
    a small patch for the images of each class alone.

    Other triggers that differ from image to image show in none of these. Where `data` are what the model was trained
    on, the poison is among them: they are screened (AdvrBD) with the model as the first probe, and what is found counts
    if the model has learned its labels.

    Of a model that gets no more images right than guessing would, nothing is said: the verdict is `"undecided"`.

    Args:
        model: the trained model, on any device; never changed. Or a function that returns a copy of it.
        data: labelled images of the kind it was trained on; best its training set, poison included.
        accelerator: says where to compute; every process comes to the same verdict. None: where the model is.
        seed: of the choice of images.
        progress: show it.
        pixel_range: what the model's input values mean. None: found from the data set's transforms.
        mean: the normalisation that the model was trained with, in [0, 1] pixels, together with `std`: another way to
            say the same.
        std: see `mean`.
        bounds: the model inputs of black and white, equal for all channels: a third way.
        image_column: key or position of the image in a sample, needed only where several could be meant.
        label_column: likewise of the label.
        on_error: `"raise"`, or `"skip"` to leave out samples that cannot be read.
        images: how many to attack, equally many of every class, among those that the model gets right.
        eps: radius of the perturbation in unit pixel space. None: the smallest at which the attack works, as in
            `purify`.
        norm: `"linf"` or `"l2"`.
        attack_steps: gradient steps, each of `eps / 5`.
        batch_size: images per batch.
        screening: also screen the data, where perturbations have not shown a backdoor.

    Returns:
        The verdict and the evidence.

    Raises:
        DataError: the data cannot be used, or the model gets none of them right.
        ModelError: the model cannot be copied, or does not fit the data.
        ValueError: a number is out of its range.

    Deviation from the paper: the search for a patch and the screening are added; without the trigger, Table 5's
    distance to triggered images cannot be had; the distance to the images of each class stands in for it (the
    paper's Fig. 5: triggered images lie with the target class).
    """
    check_arguments(norm, eps, seed, images=images, attack_steps=attack_steps, batch_size=batch_size)
    started, seed = time.perf_counter(), int(seed)
    given = given_range(pixel_range, mean, std, bounds)
    reading = {"image_column": image_column, "label_column": label_column, "on_error": on_error}
    subject = opened(model, data, given, accelerator=accelerator, seed=seed, **reading)
    store, network, classes, device = subject.store, subject.network, subject.classes, subject.device
    index = balanced(store, images, seed)
    with isolated_rng(seed), frozen(network):
        how = FineTuning(eps=RADIUS[norm] if eps is None else eps, norm=norm, attack_steps=attack_steps)
        eps = fitting_radius(network, store, index[:128], how) if eps is None else eps
        with Progress(progress).stage("audit", len(index)) as stage:
            seen = _attack(network, store, index, classes, eps, norm, attack_steps, batch_size, stage)
    labels = store.labels[index]
    right = seen["before"] == labels
    if not right.any():
        raise DataError(
            f"the model gets none of {len(index)} images right: the data, the order of its classes or the pixel range "
            "are not what it was trained with"
        )
    counts = transition_counts(labels[right], seen["after"][right], classes)
    with isolated_rng(seed), frozen(network):
        patch, patched, rival = _break_by_patch(network, store, index[right], classes, batch_size, seed)
        known = store.batch(index[right], device), torch.from_numpy(labels[right]).to(device)
        reached = reaches(network, *known, eps, norm, torch.Generator().manual_seed(seed))
        bent = bends(network, *known, list(reached), torch.Generator().manual_seed(seed))
    pull = pull_of(counts)
    nothing = guessing(float(right.mean()), labels)
    said = ("undecided", 0.0, nothing, ()) if nothing else judge(counts, patched, reached, bent, rival=rival)
    each = np.zeros_like(counts)
    if said[0] != "backdoored" and not nothing:  # it takes as long as the search for one patch
        with isolated_rng(seed), frozen(network):
            each = _break_each_class(network, store, index[right], classes, batch_size, seed)
        said = judge(counts, patched, reached, bent, each, rival)
    # Ranks may differ in a last bit.
    (verdict, confidence, reason, targets), nothing = Processes.of(accelerator).broadcast((said, nothing))
    poison = None
    if screening and verdict != "backdoored" and not nothing:
        with isolated_rng(seed):
            copied = subject.another().net
            poison = screened(copied, store, device=device, accelerator=accelerator, seed=seed, progress=progress)
        if poison is not None and poison.verdict == "poisoned" and poison.suspect.any():
            flagged = np.flatnonzero(poison.suspect)
            learned = accuracy(network, store, flagged)
            if learned >= LEARNED:
                verdict, confidence, targets = "backdoored", poison.confidence, poison.target_classes
                reason = (
                    f"the data hold {len(flagged)} samples of poison, and the model gives {learned:.0%} their labels"
                )
    return AuditResult(
        verdict=verdict,
        confidence=confidence,
        reason=reason,
        target_classes=targets,
        transitions=(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32),
        pull=pull.astype(np.float32),
        movement=movement_of(labels[right], seen["features"][right], seen["features after"][right], classes),
        patch_success=float(1 - np.trace(patched) / patched.sum()),
        patch=pixels_of(patch),
        reach=np.array([reached.get(k, 0.0) for k in range(classes)], dtype=np.float32),
        bend=np.array([bent.get(k, 0.0) for k in range(classes)], dtype=np.float32),
        own_patch=(largest_move(each) / np.maximum(each.sum(1), 1)).astype(np.float32)[: classes * bool(each.any())],
        images=int(right.sum()),
        class_names=tuple(store.class_names)[:classes],
        fingerprint=store.fingerprint,
        settings={
            "seed": seed,
            "images": images,
            "eps": eps,
            "norm": norm,
            "attack_steps": attack_steps,
            "batch_size": batch_size,
            "pixel_range": {"low": list(store.pixel_range.low), "high": list(store.pixel_range.high)},
            "accuracy": float(right.mean()),
            "screening": None if poison is None else {"verdict": poison.verdict, "flagged": int(poison.suspect.sum())},
            "versions": versions(),
        },
        timing={"total": time.perf_counter() - started},
    )


def movement_of(labels: Indices, before: NDArray, after: NDArray, classes: int) -> NDArray[np.float32]:
    r"""(K,) how much nearer the other classes' features come to each class (after PBE Table 5).

    .. math:: m_j = 1 - \operatorname{mean}_{y \ne j} \frac{\|f(\tilde x) - \mu_j\|_2}{\|f(x) - \mu_j\|_2}

    Args:
        labels: (n,) classes.
        before: (n, D) features of the images.
        after: (n, D) features of their adversarial examples.
        classes: K.

    Returns:
        Positive where adversarial examples approach; 0 for a class without images.
    """
    result = np.zeros(classes, dtype=np.float32)
    for j in np.unique(labels):
        centre, others = before[labels == j].mean(axis=0), labels != j
        if others.any():
            old = np.linalg.norm(before[others] - centre, axis=1)
            new = np.linalg.norm(after[others] - centre, axis=1)
            result[j] = 1 - np.mean(new / np.maximum(old, 1e-12))
    return result


def pixels_of(patch: Patch) -> NDArray[np.float32]:
    """(n, 2 + C) row, column and values of each pixel of a patch, in reading order."""
    where = patch.mask.cpu().nonzero()
    values = patch.pattern.cpu()[:, where[:, 0], where[:, 1]].T
    return torch.cat([where.float(), values], dim=1).numpy()


def _break_by_patch(
    network: UnitPixels, store: ImageStore, index: Indices, classes: int, batch_size: int, seed: int
) -> tuple[Patch, NDArray[np.int64], float]:
    """The best patch on one half of the images, and the transitions that it causes on the other.

    Where it leads many images into one class, the best patch is looked for that leads the others of these elsewhere:
    a network that any patch breaks has no trigger in it. The share that it moves into one class comes third.
    """
    device, generator = device_of(network), torch.Generator().manual_seed(seed)

    def broken(index: Indices, besides: int | None = None) -> tuple[Patch, NDArray[np.int64]]:
        half = len(index) // 2
        found, tried = (index[:half], index[half:]) if half else (index, index)
        labels = torch.from_numpy(store.labels[found]).to(device)
        patch = best_patch(network, store.batch(found, device), labels, generator=generator, besides=besides)
        predicted = []
        for start in range(0, len(tried), batch_size):
            with torch.no_grad(), autocast(device):
                logits = network(patch.on(store.batch(tried[start : start + batch_size], device)))
            predicted.append(logits.argmax(1).cpu().numpy())
        return patch, transition_counts(store.labels[tried], np.concatenate(predicted), classes)

    patch, patched = broken(index)
    into = into_of(patched)
    target = int(into.argmax())
    others = index[store.labels[index] != target]
    if classes < 3 or into[target] < ASKED_OF_PATCH or not len(others):
        return patch, patched, 0.0
    elsewhere = into_of(broken(others, besides=target)[1])
    return patch, patched, float(np.delete(elsewhere, target).max())


def _break_each_class(
    network: UnitPixels, store: ImageStore, index: Indices, classes: int, batch_size: int, seed: int
) -> NDArray[np.int64]:
    """(K, K) the sure transitions under a patch for each class's images alone, sought on one half, seen on the other.

    An image whose new class gets less than `SURE` stays where it was. Of several searches the one that moves the most
    images of a class into one other counts. Classes of too few images to tell are not tried: their rows are zero.
    """
    device = device_of(network)
    halves = np.array_split(index, 2)
    enough = np.min([np.bincount(store.labels[half], minlength=classes) for half in halves], axis=0) >= LEAST_EACH
    found, tried = (half[enough[store.labels[half]]] for half in halves)
    counts = np.zeros((classes, classes), dtype=np.int64)
    if not enough.any() or classes < 3:  # with two classes, a patch moves images into the other one
        return counts
    groups = np.cumsum(enough) - 1
    labels, order = torch.from_numpy(store.labels[found]), torch.Generator().manual_seed(seed)
    own = torch.from_numpy(groups[store.labels[found]])
    images = store.batch(found, device)
    for patch in own_patches(network, images, labels.to(device), own.to(device), generator=order):
        predicted = []
        for part in np.array_split(tried, -(-len(tried) // batch_size)):
            worn = patch.of(torch.from_numpy(groups[store.labels[part]]).to(device))
            with torch.no_grad(), autocast(device):
                sure, said = network(worn.on(store.batch(part, device))).float().softmax(1).max(1)
            predicted.append(np.where(sure.cpu() >= SURE, said.cpu(), store.labels[part]))
        now = transition_counts(store.labels[tried], np.concatenate(predicted), classes)
        better = largest_move(now) > largest_move(counts)
        counts[better | ~counts.any(1)] = now[better | ~counts.any(1)]
    return counts


def balanced(store: ImageStore, images: int, seed: int) -> Indices:
    """About `images` readable indices, equally many of every class as far as there are, in random order."""
    rng = np.random.default_rng(seed)
    readable = rng.permutation(np.asarray(store.readable, dtype=np.int64))
    labels = store.labels[readable]
    share = max(1, -(-images // max(1, len(np.unique(labels)))))
    chosen = [readable[labels == label][:share] for label in np.unique(labels)]
    return rng.permutation(np.concatenate(chosen))


def _attack(
    network: UnitPixels,
    store: ImageStore,
    index: Indices,
    classes: int,
    eps: float,
    norm: Norm,
    steps: int,
    batch_size: int,
    stage: Stage,
) -> dict[str, NDArray]:
    """Predictions and features of images and of their adversarial examples."""
    device = device_of(network)
    parts: dict[str, list[NDArray]] = {"before": [], "after": [], "features": [], "features after": []}
    layer = classifier_layer(network, classes, store.batch(index[:2], device))
    with watched(layer) as tap, autocast(device):
        for start in range(0, len(index), batch_size):
            part = index[start : start + batch_size]
            x, y = store.batch(part, device), torch.from_numpy(store.labels[part]).to(device)
            moved = untargeted(network, x, y, eps=eps, norm=norm, steps=steps)
            for images, when in ((x, ""), (moved, " after")):
                with torch.no_grad():
                    logits = network(images)
                parts["after" if when else "before"].append(logits.argmax(1).cpu().numpy())
                parts["features" + when].append(tap.read(logits).cpu().numpy())
            stage.advance(len(part))
    return {name: np.concatenate(rows) for name, rows in parts.items()}
