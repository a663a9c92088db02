r"""What AdvrBD's screening says of the data that a finished model was trained on, with the model as its first probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trainguard.distributed import Processes
from trainguard.results import ScreenResult
from trainguard.screening.pipeline import screen_images

if TYPE_CHECKING:
    from trainguard.data.store import ImageStore


def screened(
    infected: nn.Module,
    store: ImageStore,
    *,
    device: torch.device,
    accelerator: Any,
    seed: int,
    progress: bool,
    state_dir: str | Path | None = None,
) -> ScreenResult | None:
    """Screen the data; None where they are of one class.

    Args:
        infected: a copy of the model, which has learned whatever there is to be learned from the data.
        store: the data.
        device: where to compute.
        accelerator: shares the work among its processes; None for one.
        seed: of everything random.
        progress: show it.
        state_dir: folder that a killed screening resumes from.
    """
    if len(np.unique(store.labels[store.readable])) < 2:
        return None
    return screen_images(
        store,
        infected,
        trained=True,
        seed=seed,
        processes=Processes.of(accelerator),
        device=device,
        state_dir=None if state_dir is None else Path(state_dir) / "screening",
        progress=progress,
    )
