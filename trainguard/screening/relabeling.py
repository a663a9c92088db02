r"""AdvrBD Eq. 5: what was flagged comes back under the labels of a model trained on the clean part."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from trainguard.data.reading import shown
from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.models import device_of, dtype_of, logits_of


def relabel(
    model: nn.Module, images: ImageStore, index: np.ndarray, *, given: np.ndarray, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
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

    Returns:
        (labels, confidence): (R,) int64 new labels, and (R,) float32 the softmax probability of each, in [0, 1].

    Raises:
        ModelError: the model cannot run on the images, or has fewer outputs than the labels need.

    Deviation from the paper:
        A sample whose prediction is NaN keeps its given label with confidence 0.
    """
    needed = int(images.labels[images.readable].max()) + 1
    labels, confidence = given.astype(np.int64), np.zeros(len(index), np.float32)
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(index), batch_size):
                part = slice(start, start + batch_size)
                x = images.as_fed(index[part], device).to(dtype_of(model))
                outputs = _answers(model, x)
                if outputs.shape[1] < needed:
                    raise ModelError(
                        f"the model has {outputs.shape[1]} outputs, the data set's labels go up to {needed - 1}: what "
                        "changes labels after the data set belongs into the data set"
                    )
                best, predicted = outputs[:, : images.num_classes].max(dim=1)
                sound = best.isfinite().cpu().numpy()
                labels[part][sound] = predicted.cpu().numpy()[sound]
                confidence[part][sound] = best.cpu().numpy()[sound]
    finally:
        model.train(mode)  # what a module of its own does in eval mode, such as merging an adapter, it undoes here
        for module, training in modes:
            module.training = training
    return labels, confidence


def _answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(B, K) probabilities for images (B, C, H, W)."""
    try:
        logits = logits_of(model(x)).float()
    except Exception as error:  # whatever a user's forward may raise
        raise ModelError(
            f"the model cannot run on images of shape {tuple(x.shape)} here, to relabel them: {shown(error)}"
        ) from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ModelError(
            f"the model gives outputs of shape {tuple(logits.shape)} for {len(x)} images, and relabelling needs one "
            "for each class: relabel with a model that has them, or train on without the flagged samples"
        )
    return logits.softmax(dim=1)
