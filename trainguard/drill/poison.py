r"""An attack is a list of rules, applied to a map-style data set or to arrays, with the same pixels either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainguard.drill.labels import LabelRule
from trainguard.drill.select import Select
from trainguard.drill.triggers import Trigger
from trainguard.errors import DataError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHUNK = 256  # images that are float64 at a time


class Role(IntEnum):
    r"""What a training sample is to the attacker."""

    CLEAN = 0
    PAYLOAD = 1  # teaches the backdoor
    COVER = 2  # holds a trigger under its true label, to hide the payload or to sharpen the trigger


@dataclass(frozen=True, eq=False)
class Rule:
    r"""Who gets which pixels under which label."""

    select: Select
    trigger: Trigger
    label: LabelRule
    role: Role = Role.PAYLOAD


@dataclass(frozen=True, eq=False)
class Attack:
    r"""A backdoor attack as data.

    Args:
        name: short name.
        train: rules for the training set; they take disjoint samples, in this order.
        test: rules for the test set, one per backdoor; samples whose label a rule would not change are left out. A
            single rule may stand for itself, here as in `train`.
        craft: for attacks that must be fitted to the data first: (images, labels, seed) to the fitted attack. See
            `fitted`.
    """

    name: str
    train: tuple[Rule, ...] = ()
    test: tuple[Rule, ...] = ()
    craft: Callable[[Tensor, Tensor, int], Attack] | None = None

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            rules = getattr(self, name)
            object.__setattr__(self, name, (rules,) if isinstance(rules, Rule) else tuple(rules))


def fitted(attack: Attack, images: Tensor, labels: Tensor, seed: int = 0) -> Attack:
    r"""The attack, ready for use: fitted to the data where it has something to fit, else as it is.

    Args:
        attack: what to fit.
        images: (N, C, H, W) uint8 clean training images.
        labels: (N,) int64 true labels.
        seed: of the fit.

    Raises:
        DataError: images that are not bytes, or labels that are no integers.
    """
    _check_arrays(images, labels)
    labels = labels.long()
    return attack if attack.craft is None else attack.craft(images, labels, seed)


@dataclass(frozen=True)
class Plan:
    r"""Which sample is poisoned how.

    Attributes:
        rule: (N,) int16, number of the rule that has the sample, -1 for none.
        labels: (N,) int64 labels after poisoning.
        role: (N,) int8, see `Role`.
    """

    rule: np.ndarray
    labels: np.ndarray
    role: np.ndarray


def plan(labels: np.ndarray, attack: Attack, seed: int) -> Plan:
    r"""Choose the samples of each rule.

    Args:
        labels: (N,) int64 true labels.
        attack: what to do.
        seed: seed of the choice.

    Raises:
        ValueError: a rate that cannot be had.
    """
    labels = np.asarray(labels, dtype=np.int64)
    out = Plan(np.full(len(labels), -1, np.int16), labels.copy(), np.zeros(len(labels), np.int8))
    rng = np.random.default_rng(seed)
    for number, rule in enumerate(attack.train):
        try:
            index = rule.select(labels, out.rule < 0, rng)
        except ValueError as error:
            raise ValueError(f"attack {attack.name!r}, {rule.role.name.lower()}: {error}") from None
        if not (out.rule[index] < 0).all():
            raise ValueError(
                f"attack {attack.name!r}: rule {number} takes samples of an earlier one: choose among free"
            )
        out.rule[index] = number
        out.labels[index] = rule.label(labels)[index]
        out.role[index] = rule.role
    return out


@dataclass(eq=False)
class Poisoned(Dataset):
    r"""A map-style data set with an attack in it; poisoned samples are made when they are read.

    Args:
        dataset: gives (image (C, H, W) float in [0, 1], label); the first sample and all that are poisoned are checked.
        attack: a fitted attack (see `fitted`).
        seed: chooses the samples and everything random about their triggers.
        true_labels: (N,) int64, where known; read from the data set otherwise, once.

    Attributes:
        labels: (N,) int64 labels after poisoning.
        role: (N,) int8, see `Role`.
        poisoned_index: indices of the payload samples.
    """

    dataset: Dataset
    attack: Attack
    seed: int = 0
    true_labels: np.ndarray | None = None
    labels: np.ndarray = field(init=False)
    role: np.ndarray = field(init=False)
    poisoned_index: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"expected an Attack, got {type(self.attack).__name__}: attack(name) makes one")
        if self.attack.craft is not None:
            raise ValueError(f"attack {self.attack.name!r} must be fitted first: fitted(attack, images, labels)")
        count = len(self.dataset)  # type: ignore[arg-type]
        _check_sample(self.dataset[0])
        if self.true_labels is None:
            self.true_labels = np.array([int(self.dataset[i][1]) for i in range(count)], dtype=np.int64)
        if len(self.true_labels) != count:
            raise DataError(f"expected {count} true_labels=, one for each sample, got {len(self.true_labels)}")
        self._plan = plan(self.true_labels, self.attack, self.seed)
        self.labels, self.role = self._plan.labels, self._plan.role
        self.poisoned_index = np.flatnonzero(self.role == Role.PAYLOAD)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        sample = self.dataset[i]
        image, rule = sample[0], self._plan.rule[i]
        if rule >= 0:
            _check_sample(sample)
            pixels = _apply(self.attack.train[rule].trigger, image[None], np.array([i % len(self)]), self.seed)
            image = pixels[0].to(image.dtype) / 255
        return image, int(self.labels[i])


def _check_sample(sample: Any) -> None:
    """Triggers are laid on pixels in [0, 1]; on anything else they would be wrong without a word."""
    image: Any = sample[0] if isinstance(sample, tuple | list) and len(sample) >= 2 else None
    fits = isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3
    if not fits or not 0 <= float(image.min()) <= float(image.max()) <= 1:
        values = f" with values from {float(image.min()):.3g} to {float(image.max()):.3g}" if fits else ""
        came = type(sample).__name__ if image is None else f"{getattr(image, 'dtype', type(image).__name__)}{values}"
        raise DataError(
            f"expected samples (image, label) with images (C, H, W) of floats in [0, 1], got {came}: poison the data "
            "set before it is normalised, behind ToTensor; poison_arrays takes uint8 tensors"
        )


def _check_arrays(images: Any, labels: Any) -> None:
    for what, values, kinds in (("images", images, (torch.uint8,)), ("labels", labels, INTEGERS)):
        if not (isinstance(values, Tensor) and values.dtype in kinds):
            came = getattr(values, "dtype", type(values).__name__)
            raise DataError(f"expected {what} as a tensor of {kinds[0]}, got {came}: convert them first")


def poison(dataset: Dataset, attack: Attack, seed: int = 0) -> Poisoned:
    r"""`dataset` with `attack` in it, see `Poisoned`.

    Raises:
        DataError: its images are not (C, H, W) floats in [0, 1].
    """
    return Poisoned(dataset, attack, seed)


def poison_arrays(images: Tensor, labels: Tensor, attack: Attack, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r"""The same for a data set in memory.

    Args:
        images: (N, C, H, W) uint8; not changed.
        labels: (N,) int64 true labels.
        attack: a fitted attack.
        seed: as for `Poisoned`, and with the same outcome.

    Returns:
        Images (N, C, H, W) uint8, labels (N,) int64, role (N,) int8 (see `Role`).
    """
    _check_arrays(images, labels)
    plot = plan(labels.numpy(), attack, seed)
    out = images.clone()
    for number, rule in enumerate(attack.train):
        _write(out, images, np.flatnonzero(plot.rule == number), rule.trigger, seed)
    return out, torch.from_numpy(plot.labels), torch.from_numpy(plot.role)


def triggered_test(images: Tensor, labels: Tensor, attack: Attack, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r"""What the attack success rate is measured on: only samples whose label the attack would change.

    Args:
        images: (N, C, H, W) uint8 clean test images.
        labels: (N,) int64 true labels.
        attack: a fitted attack; where it has several test rules, their samples follow one another.
        seed: of random triggers.

    Returns:
        Triggered images (M, C, H, W) uint8, true labels (M,) int64, target labels (M,) int64.

    Raises:
        ValueError: the test set has no sample whose label the attack would change.
    """
    _check_arrays(images, labels)
    truth = labels.numpy().astype(np.int64)
    kept, targets, pixels = [], [], []
    for rule, index, target in plan_test(truth, attack, seed):
        out = images[index]
        _write(out, images[index], np.arange(len(index)), rule.trigger, seed, index)
        kept.append(truth[index])
        targets.append(target)
        pixels.append(out)
    return torch.cat(pixels), torch.from_numpy(np.concatenate(kept)), torch.from_numpy(np.concatenate(targets))


def plan_test(labels: np.ndarray, attack: Attack, seed: int) -> list[tuple[Rule, np.ndarray, np.ndarray]]:
    r"""Each rule for the test set with the samples whose label it changes, and what it changes them to.

    Args:
        labels: (N,) int64 true labels.
        attack: what to do.
        seed: seed of the choice.

    Raises:
        ValueError: there is no such sample.
    """
    rng = np.random.default_rng(seed)
    out = []
    for rule in attack.test:
        try:
            index = rule.select(labels, np.ones(len(labels), bool), rng)
        except ValueError as error:
            raise ValueError(f"attack {attack.name!r}, test images: {error}") from None
        target = rule.label(labels)
        index = index[target[index] != labels[index]]
        out.append((rule, index, target[index]))
    if sum(len(index) for _, index, _ in out) == 0:
        raise ValueError(f"attack {attack.name!r} would change the label of none of the {len(labels)} test images")
    return out


def _write(
    out: Tensor, images: Tensor, rows: np.ndarray, trigger: Trigger, seed: int, index: np.ndarray | None = None
) -> None:
    index = np.arange(len(images)) if index is None else index
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        out[part] = _apply(trigger, images[part].to(torch.float32) / 255, index[part], seed)


def _apply(trigger: Trigger, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
    # float64, so that a batch and a single sample round to the same pixel; a copy, as a trigger may write in place
    made = trigger(images.to(torch.float64, copy=True), index, seed)
    if made.shape != images.shape:
        raise ValueError(
            f"the trigger {type(trigger).__name__} made {tuple(made.shape)} of images {tuple(images.shape)}: it must "
            "keep their shape"
        )
    return (made * 255).round().clamp(0, 255).to(torch.uint8)
