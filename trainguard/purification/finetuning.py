r"""PBE steps 1a, 1b and 2: fine-tune on adversarial examples of the extra set, or on the extra set itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainguard.features import Tap, classifier_layer, watched
from trainguard.models import UnitPixels, device_of, held_by
from trainguard.perturbation import Norm, frozen, untargeted
from trainguard.purification.augmentation import random_view
from trainguard.purification.shared import PART, agreed_wrong, disbelief, shared_adversarial, unlearned
from trainguard.purification.universal import Worn
from trainguard.training import AT_ONCE, at_once, autocast

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore
    from trainguard.distributed import Processes
    from trainguard.progress import Stage

RADIUS: dict[Norm, float] = {"linf": 6 / 255, "l2": 0.5}  # of PBE's authors' code on CIFAR-10, and its like in l2
UNLEARNED = 0.25  # suspects beside each batch, as a share of it
WORN, WORN_EACH = 0.25, 0.15  # share of each plain batch that wears patches or overlays; each where both were found
RATE, RATE_WITH_CLEAN = 0.02, 0.03  # of SGD, see `usual_rate`
WITHOUT_BATCH_NORM = 1 / 3  # of these: a plain CNN lost 4 points in the place of 8, and none in the place of 4
LONGEST_STEP = 10.0  # norm of the gradient; a trained model stays below, a batch of two images may not


@dataclass(frozen=True)
class FineTuning:
    r"""How each step fine-tunes, for every attack alike.

    Attributes:
        lr: learning rate of SGD, reached after a tenth of step 1; down to zero along a cosine in step 2.
        momentum: of SGD (Nesterov's); it starts anew with every step.
        weight_decay: of all weights.
        batch_size: images per batch.
        eps: radius of the adversarial perturbation, in unit pixel space.
        norm: `"linf"` or `"l2"`.
        attack_steps: gradient steps per adversarial example, each of `eps / 5`.
        kept: weight of the infected model's answers to the unperturbed images against the labels, in [0, 1].
        mixed: weight of the infected model's answers to mixtures of two images, as far as they are believed.
        features: weight of the infected model's features of the unperturbed images.
        unlearn: weight of unlearning the suspects.
        shared: weight of unlearning, beside plain batches, what misleads the infected model and this one alike; all
            layers then stay in eval mode, because BatchNorm's statistics of few images, some of them perturbed, cost
            more accuracy than anything else.
        flip: mirror images at random.
    """

    lr: float = RATE
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    eps: float = 6 / 255
    norm: Norm = "linf"
    attack_steps: int = 3
    kept: float = 0.5
    mixed: float = 0.0
    features: float = 0.0
    unlearn: float = 0.3
    shared: float = 0.0
    flip: bool = True

    def rate_at(self, part: float, adversarial: bool) -> float:
        """The learning rate after a part of a step's batches, in [0, 1]."""
        return self.lr * (min(1.0, part / 0.1) if adversarial else 0.5 * (1 + math.cos(math.pi * part)))


def usual_rate(net: nn.Module, *, clean: bool = False) -> float:
    """The learning rate for a model that is to be mended: lower without BatchNorm (docs/experiments.md).

    Args:
        net: the model.
        clean: whether the data are known to be clean; the rate is higher then, for the new last layer.
    """
    return (RATE_WITH_CLEAN if clean else RATE) * (1.0 if has_batch_norm(net) else WITHOUT_BATCH_NORM)


def has_batch_norm(net: nn.Module) -> bool:
    """Whether a model has BatchNorm: without, it is mended otherwise."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def fine_tune(
    network: UnitPixels,
    store: ImageStore,
    extra: NDArray[np.int64],
    *,
    batches: int,
    adversarial: bool,
    teacher: UnitPixels | None = None,
    suspects: NDArray[np.int64] | None = None,
    worn: Sequence[Sequence[Worn]] = (),
    how: FineTuning,
    generator: torch.Generator,
    processes: Processes,
    stage: Stage,
    classes: int | None = None,
) -> float:
    r"""Fine-tune in place, with adversarial images (Eq. 8) or plain ones (step 2).

    .. math:: \theta \leftarrow \arg\min_\theta \mathbb{E}_{(x, y) \in D_{ext}} \bigl[
        (1 - \kappa) L(\tilde x, y; \theta) + \kappa \, KL(f(x; \theta_0) \,\|\, f(\tilde x; \theta))\bigr]
        + \mu \, \mathbb{E}_{m} \bigl[[\hat y(m; \theta_0) = \hat y(m; \theta) \in \{y, y'\}] \,
        KL(f(m; \theta_0) \,\|\, f(m; \theta))\bigr]
        + \nu \, \mathbb{E}_x \bigl[1 - \cos(g(x; \theta_0), g(\tilde x; \theta))\bigr]
        - \lambda \, \mathbb{E}_{(x, y) \in D_p} \log(1 - f_y(x; \theta))
        - \sigma \, \mathbb{E}_{r} \bigl[[\hat y(x \circ r; \theta) = \hat y(x \circ r; \theta_0) = k \ne y]
        \log(1 - f_k(x \circ r; \theta))\bigr]

    Args:
        network: in unit pixels; trained in place, and in eval mode when the call returns.
        store: where the images are.
        extra: (n,) the extra set, as indices of the store.
        batches: how many optimizer steps; the set is shuffled anew whenever it has been gone through.
        adversarial: make untargeted adversarial examples of each batch, in eval mode (Eq. 6), and train on these.
        teacher: the infected model, in eval mode; None leaves the labels alone to say what is right.
        suspects: images that screening flagged, at least one: their labels are unlearned beside each batch.
        worn: what breaks the infected model, patches and overlays, see `universal` and `overlay`: a share of each plain
            batch wears one of each kind. One overlay at a time follows the model as it changes: what the first search
            has not seen of a trigger is seen once the rest is unlearned. With `how.shared` they stay as they are and
            mark images to be unlearned, as far as both models give these one wrong class.
        how: rates, batch size, perturbation.
        generator: order and augmentation, on the CPU.
        processes: ranks that share the work. The perturbations, most of the cost, are made in parts; the optimizer step
            is repeated on every rank, so that BatchNorm sees the whole batch.
        stage: progress, counted in images.
        classes: outputs of the network, where they are more than the data's classes.

    Returns:
        The mean loss over all images; infinite as soon as a batch's loss is not finite, and training stops there, or
        if the network's weights are not finite at the end.

    Deviation from the paper: adversarial examples are made batch by batch against the current model, as in the authors'
    code, where Algorithm 1 reads as if they were all made at once; each step has its own optimizer and rate schedule;
    gradients are clipped. The second term (what the model knew is kept, but not under a perturbation), the third (also
    between the images m = a x + (1 - a) x', of which there are many more), the fourth (likewise its features g, what
    enters the last layer), the last two (see `shared`), and what is worn are additions: with `kept=0`, `mixed=0`,
    `features=0`, `shared=0`, no suspects and nothing worn this is the paper's.
    """
    device = device_of(network)
    classes = classes or store.num_classes
    unbroken = _finite(network)  # some models keep infinities, such as the mask of an attention
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=how.lr,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
        nesterov=how.momentum > 0,
        foreach=True,
    )
    beside = max(1, round(UNLEARNED * how.batch_size))
    wrong = None if suspects is None else shuffled_batches(suspects, batches, beside, generator)
    wearable = [[trigger.to(device) for trigger in kind] for kind in worn]
    network.train(not how.shared)
    total, seen = 0.0, 0
    taps, few = ExitStack(), store.batch(extra[:2], device)
    now, before = (
        taps.enter_context(watched(classifier_layer(each, classes, few))) for each in (network, teacher or network)
    )
    for step, index in enumerate(shuffled_batches(extra, batches, how.batch_size, generator)):
        for group in optimizer.param_groups:
            group["lr"] = how.rate_at((step + 0.5) / batches, adversarial)
        plain = random_view(store.batch(index, device), generator, flip=how.flip)
        x, y = plain, torch.from_numpy(store.labels[index]).to(device)
        if adversarial:
            x = attacked(network, x, y, how, processes)
        elif wearable and not how.shared:
            for kind in wearable:
                turn = step % len(kind)
                kind[turn] = kind[turn].followed(network, plain, y, generator)
            x = _wearing(x, wearable, generator)
        flagged = None if wrong is None else next(wrong)
        if flagged is not None:
            x = torch.cat([x, random_view(store.batch(flagged, device), generator, flip=how.flip)])
        with autocast(device):
            logits = network(x).float()
        loss = F.cross_entropy(logits[: len(y)], y)
        if teacher is not None:
            features = now.read(logits)[: len(y)]
            loss = (1 - how.kept) * loss + _kept_to(logits[: len(y)], features, teacher, before, plain, how)
            if how.mixed:
                loss = loss + how.mixed * _kept_between(network, teacher, plain, y, generator)
            if how.shared and not adversarial:
                part, far = math.ceil(PART * len(y)), step % 2 == 1
                found = shared_adversarial(network, teacher, plain[:part], y[:part], far=far, generator=generator)
                loss = loss + how.shared * unlearned(network, *found)
                for kind in wearable:
                    moved, right = kind[step % len(kind)].on(plain[-part:]), y[-part:]
                    found = moved, agreed_wrong(network, teacher, moved, right)
                    loss = loss + how.shared * unlearned(network, *found)
        if flagged is not None:
            given = torch.from_numpy(store.labels[flagged]).to(device)
            loss = loss + how.unlearn * disbelief(logits[len(y) :], given).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), LONGEST_STEP)
        optimizer.step()
        value = float(loss.detach())
        total, seen = total + value * len(index), seen + len(index)
        stage.advance(len(index), loss=value)
        if not math.isfinite(value):
            break
    taps.close()
    network.eval()
    # The last step may have broken weights or running statistics that no loss was computed with any more.
    whole = unbroken <= _finite(network)
    return total / max(1, seen) if whole and math.isfinite(total) else math.inf


def _finite(network: UnitPixels) -> set[str]:
    """The weights and buffers that are finite throughout."""
    return {name for name, value in held_by(network).items() if bool(value.isfinite().all())}


def _kept_to(
    logits: Tensor, features: Tensor, teacher: UnitPixels, before: Tap, plain: Tensor, how: FineTuning
) -> Tensor:
    """The divergence from what the teacher says of the unperturbed images, and from how it sees them."""
    with torch.no_grad(), autocast(plain.device):
        answers = teacher(plain).float()
    kept = how.kept * F.kl_div(logits.log_softmax(1), answers.softmax(1), reduction="batchmean")
    if how.features:
        kept = kept + how.features * (1 - F.cosine_similarity(features, before.read(answers))).mean()
    return kept


def _wearing(x: Tensor, worn: Sequence[Sequence[Worn]], generator: torch.Generator) -> Tensor:
    """(B, C, H, W) of which the first wear a trigger of the first kind, and so on: batches are in random order."""
    count = round((WORN if len(worn) == 1 else WORN_EACH) * len(x))
    parts: list[Tensor] = []
    for triggers in worn:
        which = torch.randint(len(triggers), (count,), generator=generator).tolist()
        parts += [triggers[k].on(x[i : i + 1]) for i, k in enumerate(which, start=len(parts))]
    return torch.cat([*parts, x[len(parts) :]]).contiguous(memory_format=torch.channels_last)


def _kept_between(network: UnitPixels, teacher: UnitPixels, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """The divergence from what the teacher says of mixtures of two images, as far as it can be believed.

    The teacher may take a mixture for a triggered image. So its answer counts only where it names one of the two labels
    and the network, which was adversarially trained from a new last layer, names the same one. Measured: without these
    conditions a blended trigger comes back; with them less of it.
    """
    share = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    mixtures = share * x + (1 - share) * x[partner]
    with autocast(x.device):
        now = network(mixtures).float()
        with torch.no_grad():
            before = teacher(mixtures).float()
    said = before.argmax(1)
    believed = ((said == y) | (said == y[partner])) & (said == now.argmax(1))
    return (F.kl_div(now.log_softmax(1), before.softmax(1), reduction="none").sum(1) * believed).mean()


def attacked(network: UnitPixels, x: Tensor, y: Tensor, how: FineTuning, processes: Processes) -> Tensor:
    r"""Untargeted adversarial examples of one batch (Eq. 6), made in parts where there are several processes.

    Args:
        network: in any mode; attacked in eval mode, and as before when the call returns.
        x: (B, C, H, W) in [0, 1], the same on every rank.
        y: (B,) labels.
        how: the perturbation.
        processes: rank r makes images r, r + world, ...

    Returns:
        (B, C, H, W) in [0, 1], the same on every rank.
    """
    part = slice(processes.rank, None, processes.world)
    result = torch.zeros_like(x)
    if len(x[part]):
        with frozen(network), autocast(x.device):
            result[part] = untargeted(network, x[part], y[part], eps=how.eps, norm=how.norm, steps=how.attack_steps)
    if processes.world > 1:
        torch.distributed.all_reduce(result)
    return result


def shuffled_batches(
    index: NDArray[np.int64], batches: int, batch_size: int, generator: torch.Generator
) -> Iterator[NDArray[np.int64]]:
    """Exactly `batches` batches, going through the shuffled indices again and again.

    The parts of one pass are of equal size up to one image, and of two at least: a single image, which would break
    BatchNorm, is there twice.
    """
    index = np.repeat(index, 2) if len(index) == 1 else index
    parts = max(1, min(math.ceil(len(index) / batch_size), len(index) // 2))
    done = 0
    while done < batches:
        order = torch.randperm(len(index), generator=generator).numpy()
        for part in np.array_split(index[order], parts)[: batches - done]:
            yield part
            done += 1


@torch.no_grad()
def logits_of(network: UnitPixels, store: ImageStore, index: NDArray[np.int64]) -> Iterator[Tensor]:
    """Logits in eval mode, batch by batch: (b, K) float32 for consecutive parts of `index`."""
    for x, _ in _in_parts(store, index, device_of(network)):
        with frozen(network), autocast(x.device):
            logits = network(x).float()
        yield logits


def _in_parts(
    store: ImageStore, index: NDArray[np.int64], device: torch.device, most: int = AT_ONCE
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of `index` in their order, `most` at once, of large ones fewer."""
    size = at_once(store.shape, most)
    for start in range(0, len(index), size):
        part = index[start : start + size]
        yield store.batch(part, device), torch.from_numpy(store.labels[part]).to(device)


def fitting_radius(
    network: UnitPixels, store: ImageStore, index: NDArray[np.int64], how: FineTuning, *, moved: float = 0.25
) -> float:
    r"""The smallest of eps, 2 eps, 4 eps and 8 eps at which the attack works at all on this model and these images.

    6/255 for each image, the value of PBE's authors' code, moves nearly every CIFAR-10 image across a class border; on
    8 pixel digits it moves none, and adversarial fine-tuning is then plain fine-tuning.

    Args:
        network: the model as it came.
        store: where the images are.
        index: (n,) the images to try it on; a hundred do.
        how: norm, steps and the smallest radius.
        moved: share of the images whose prediction has to change.
    """
    device, eps = device_of(network), how.eps
    for _ in range(3):
        changed = 0
        for x, y in _in_parts(store, index, device, how.batch_size):
            with frozen(network), autocast(device):
                other = untargeted(network, x, y, eps=eps, norm=how.norm, steps=how.attack_steps)
                with torch.no_grad():
                    changed += int((network(other).argmax(1) != network(x).argmax(1)).sum())
        if changed >= moved * len(index):
            break
        eps *= 2
    return eps


def mirrors_alike(network: UnitPixels, store: ImageStore, index: NDArray[np.int64], *, least: float = 0.85) -> bool:
    """Whether the model is right nearly as often in a mirror; on digits and signs it is not.

    Not whether it says the same of both: a model that is right on nine of ten images and makes other mistakes in the
    mirror was trained on mirrored images all the same.

    Args:
        network: the model as it came.
        store: where the images are.
        index: (n,) the images to try it on; some hundreds do.
        least: the accuracy in the mirror, as a share of that without.
    """
    device = device_of(network)
    right = mirrored = 0
    for x, y in _in_parts(store, index, device):
        with frozen(network), torch.no_grad(), autocast(device):
            right += int((network(x).argmax(1) == y).sum())
            mirrored += int((network(x.flip(3)).argmax(1) == y).sum())
    return mirrored >= max(1, least * right)


def accuracy(network: UnitPixels, store: ImageStore, index: NDArray[np.int64]) -> float:
    """Share of the indexed images that the network gives their label, in [0, 1]."""
    predicted = [logits.argmax(1).cpu() for logits in logits_of(network, store, index)]
    return float((torch.cat(predicted).numpy() == store.labels[index]).mean())
