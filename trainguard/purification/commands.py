"""Purify and audit a checkpoint in a file: what the command line calls, and scripts may."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from trainguard.checkpoints import Checkpoint, load_weights, read_checkpoint, weights_path
from trainguard.data.pixels import given_range
from trainguard.data.store import ImageStore
from trainguard.errors import ModelError
from trainguard.files import writable_folder
from trainguard.models import build
from trainguard.purification.audit import audit
from trainguard.purification.opening import open_store
from trainguard.purification.progressive import purify
from trainguard.purification.results import AuditResult, PurifyResult, check_free
from trainguard.rng import undisturbed


@undisturbed(0)
def purify_checkpoint(
    checkpoint: str | Path, *, arch: str, data: Any, out: str | Path, clean: bool = False, **options: Any
) -> PurifyResult:
    """Purify the model in a file and write the result as safetensors, with a JSON beside it.

    Args:
        checkpoint: safetensors, or a state dict without code.
        arch: the architecture: a timm or torchvision name.
        data: what `purify` takes; its number of classes is the model's.
        out: where to write; `.safetensors` is added where it is missing. The JSON has the same name with `.json`:
            settings, history, and the hashes of input and output.
        clean: whether `data` are known to be clean.
        **options: further arguments of `purify`.

    Returns:
        What `purify` returned, after it was written.

    Raises:
        UnsafeCheckpoint: unpickling the file would run code; nothing was run.
        ModelError: the file is damaged or does not fit the architecture.
        DataError: the data cannot be used.
    """
    if not Path(out).name:
        raise FileExistsError(f"{out} is a folder: name a file to write")
    if weights_path(out).is_dir():
        raise FileExistsError(f"{weights_path(out)} is a folder: name a file to write")
    if weights_path(out).resolve() == Path(checkpoint).resolve():
        raise FileExistsError(f"{out} is the checkpoint itself: name another file, it is the evidence")
    check_free(out)
    writable_folder(weights_path(out).parent)  # not only after the work
    found = read_checkpoint(checkpoint)
    store = _opened(data, options, found, arch)
    outcome = purify(lambda: model_of(arch, found, store), store, clean=clean, **options)
    origin = {"path": str(found.path), "sha256": found.sha256, "weights under": found.where, "arch": arch}
    outcome.save(out, input=origin)
    return outcome


@undisturbed(0)
def audit_checkpoint(checkpoint: str | Path, *, arch: str, data: Any, **options: Any) -> AuditResult:
    """Audit the model in a file.

    Args:
        checkpoint: safetensors, or a state dict without code.
        arch: the architecture: a timm or torchvision name.
        data: what `audit` takes; its number of classes is the model's.
        **options: further arguments of `audit`.

    Raises:
        UnsafeCheckpoint: unpickling the file would run code; nothing was run.
        ModelError: the file is damaged or does not fit the architecture.
        DataError: the data cannot be used.
    """
    found = read_checkpoint(checkpoint)
    store = _opened(data, options, found, arch)
    return audit(lambda: model_of(arch, found, store), store, **options)


def _opened(data: Any, options: dict[str, Any], checkpoint: Checkpoint, arch: str) -> ImageStore:
    """The data, opened once by what `options` say of how to read them; what their pixels mean is taken from there.

    Grey images are given to a model of colour images as such, as every loader that converts to RGB does.
    """
    said = {name: options.pop(name, None) for name in ("pixel_range", "mean", "std", "bounds")}
    reading = {name: options[name] for name in ("image_column", "label_column", "on_error") if name in options}
    store = open_store(data, given_range(**said), comparable=False, **reading)
    for seen in (store, store.coloured()) if store.shape[0] == 1 else ():
        with suppress(ModelError):
            model_of(arch, checkpoint, seen)
            return seen
    return store


def model_of(arch: str, checkpoint: Checkpoint, images: ImageStore) -> nn.Module:
    """The architecture by name, with the checkpoint's weights, in eval mode.

    Of a name that timm and torchvision give to different architectures, the one that the weights fit.

    Args:
        arch: a timm or torchvision name.
        checkpoint: from `read_checkpoint`.
        images: what it classifies; they say how many classes and channels it has.

    Raises:
        ModelError: nobody knows the name, or the weights do not fit.
    """
    model = build(arch, images)
    try:
        load_weights(model, checkpoint)
    except ModelError:
        with suppress(ModelError):
            model = build(arch, images, library="torchvision")
            load_weights(model, checkpoint)
            return model.eval()
        raise
    return model.eval()
