"""The images behind a screening: a few thumbnails and the averages that make a trigger visible.

Screening collects them while the data set is at hand, so that the report can be made later, elsewhere, without it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore

THUMBNAIL_SIDE = 96  # pixels; 200 of them stay well under a page's 10 MB
AVERAGE_SIDE = 224  # keeps a 4-pixel patch of a 512-pixel image visible
GROUPS = 6  # classes whose flagged samples are shown side by side
CARDS = 48  # flagged samples shown in all
CARDS_PER_GROUP = 24
BORDERLINE = 24
MAPPED = (900, 600)  # most kept and most flagged samples on the map: t-SNE of 1,500 takes a few seconds
NAMED = 1000  # flagged samples listed by name
AVERAGED_PIXELS = 50_000_000  # bounds the reading per class: 1,000 images of 32 x 32, 190 of 512 x 512
AVERAGED = (64, 1000)  # fewest and most images in an average


@dataclass(frozen=True)
class Evidence:
    """What the report shows of a data set; positions point into `thumbnails`, indices into the data set.

    Attributes:
        thumbnails: (T, h, w, C) uint8, at most `THUMBNAIL_SIDE` pixels a side.
        index: (T,) int64, the data set's index of each thumbnail.
        cards: (F, 3) int64, positions of a flagged sample, of a kept one with the same label, and of a kept one with
            the label that it would get; -1 where there is none. Evenly spread from the most to the least suspicious.
        borderline: (B,) int64, positions of the samples nearest to their class's threshold, on both sides.
        named: (M,) int64, the indices that have a name: thumbnails, the most suspicious samples, unreadable ones.
        names: (M,) str, row or path of each, and why it could not be read.
        groups: (G,) int64, labels that have flagged samples, those with most first.
        counts: (G,) int64, how many flagged images the averages below stand on.
        kept_counts: (G,) int64, how many different kept images; 0 where none has a label that those would get, and the
            average is of any kept ones.
        flagged_mean: (G, H, W, C) float32 in [0, 1], average of flagged samples with that label.
        flagged_var: (G, H, W, C) float32, their variance.
        kept_mean: (G, H, W, C) float32, average of kept samples that have the labels which those would get: what the
            flagged ones would look like without the trigger.
        kept_var: (G, H, W, C) float32, their variance.
        mapped: (P,) int64, the indices on the map of samples.
        features: (P, D) float16, what the probe saw in them.
    """

    thumbnails: NDArray[np.uint8]
    index: NDArray[np.int64]
    cards: NDArray[np.int64]
    borderline: NDArray[np.int64]
    named: NDArray[np.int64]
    names: NDArray[np.str_]
    groups: NDArray[np.int64]
    counts: NDArray[np.int64]
    kept_counts: NDArray[np.int64]
    flagged_mean: NDArray[np.float32]
    flagged_var: NDArray[np.float32]
    kept_mean: NDArray[np.float32]
    kept_var: NDArray[np.float32]
    mapped: NDArray[np.int64]
    features: NDArray[np.float16]

    def to_arrays(self) -> dict[str, NDArray]:
        """Every field by its name, ready for `numpy.savez`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> Evidence:
        """The inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def collect_evidence(
    store: ImageStore,
    score: NDArray[np.float32],
    suspect: NDArray[np.bool_],
    labels: NDArray[np.int64],
    proposed: NDArray[np.int64],
    thresholds: NDArray[np.float32] | None = None,
    mapped: NDArray[np.int64] | None = None,
    features: NDArray[np.floating] | None = None,
) -> Evidence:
    """Read the few images that a report shows. The same arguments give the same evidence.

    Args:
        store: the images.
        score: (N,) higher is more suspicious; NaN where unreadable.
        suspect: (N,) True for flagged samples.
        labels: (N,) given labels; -1 where unreadable.
        proposed: (N,) the label each sample would get.
        thresholds: (K,) the score from which each class is flagged; inf where nothing is. Without them the flagged
            samples of least score and the kept ones of most count as borderline.
        mapped: (P,) the samples on the map, see `samples_for_map`.
        features: (P, D) the probe's features of these.
    """
    findings = _Findings(score, suspect, labels, proposed)
    groups = findings.groups()
    rng = np.random.default_rng(0)
    cards = findings.cards(groups, rng)
    near = findings.borderline(thresholds)
    moments = [_group_moments(store, findings, int(label), rng) for label in groups]
    index = np.unique(np.r_[cards[cards >= 0], near]).astype(np.int64)
    told = np.r_[index, findings.ranked(suspect)[:NAMED], np.flatnonzero(labels < 0)[:NAMED]]
    named = np.unique(told).astype(np.int64)
    return Evidence(
        thumbnails=_thumbnails(store, index),
        index=index,
        cards=np.where(cards >= 0, np.searchsorted(index, cards), -1),
        borderline=np.searchsorted(index, near),
        named=named,
        names=np.array([store.described(int(i)) for i in named], dtype=np.str_),
        groups=groups,
        counts=np.array([count for count, *_ in moments], dtype=np.int64),
        kept_counts=np.array([count for *_, count in moments], dtype=np.int64),
        flagged_mean=_stacked([m[1] for m in moments]),
        flagged_var=_stacked([m[2] for m in moments]),
        kept_mean=_stacked([m[3] for m in moments]),
        kept_var=_stacked([m[4] for m in moments]),
        mapped=np.zeros(0, np.int64) if mapped is None else mapped,
        features=np.zeros((0, 0), np.float16) if features is None else features.astype(np.float16),
    )


def samples_for_map(suspect: NDArray[np.bool_], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which samples to draw on the map: some kept and some flagged ones, at random, the same every time.

    Args:
        suspect: (N,) True for flagged samples.
        labels: (N,) given labels; -1 where unreadable.
    """
    rng = np.random.default_rng(0)
    readable = labels >= 0
    pools = [(np.flatnonzero(readable & side), most) for side, most in zip((~suspect, suspect), MAPPED, strict=True)]
    return np.sort(np.concatenate([rng.choice(pool, size=min(len(pool), most), replace=False) for pool, most in pools]))


