r"""AdvrBD Eq. 5: what was flagged comes back under the labels of a model trained on the clean part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainguard.data.loaders import fed_by
from trainguard.data.reading import shown
from trainguard.data.sources import spread
from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.models import device_of, dtype_of, logits_of
from trainguard.warning import warn

ASKED = 128  # kept samples that say whether a model is asked about what it was trained on
MISSED = 0.15  # of them, that a model must know more of as its loader feeds them; augmented, it knows fewer
BY_CHANCE = 0.02  # probability up to which it is not by chance that it knows so many
Feed = Callable[[np.ndarray], Tensor | None]  # from samples (B,) to model inputs (B, C, H, W); None where it fails


def relabel(
    model: nn.Module,
    images: ImageStore,
    index: np.ndarray,
    *,
    given: np.ndarray,
    batch_size: int = 256,
    feed: Feed | None = None,
) -> np.ndarray:
    r"""Labels for the flagged samples from a model trained without them.

    .. math:: D' = D_{clean} \cup \{(x, \arg\max_k f_{\theta}(x)_k) : x \in D_{poisoned}\}

    AdvrBD Eq. 5, Sec. V-B4. The model runs in eval mode on the decoded images, without augmentation; its mode is put
    back, and no buffer changes.

    Args:
        model: the clean model; eats what `images.as_fed` gives. Outputs beyond the data's classes say nothing.
        images: of the whole data set.
        index: (R,) int64, the flagged samples.
        given: (R,) int64, the labels they came with.
        batch_size: images at once.
        feed: what the model is asked about, where it gives that; else the decoded images as `images.as_fed` has them.

    Returns:
        (R,) int64, the new labels.

    Raises:
        ModelError: the model cannot run on the images, or has fewer outputs than the labels need.

    Deviation from the paper:
        A sample whose prediction is NaN keeps its given label.
    """
    needed = int(images.labels[images.readable].max()) + 1
    labels = given.astype(np.int64)
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(index), batch_size):
                part = slice(start, start + batch_size)
                x = None if feed is None else feed(index[part])
                if x is None:
                    x = images.as_fed(index[part], device)
                outputs = _answers(model, x.to(device, dtype_of(model)))
                if outputs.shape[1] < needed:
                    raise ModelError(
                        f"the model has {outputs.shape[1]} outputs, the data set's labels go up to {needed - 1}: what "
                        "changes labels after the data set belongs into the data set"
                    )
                best, predicted = outputs[:, : images.num_classes].max(dim=1)
                sound = best.isfinite().cpu().numpy()
                labels[part][sound] = predicted.cpu().numpy()[sound]
    finally:
        model.train(mode)  # what a module of its own does in eval mode, such as merging an adapter, it undoes here
        for module, training in modes:
            module.training = training
    return labels


def feed_of(
    model: nn.Module, images: ImageStore, loaders: Sequence[DataLoader], kept: np.ndarray, *, batch_size: int = 256
) -> Feed | None:
    """How a model is to be asked about images: as they are decoded (None), or as one of its loaders feeds them.

    What a pipeline makes of images is found out as far as it can be. Kept samples, whose labels the model has learned,
    say whether something was missed, such as another order of the channels, or what a function of the user's does.

    Args:
        model: see `relabel`.
        images: likewise.
        loaders: that it was trained with.
        kept: (M,) int64, the samples that they gave.
        batch_size: images at once.

    Raises:
        ModelError: see `relabel`.
    """
    some = np.asarray(spread(kept, ASKED))
    labels = images.labels[some]
    unknown = np.full(len(some), -1)

    def known(feed: Feed | None) -> float:
        said = relabel(model, images, some, given=unknown, batch_size=batch_size, feed=feed)
        return float((said == labels).mean())

    best, chosen = known(None), None
    for feed in [partial(fed_by, loader) for loader in loaders if best < 1 - MISSED]:  # else none can be so much better
        try:
            share = known(feed)
        except ModelError:  # what is made of a batch later on is not seen here
            continue
        if share > best + (MISSED if chosen is None else 0):
            best, chosen = share, feed
    usual = float((labels == np.bincount(labels).argmax()).mean())
    if best < 1 - MISSED and binom.sf(round(best * len(some)) - 1, len(some), usual) > BY_CHANCE:
        warn(
            f"the model gives {best:.0%} of {len(some)} kept samples their labels, no more than by chance: either it "
            f"has hardly been trained, or training makes other images of them than are known here (pixels "
            f"{images.pixel_range}). The new labels of flagged samples are no better; pass mean= and std=, or bounds=, "
            "to guard.protect, or relabel later"
        )
    return chosen


def _answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(B, K) probabilities for images (B, C, H, W)."""
    try:
        logits = logits_of(model(x))
    except Exception as error:  # whatever a user's forward may raise
        raise ModelError(
            f"the model cannot run on images of shape {tuple(x.shape)} here, to relabel them: {shown(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        came = f"outputs of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"the model gives {came} for {len(x)} images, and relabelling needs one output for each class: relabel "
            "with a model that has them, or train on without the flagged samples"
        )
    return logits.float().softmax(dim=1)
