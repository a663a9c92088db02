r"""`trainguard.screen`: data of any kind opened and screened, with a copy of the user's model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainguard.data.loaders import readable
from trainguard.data.pixels import PixelRange, given_range
from trainguard.data.samples import Key
from trainguard.data.store import CACHE_BYTES, ImageStore, OnError, open_images
from trainguard.distributed import Processes
from trainguard.files import plain, writable_folder
from trainguard.models import CHECKED, Model, UnitPixels, device_of, working_copy
from trainguard.progress import Progress
from trainguard.results import ScreenResult
from trainguard.rng import undisturbed
from trainguard.screening.pipeline import screen_images
from trainguard.screening.settings import PRESETS, check_length, check_preset
from trainguard.training import check_hooks


def screen(
    dataset: Any,
    model: Model | None = None,
    *,
    epochs: int | None = None,
    budget: float = 0.5,
    seed: int = 0,
    accelerator: Any = None,
    state_dir: str | os.PathLike | None = None,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    image_column: Key | None = None,
    label_column: Key | None = None,
    pixel_range: PixelRange | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    bounds: tuple[float, float] | None = None,
    on_error: OnError = "raise",
    cache_bytes: int = CACHE_BYTES,
    workers: int = 0,
    preset: str = "default",
    trained: bool = False,
) -> ScreenResult:
    """Screen a labelled image data set for backdoor poison.

    Args:
        dataset: map-style torch data set giving (image, label) or a dict, or a Hugging Face `Dataset`.
        model: the model to be trained, a function that builds one, or a timm name; None checks nothing against it.
        epochs: how long the training on these data will be; None stands for 24 epochs.
        budget: what share of that training's passes the probes get; short trainings have a least that is more than it.
        seed: of everything random in screening.
        accelerator: an `accelerate.Accelerator`, to share the work among its processes.
        state_dir: folder that keeps what screening has done: killed, it goes on; ended, it is not made again.
        progress: show progress on the terminal (rank 0).
        callbacks: objects with any of `on_stage_start`, `on_probe_epoch_end`, `on_scores`, `on_result`.
        image_column: key or position of the image in a sample, needed only where several could be meant.
        label_column: likewise of the label.
        pixel_range: the model inputs of black and white, where they should not be found out.
        mean: the pipeline's normalisation in [0, 1] pixels, together with `std`: another way to say the same.
        std: see `mean`.
        bounds: the model inputs of black and white, equal for all channels: a third way.
        on_error: `"raise"`, or `"skip"` to leave out unreadable samples and list them in the result.
        cache_bytes: memory for decoded images, 4 GiB unless told; those beyond are read again, 0 keeps none.
        workers: processes that read images.
        preset: name of the screening settings: `"default"`, or `"paper"` for AdvrBD as published.
        trained: `model` has been trained on these data already: it takes the place of the first of the two probes,
            which then need not be trained.

    Raises:
        ValueError: `trained` without a model, or with the paper's preset.
        DataError: the data set cannot be used; the message names the row or the column and what to do.
        ModelError: the model cannot be copied or run, or does not fit the labels.
        StateError: the state in `state_dir` is about other data or other settings.
    """
    check_length(epochs, budget, seed, callbacks)
    check_preset(preset)
    check_early(accelerator, state_dir)
    images = open_images(
        readable(dataset),
        pixel_range=given_range(pixel_range, mean, std, bounds),
        image_column=image_column,
        label_column=label_column,
        on_error=on_error,
        cache_bytes=cache_bytes,
        workers=workers,
        progress=Progress(progress),
    )
    return run_screening(
        images,
        model,
        preset,
        accelerator=accelerator,
        epochs=epochs,
        budget=budget,
        seed=seed,
        state_dir=state_dir,
        progress=progress,
        callbacks=callbacks,
        trained=trained,
    )


def run_screening(
    images: ImageStore,
    model: Model | None,
    preset: str,
    *,
    accelerator: Any,
    epochs: int | None,
    budget: float,
    seed: int,
    **options: Any,
) -> ScreenResult:
    """Screen opened images with a copy of the user's model, leaving random streams and autograd mode as they were."""
    check_preset(preset)
    if options.get("trained") and (model is None or PRESETS[preset].variant == "paper"):
        raise ValueError("trained=True needs the model, and the default preset")
    if options.get("trained") and isinstance(model, str):
        raise ValueError(f"trained=True needs the model itself, got a name, {model!r}: load its weights first")
    check_length(epochs, budget, seed)
    epochs, budget, seed = plain(epochs), plain(budget), plain(seed)  # numpy's numbers are none to torch and JSON
    ranks = Processes.of(accelerator)
    processes = ranks.over(images.fingerprint)
    if processes.world < ranks.world and options.get("state_dir") is not None:  # each screens data of its own
        options["state_dir"] = Path(options["state_dir"]) / f"rank {ranks.rank}"
    with undisturbed(seed), images.left_as_is():
        network = None if model is None else working_copy(model, images)
        if network is not None and options.get("trained"):
            few = images.batch(images.readable[:CHECKED], device_of(network))
            check_hooks(model, UnitPixels(network, images.pixel_range), few)
        elif PRESETS[preset].variant != "paper":
            network = None  # it was checked: a probe of our own is what learns
        return screen_images(
            images,
            network,
            settings=PRESETS[preset],
            epochs=epochs,
            budget=budget,
            seed=seed,
            processes=processes,
            device=_device(accelerator, model),
            **options,
        )


def check_early(accelerator: Any, state_dir: str | os.PathLike | None) -> None:
    """What can be known to be wrong before all images are read.

    Raises:
        ValueError: `accelerator` is none.
        StateError: `state_dir` cannot be written to.
    """
    if Processes.of(accelerator).world == 1 and state_dir is not None:  # of several the main one looks, with the others
        writable_folder(state_dir)


def _device(accelerator: Any, model: Model | None) -> torch.device | None:
    """Where training will run, as far as it can be told; None leaves the choice to screening."""
    if accelerator is not None and accelerator.device is not None:
        return accelerator.device
    devices = {parameter.device for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    return next((device for device in devices if device.type != "cpu"), None)