@dataclass(frozen=True)
class _Findings:
    """The four arrays of a result that decide which samples are shown; (N,) each."""

    score: NDArray[np.float32]
    suspect: NDArray[np.bool_]
    labels: NDArray[np.int64]
    proposed: NDArray[np.int64]

    def groups(self) -> NDArray[np.int64]:
        """The labels with most flagged samples, largest first."""
        values, counts = np.unique(self.labels[self.suspect], return_counts=True)
        return values[np.argsort(-counts, kind="stable")][:GROUPS].astype(np.int64)

    def ranked(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Indices of the chosen samples, most suspicious first."""
        members = np.flatnonzero(chosen)
        return members[np.argsort(-self.score[members], kind="stable")]

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Readable samples that were not flagged."""
        return np.flatnonzero(~self.suspect & (self.labels >= 0))

    def kept_like(self, wanted: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """A kept sample with each of the wanted labels, drawn at random; -1 where no such sample was kept."""
        drawn = np.full(len(wanted), -1, dtype=np.int64)
        for label in np.unique(wanted):
            pool = self.kept[self.labels[self.kept] == label]
            places = wanted == label
            if len(pool):
                drawn[places] = rng.choice(pool, size=int(places.sum()))
        return drawn

    def cards(self, groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """(F, 3): a flagged sample, a kept one with the same label, a kept one with the proposed label; -1 for none."""
        chosen = []
        for label in groups:
            ranked = self.ranked(self.suspect & (self.labels == label))
            places = min(len(ranked), CARDS_PER_GROUP, CARDS // len(groups))
            chosen.append(ranked[np.linspace(0, len(ranked) - 1, places).round().astype(int)])
        if not chosen:
            return np.zeros((0, 3), dtype=np.int64)
        shown = np.concatenate(chosen)
        same = self.kept_like(self.labels[shown], rng)
        other = self.kept_like(self.proposed[shown], rng)
        other[self.proposed[shown] == self.labels[shown]] = -1
        return np.stack([shown, same, other], axis=1)

    def borderline(self, thresholds: NDArray[np.float32] | None) -> NDArray[np.int64]:
        """Indices next to their class's threshold, half from each side where both have enough."""
        readable = np.flatnonzero((self.labels >= 0) & np.isfinite(self.score))
        score, suspect = self.score[readable], self.suspect[readable]
        line = np.full(len(readable), np.inf) if thresholds is None else thresholds[self.labels[readable]]
        margin = np.where(np.isfinite(line), np.abs(score - line), np.inf)
        # Where a class has no threshold the order among its samples is that of the scores, nearest to flagged first.
        order = readable[np.lexsort((np.where(suspect, score, -score), margin))]
        flagged = order[self.suspect[order]][: BORDERLINE // 2]
        kept = order[~self.suspect[order]][: BORDERLINE - len(flagged)]
        return np.r_[flagged, kept].astype(np.int64)


def _group_moments(store: ImageStore, findings: _Findings, label: int, rng: np.random.Generator):
    """Count, mean and variance of flagged samples of a label; mean, variance and count of kept ones matched to them."""
    _, height, width = store.shape
    most = int(np.clip(AVERAGED_PIXELS // (height * width), *AVERAGED))
    flagged = findings.ranked(findings.suspect & (findings.labels == label))[:most]
    matched = findings.kept_like(findings.proposed[flagged], rng)
    matched = matched[matched >= 0]
    different = len(np.unique(matched))
    if not different:
        matched = rng.choice(findings.kept, size=len(flagged)) if len(findings.kept) else flagged
    return len(flagged), *_moments(store, flagged), *_moments(store, matched), different


def _moments(store: ImageStore, index: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    total, square = torch.zeros(()), torch.zeros(())
    for part in _parts(store, index):
        images = _at_most(part, AVERAGE_SIDE).double()
        total = total + images.sum(0)
        square = square + images.square().sum(0)
    mean = total / len(index)
    var = (square / len(index) - mean**2).clamp(min=0)
    return _channels_last(mean), _channels_last(var)


def _thumbnails(store: ImageStore, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    parts = [_at_most(part, THUMBNAIL_SIDE) for part in _parts(store, index)]
    if not parts:
        return np.zeros((0, 1, 1, store.shape[0]), dtype=np.uint8)
    return (torch.cat(parts).permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().numpy()


def _parts(store: ImageStore, index: NDArray[np.int64], size: int = 64):
    for start in range(0, len(index), size):
        yield store.batch(index[start : start + size]).float().cpu()


def _at_most(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) shrunk, in proportion, until neither side is longer than `side`."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def _channels_last(image: Tensor) -> NDArray[np.float32]:
    return image.permute(1, 2, 0).float().numpy()


def _stacked(images: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(images) if images else np.zeros((0, 1, 1, 1), dtype=np.float32)
