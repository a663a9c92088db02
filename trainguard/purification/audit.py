r"""Is this model backdoored? Where its untargeted adversarial examples fall, class by class (PBE Sec. 3.4.1)."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainguard.errors import DataError
from trainguard.perturbation import Norm, frozen, untargeted
from trainguard.progress import Progress
from trainguard.purification.network import UnitPixels, check_outputs, classifier_layer, copy_of, for_training
from trainguard.purification.results import AuditResult
from trainguard.purification.state import Indices, open_store
from trainguard.rng import isolated_rng
from trainguard.training import autocast

if TYPE_CHECKING:
    from trainguard.data.pixels import PixelRange
    from trainguard.data.store import ImageStore
    from trainguard.progress import Stage

Verdict = Literal["clean", "backdoored", "undecided"]

TO_ONE = 0.25  # excess of the strongest pull over an even one; the paper's 'more than 40%' of ten classes is 0.32
TO_ALL = 0.5  # median one-sidedness of the moves
BAND = 0.1  # half of it on either side of a threshold is undecided
LEAST_MOVED = 50  # adversarial examples; the standard error of a share is then at most 0.07


def audit(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    *,
    accelerator: Any = None,
    seed: int = 0,
    progress: bool = True,
    pixel_range: PixelRange | None = None,
    images: int = 1000,
    eps: float = 6 / 255,
    norm: Norm = "linf",
    attack_steps: int = 7,
    batch_size: int = 128,
) -> AuditResult:
    r"""Look for a backdoor in a trained model, by the paper's observation that adversarial examples give it away.

    An untargeted adversarial example of a benign model may become anything; one of an infected model is more likely
    than not to become the target class, because the trigger's neurons are the shortest way out (Figs. 1 and 4).

    Args:
        model: the trained model, on any device; never changed. Or a function that returns a copy of it.
        data: labelled images of the kind it was trained on; its training set will do, poison included.
        accelerator: says where to compute; every process comes to the same verdict. None: where the model is.
        seed: of the choice of images.
        progress: show it.
        pixel_range: what the model's input values mean. None: found from the data set's transforms.
        images: how many to attack, equally many of every class, among those that the model gets right.
        eps: radius of the perturbation in unit pixel space.
        norm: `"linf"` or `"l2"`.
        attack_steps: gradient steps, each of `eps / 5`.
        batch_size: images per batch.

    Returns:
        The verdict and the evidence.

    Raises:
        DataError: the data cannot be used, or the model gets none of them right.
        ModelError: the model cannot be copied, or does not fit the data.

    Deviation from the paper: without the trigger, Table 5's distance to triggered images cannot be had; the distance
    to the images of each class stands in for it (the paper's Fig. 5: triggered images lie with the target class).
    """
    started = time.perf_counter()
    store = open_store(data, pixel_range)
    net = copy_of(model)
    device = accelerator.device if accelerator is not None else next(net.parameters()).device
    network = UnitPixels(for_training(net, device), store.pixel_range)
    index = balanced(store, images, seed)
    with isolated_rng(seed), frozen(network):
        classes = check_outputs(network, store.batch(index[:2], device), store.num_classes)
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
    pull = pull_of(counts)
    verdict, confidence, reason, targets = judge(counts)
    return AuditResult(
        verdict=verdict,
        confidence=confidence,
        reason=reason,
        target_classes=targets,
        transitions=(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32),
        pull=pull.astype(np.float32),
        movement=movement_of(labels[right], seen["features"][right], seen["features after"][right], classes),
        images=int(right.sum()),
        class_names=tuple(store.class_names),
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
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        timing={"total": time.perf_counter() - started},
    )


def transition_counts(labels: Indices, predicted: Indices, classes: int) -> NDArray[np.int64]:
    """(K, K) how many adversarial examples of class i are predicted as j.

    Args:
        labels: (n,) classes before the attack.
        predicted: (n,) classes after it.
        classes: K.
    """
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def pull_of(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""(K,) the share of adversarial examples of the other classes that end in each class, of those that moved at all.

    .. math:: p_j = \sum_{i \ne j} n_{ij} \Big/ \sum_{i \ne j} \sum_{k \ne i} n_{ik}

    A uniform model has :math:`1 / (K - 1)` everywhere.
    """
    moved = counts - np.diag(np.diag(counts))
    leaving = moved.sum(axis=1)
    return moved.sum(axis=0) / np.maximum(leaving.sum() - leaving, 1)


def one_way(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""(K,) how one-sided each class's most frequent move is: :math:`\max_j (P_{ij} - P_{ji})`.

    Classes that merely look alike move to each other both ways; an all-to-all backdoor moves them one way (i to i + 1).
    """
    moved = (counts - np.diag(np.diag(counts))).astype(float)
    share = moved / np.maximum(moved.sum(axis=1, keepdims=True), 1)
    return (share - share.T).max(axis=1)


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


def judge(counts: NDArray[np.int64]) -> tuple[Verdict, float, str, tuple[int, ...]]:
    """The verdict that a matrix of transitions supports.

    Args:
        counts: (K, K) from `transition_counts`.

    Returns:
        Verdict, confidence in [0, 1], the reason in one sentence, and the suspected target classes.
    """
    classes = len(counts)
    moved = int(counts.sum() - np.trace(counts))
    if classes < 3:
        return "undecided", 0.0, "with two classes every adversarial example falls to the other one", ()
    if moved < LEAST_MOVED:
        return "undecided", 0.0, f"only {moved} adversarial examples changed class: raise eps= or images=", ()
    pull, oneway = pull_of(counts), one_way(counts)
    uniform = 1 / (classes - 1)
    to_one = (float(pull.max()) - uniform) / (1 - uniform)
    to_all = float(np.median(oneway))
    evidence = max((to_one - TO_ONE) / BAND, (to_all - TO_ALL) / BAND)
    chance = float(1 / (1 + np.exp(-4 * evidence)))  # 0.98 one band above the threshold
    target = int(pull.argmax())
    words = f"{pull[target]:.0%} of adversarial examples fall to class {target}, {uniform:.0%} would be even"
    if abs(evidence) < 0.5:
        return "undecided", chance, words, ()
    if evidence < 0:
        return "clean", 1 - chance, words, ()
    if to_one >= TO_ONE:
        strong = [int(j) for j in np.argsort(-pull) if (pull[j] - uniform) / (1 - uniform) >= TO_ONE]
        return "backdoored", chance, words, tuple(strong)
    words = f"adversarial examples move one way between classes ({to_all:.0%}), as under an all-to-all backdoor"
    return "backdoored", chance, words, tuple(range(classes))


def balanced(store: ImageStore, images: int, seed: int) -> Indices:
    """About `images` readable indices, equally many of every class as far as there are, in random order."""
    rng = np.random.default_rng(seed)
    readable = rng.permutation(np.asarray(store.readable, dtype=np.int64))
    labels = store.labels[readable]
    share = max(1, -(-images // max(1, len(np.unique(labels)))))
    chosen = [readable[labels == label][:share] for label in np.unique(labels)]
    if not chosen:
        raise DataError("the data have no readable image")
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
    device = next(network.parameters()).device
    parts: dict[str, list[NDArray]] = {"before": [], "after": [], "features": [], "features after": []}
    with features_of(network.net, classes) as tap, autocast(device):
        for start in range(0, len(index), batch_size):
            part = index[start : start + batch_size]
            x, y = store.batch(part, device), torch.from_numpy(store.labels[part]).to(device)
            moved = untargeted(network, x, y, eps=eps, norm=norm, steps=steps)
            for images, when in ((x, ""), (moved, " after")):
                with torch.no_grad():
                    logits = network(images)
                parts["after" if when else "before"].append(logits.argmax(1).cpu().numpy())
                parts["features" + when].append(tap.read(logits))
            stage.advance(len(part))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


class _Tap:
    """Keeps what went into the classifier's last layer, or takes the logits where there is no such layer."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.last = inputs[0].detach()

    def read(self, logits: Tensor) -> NDArray[np.float32]:
        features = logits if self.last is None else self.last
        return features.float().flatten(1).cpu().numpy()


@contextmanager
def features_of(net: nn.Module, classes: int) -> Iterator[_Tap]:
    """Watch the features while the block runs: the input of the last linear layer with `classes` outputs."""
    tap, layer = _Tap(), classifier_layer(net, classes)
    hook = layer.register_forward_pre_hook(tap) if layer is not None else None
    try:
        yield tap
    finally:
        if hook is not None:
            hook.remove()
