r"""What can be done about a finished model: fine-tune it, purify it, or look whether it needs that."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.drill.cells import Cell
from trainguard.drill.defenses import Outcome
from trainguard.drill.scene import Scene, UnitImages
from trainguard.models import UnitPixels
from trainguard.progress import Progress
from trainguard.purification import audit, purify
from trainguard.purification.defaults import CLEAN
from trainguard.purification.finetuning import FineTuning, fine_tune, usual_rate
from trainguard.purification.results import PurifyResult
from trainguard.results import ScreenResult
from trainguard.rng import isolated_rng

REPAIRS = ("fine-tune", "purify", "purify-clean", "guard+purify", "audit")
NEEDED = {"guard+purify": "guard"}  # beside "none", whose model they all start from
CLEAN_SHARE = 0.05  # of the training set: what PBE calls the clean extra set
STEPS = CLEAN.adversarial + CLEAN.plain  # of the baseline: as many as purification takes at most


def repair(scene: Scene, defense: str, folders: dict[str, Path]) -> Outcome:
    r"""Take the undefended model of a scene and mend it, or audit it.

    Args:
        scene: the poisoned data that the model was trained on.
        defense: `"fine-tune"`, the baseline: on 5% clean data, with as many steps as purification takes at most;
            `"purify"`: with nothing but the poisoned set; `"purify-clean"`: with 5% clean data; `"guard+purify"`: with
            the poisoned set and what screening says of it; `"audit"`: the model stays as it is.
        folders: where the outcomes of `"none"` and of what `NEEDED` names were saved.

    Returns:
        The mended model; `screen_seconds` is what mending took, with the screening before it that it was given,
        `train_seconds` what the training before it did.
    """
    before = Cell.load(folders["none"])
    guarded = Cell.load(folders["guard"]) if defense == "guard+purify" else before
    assert before is not None and guarded is not None  # the plan puts them first
    model = scene.fresh_model()
    model.load_state_dict(safetensors.torch.load_file(folders["none"] / "model.safetensors"))
    model.eval()
    channels = scene.images.shape[1]
    unit = PixelRange.from_mean_std((0.0,) * channels, (1.0,) * channels)
    poisoned, trusted = UnitImages(scene.images, scene.labels), _clean_part(scene)
    start, verdict, outcome = time.perf_counter(), None, None
    if defense == "audit":
        verdict = audit(model, poisoned, seed=scene.seed, pixel_range=unit, progress=False)
    elif defense == "fine-tune":
        _fine_tune(model, trusted, unit, scene)
    elif defense == "purify-clean":
        outcome = _purified(model, trusted, scene, unit, clean=True)
    elif defense == "guard+purify":
        outcome = _purified(model, poisoned, scene, unit, initial=ScreenResult.load(folders["guard"] / "result"))
    else:
        outcome = _purified(model, poisoned, scene, unit)
    seconds = time.perf_counter() - start
    if defense == "guard+purify":
        seconds += guarded.screen_seconds
    nothing = np.zeros(len(scene.labels), dtype=bool)
    mended = model if outcome is None else outcome.model
    return Outcome(mended, nothing, None, seconds, before.train_seconds, verdict, outcome)


def _clean_part(scene: Scene) -> UnitImages:
    labels, rng = scene.data.train_labels.numpy(), np.random.default_rng(scene.seed)
    parts = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    rows = torch.from_numpy(np.concatenate([part[: max(2, round(CLEAN_SHARE * len(part)))] for part in parts]))
    return UnitImages(scene.data.train[rows], scene.data.train_labels[rows])


def _purified(model: nn.Module, data: UnitImages, scene: Scene, unit: PixelRange, **options: object) -> PurifyResult:
    flip = None if scene.data.flip else False
    return purify(model, data, seed=scene.seed, pixel_range=unit, progress=False, flip=flip, **options)  # type: ignore[arg-type]


def _fine_tune(model: nn.Module, data: UnitImages, unit: PixelRange, scene: Scene) -> None:
    how = FineTuning(lr=usual_rate(model), flip=scene.data.flip)
    store = open_images(data, pixel_range=unit)
    with isolated_rng(scene.seed), Progress(False).stage("fine-tune", STEPS * how.batch_size) as stage:
        fine_tune(
            UnitPixels(model, unit),
            store,
            store.readable,
            batches=STEPS,
            adversarial=False,
            how=how,
            generator=torch.Generator().manual_seed(scene.seed),
            processes=Processes(),
            stage=stage,
        )
