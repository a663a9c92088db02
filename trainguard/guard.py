"""One line in a training script: screen the data, train on what is clean, give the flagged samples back corrected."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainguard.data.following import check_order, find_labels, follow
from trainguard.data.loaders import learn_what_is_fed, open_loader
from trainguard.data.pixels import ASSUMED, PixelRange, given_range
from trainguard.data.samples import Key
from trainguard.data.store import CACHE_BYTES, ImageStore, OnError, open_images
from trainguard.data.views import LiveView
from trainguard.distributed import Group, Processes
from trainguard.errors import DataError, ModelError, StateError
from trainguard.guard_state import check_fingerprint, check_made_by, pack_result, unpack_result
from trainguard.models import Model, bare
from trainguard.progress import Progress
from trainguard.results import ScreenResult
from trainguard.rng import isolated_rng
from trainguard.screening.relabeling import feed_of, relabel
from trainguard.screening.screen import check_early, run_screening
from trainguard.screening.settings import check_length, check_preset
from trainguard.warning import warn

Steps = Literal["natural", "keep"]
AT_ONCE = 256  # images that relabelling asks the model about, where its loader has no smaller batches
STATE_FORMAT = 1


class Guard:
    """Screens a training set for backdoor poison and keeps a loader to what is clean.

    Args:
        accelerator: an `accelerate.Accelerator`, where training has one. Without, the processes of `torch.distributed`
            share the work if it is set up when the loader is protected, which all of them must do then.
        epochs: how long the protected training will be; None stands for 24 epochs.
        budget: what share of that training's passes the probes get; short trainings have a least that is more than it.
        seed: of everything random in screening.
        state_dir: folder that keeps what screening has done: killed, it goes on; ended, it is not made again.
        progress: show progress on the terminal (rank 0).
        callbacks: objects with any of `on_stage_start`, `on_probe_epoch_end`, `on_scores`, `on_result`.
        enabled: False makes every method do nothing.
    """

    def __init__(
        self,
        accelerator: Any = None,
        *,
        epochs: int | None = None,
        budget: float = 0.5,
        seed: int = 0,
        state_dir: str | os.PathLike | None = None,
        progress: bool = True,
        callbacks: Sequence[Any] = (),
        enabled: bool = True,
    ) -> None:
        check_length(epochs, budget, seed, callbacks)
        self.enabled = enabled
        self._accelerator = accelerator
        self._screening: dict[str, Any] = {
            "accelerator": accelerator,
            "epochs": epochs,
            "budget": budget,
            "seed": seed,
            "state_dir": state_dir,
            "progress": progress,
            "callbacks": callbacks,
        }
        self._seed = seed
        self._progress = progress
        self._result: ScreenResult | None = None
        self._steps: Steps = "natural"
        self._loaded = False
        self._new_labels: tuple[np.ndarray, np.ndarray] | None = None  # (samples that came back, their labels)
        self._images: ImageStore | None = None  # the flagged ones of the data that are protected
        self._asked = ("", "")  # fingerprint and preset of their screening
        self._views: WeakKeyDictionary[LiveView, Steps] = WeakKeyDictionary()  # of them, as long as a loader has one
        self._at_once = AT_ONCE  # images that relabelling asks the model about
        self._untouched = False  # whether the last loader came back as it was

    @property
    def result(self) -> ScreenResult | None:
        """What the last screening found; None before."""
        return self._result

    @property
    def relabelled(self) -> bool:
        """Whether the flagged samples come back, after `relabel` or by a loaded state."""
        return self._new_labels is not None

    def protect(
        self,
        loader: Any,
        model: Model | None = None,
        *,
        steps: Steps = "natural",
        image_column: Key | None = None,
        label_column: Key | None = None,
        pixel_range: PixelRange | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        bounds: tuple[float, float] | None = None,
        on_error: OnError = "raise",
        cache_bytes: int = CACHE_BYTES,
        preset: str = "default",
    ) -> Any:
        """Screen the loader's data set now, and give a loader of the same kind without the flagged samples.

        The loader is not iterated (its `collate_fn` is asked about a few samples), the model not touched, and no random
        stream moved. If nothing is flagged the very same loader comes back. A loader over the same data as the last one
        takes that result, new labels included: a host that builds its loader anew is not screened anew, and `relabel`
        reaches all of them. For other data use another guard: this one forgets the former.

        Args:
            loader: a torch `DataLoader` over a map-style data set, or a loader of a known host.
            model: the model to be trained, a function that builds one, or a timm name; None checks nothing against it.
            steps: `"natural"` makes the epoch shorter by what was dropped, for use before the scheduler is built;
                `"keep"` keeps its length and draws kept samples evenly once more, for use after. A loaded state goes on
                as it was saved.
            image_column: key or position of the image in a sample, needed only where several could be meant.
            label_column: likewise of the label.
            pixel_range: the model inputs of black and white, where they should not be found out.
            mean: the pipeline's normalisation in [0, 1] pixels, together with `std`: another way to say the same.
            std: see `mean`.
            bounds: the model inputs of black and white, equal for all channels: a third way.
            on_error: `"raise"`, or `"skip"` to leave out unreadable samples and list them in the result.
            cache_bytes: memory for decoded images, 4 GiB unless told; those beyond are read again, 0 keeps none.
            preset: name of the screening settings: `"default"`, or `"paper"` for AdvrBD as published.

        Raises:
            DataError: the data set or the loader's sampler cannot be used, or the processes' own data would give them
                epochs of different lengths.
            ModelError: the model cannot be copied or run, or does not fit the labels.
            StateError: a loaded or saved state is about other data or settings.
        """
        if steps not in ("natural", "keep"):
            raise ValueError(f"expected steps='natural' or 'keep', got {steps!r}")
        if not self.enabled:
            return loader
        check_preset(preset)
        if self._accelerator is None and (group := Group.running()) is not None:
            self.adopt(group)
        check_early(self._accelerator, self._screening["state_dir"])
        host = open_loader(loader)
        view = follow(host)  # before all is read: it may be refused
        try:
            images = open_images(
                host.dataset,
                pixel_range=given_range(pixel_range, mean, std, bounds) or host.pixel_range,
                image_column=image_column,
                label_column=label_column,
                on_error=on_error,
                cache_bytes=cache_bytes,
                workers=host.inner.num_workers,
                context=host.inner.multiprocessing_context,
                progress=Progress(self._progress),
            )
        except DataError as error:
            if host.inner.worker_init_fn is None:
                raise
            raise DataError(
                f"{error}; the loader's worker_init_fn has not run: what it opens, let the data set open as it reads"
            ) from error
        learn_what_is_fed(host.inner, images)
        find_labels(view, images, label_column)
        result, asked = self._result, (images.fingerprint, preset)
        if result is None or (self._images is not None and self._asked != asked):
            result = run_screening(images, model, preset, **self._screening)
            if len(self._views):
                gc.collect()  # a view and its follower hold each other
            if len(self._views):
                warn(
                    "this guard has protected a loader over other data, or by another preset, and now forgets it: that "
                    "one gets no relabelled samples any more; use a Guard for each data set"
                )
            self._views.clear()
            self._result, self._new_labels, self._steps, self._loaded = result, None, steps, False
            self._log(result.figures(), step=0)  # before training's own steps: a tracker may not go back
            self._tell(result)
        elif self._images is None:  # a state was loaded, and this is the loader it is about
            check_fingerprint(result.fingerprint, images.fingerprint)
            check_made_by(result, preset)
        elif not self._loaded:
            self._steps = steps
        self._images, self._asked = images.only(np.flatnonzero(result.suspect)), asked
        self._untouched = len(result.keep) == len(images)
        self._at_once = min(AT_ONCE, host.inner.batch_size or AT_ONCE)  # no more than training has room for
        inner = host.inner
        if not self._untouched:
            self._apply(view, self._steps)
            self._views[view], inner = self._steps, view.follower.loader
            if batches_of(inner) == 0:
                raise DataError(f"the {len(view)} kept samples fill no batch: pass drop_last=False or steps='keep'")
        self._check_lengths(host.inner, inner)
        return host.rebuild(inner)

    def relabel(self, model: nn.Module) -> None:
        """From the next epoch on, let the loader also give the flagged samples, labelled by `model` (AdvrBD Eq. 5).

        Call it between two epochs: one that is on its way may end with some kept samples more. With `steps="natural"`
        epochs become longer by them, which a schedule that counts steps must know; with `steps="keep"` they take the
        places of samples that came twice, at once. Where there are several processes, all of them call this.

        The model is asked about the images as they were decoded; or as its loader feeds them, augmented and collated,
        where it knows clearly more of the kept samples so. Where it knows no more of them than by chance it warns.

        Args:
            model: the user's model, trained on what `protect` kept; its mode and buffers stay as they are.

        Raises:
            RuntimeError: nothing has been protected yet.
            ModelError: this is no model.
            DataError: the data set has brought its samples into another order since.
        """
        if not self.enabled:
            return
        if self._result is None or self._images is None:
            raise RuntimeError("nothing to relabel yet: call guard.protect(loader, model) first")
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected the model that was trained, an nn.Module, got {type(model).__name__}: pass it")
        processes = Processes.of(self._accelerator).over(self._images.fingerprint)
        flagged = np.flatnonzero(self._result.suspect)
        if len(flagged) == 0:
            return
        if self._images.pixel_range.source == "assumed":
            warn(f"{ASSUMED} to guard.protect, if training makes something else of them")
        gc.collect()  # a loader that is gone, and its view: they hold each other
        given, views = self._result.labels[flagged], list(self._views)
        for view in views:
            check_order(view, self._images)
        with isolated_rng(self._seed):
            loaders = [view.follower.original for view in views]
            feed = feed_of(bare(model), self._images, loaders, self._result.keep, batch_size=self._at_once)
            labels = relabel(bare(model), self._images, flagged, given=given, batch_size=self._at_once, feed=feed)
        self._new_labels = flagged, processes.broadcast(labels)
        changed = int((self._new_labels[1] != given).sum())
        self._log({"trainguard/relabelled": len(flagged), "trainguard/labels_changed": changed})
        for view, steps in self._views.items():
            self._apply(view, steps)

    def _tell(self, result: ScreenResult) -> None:
        """Say what was found: nobody need ask for it, and nobody think that an open question was answered."""
        n, kept = len(result.suspect), len(result.keep)
        left_out = f"{n - kept:,} of {n:,} samples are left out" if kept < n else f"all {n:,} samples are kept"
        verdict = f"trainguard: {result.verdict} (confidence {result.confidence:.2f}), {left_out}; {result.reason}"
        Progress(self._progress).say(verdict)
        if result.verdict == "undecided":
            warn(f"{verdict}. Training goes on with all that could be read")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the result and the new labels, as tensors and plain values."""
        return {
            "format": STATE_FORMAT,
            "steps": self._steps,
            "result": None if self._result is None else pack_result(self._result),
            "relabelled": None if self._new_labels is None else [torch.from_numpy(part) for part in self._new_labels],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, before `protect` (which then does not screen again) or after it.

        Raises:
            StateError: the state is of another format or about other data than the protected loader's.
        """
        if not self.enabled:
            return
        if state.get("format") != STATE_FORMAT:
            raise StateError(
                f"expected a guard's state of format {STATE_FORMAT}, got {state.get('format')!r}: it was saved "
                "by another version, screen again"
            )
        if state["result"] is None:
            return
        result = unpack_result(state["result"])
        if self._images is not None:
            check_fingerprint(result.fingerprint, self._images.fingerprint)
            check_made_by(result, self._asked[1])
        if self._images is not None and self._untouched and len(result.keep) < len(result.labels):
            raise StateError(
                f"the saved state leaves out {len(result.labels) - len(result.keep)} samples, this run found "
                "nothing to leave out: load the state before guard.protect"
            )
        self._result = result
        self._steps, self._loaded = state["steps"], True
        relabelled = state["relabelled"]
        self._new_labels = None if relabelled is None else (relabelled[0].cpu().numpy(), relabelled[1].cpu().numpy())
        for view in list(self._views):
            self._views[view] = self._steps
            self._apply(view, self._steps)

    def adopt(self, host: Any, epochs: int | None = None) -> None:
        """Take a host's processes and length of training where the user named none.

        Args:
            host: has `process_index`, `num_processes` and `device`, as an `accelerate.Accelerator` has.
            epochs: how long training will be; None, or less than 1, where the host does not know.
        """
        if not self.enabled:
            return
        if self._accelerator is None:
            self._accelerator = self._screening["accelerator"] = host
        if self._screening["epochs"] is None and epochs is not None and epochs >= 1:
            self._screening["epochs"] = epochs

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_views": {}}  # a process that is spawned leads its own loaders

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _views=WeakKeyDictionary())

    def _log(self, figures: dict[str, float], step: int | None = None) -> None:
        """Give figures to the trackers that the accelerator has started, if any."""
        if getattr(self._accelerator, "trackers", None):
            self._accelerator.log(figures, step=step)

    def _apply(self, view: LiveView, steps: Steps) -> None:
        """Bring a view, and the samplers over it, to what the result and the new labels say."""
        assert self._result is not None
        if steps == "keep":
            view.refill(self._result.keep, self._seed, self._new_labels)
        else:
            view.keep(self._result.keep, self._new_labels)
        view.follower.refresh()

    def _check_lengths(self, before: DataLoader, after: DataLoader) -> None:
        """Processes that have samples of their own must still take equally many steps: they wait for each other."""
        held = Processes.of(self._accelerator).gathered([batches_of(loader) for loader in (before, after)])
        were, are = (set(values) for values in zip(*held, strict=True))
        if len(were) == 1 and len(are) > 1:
            raise DataError(
                f"each process has samples of its own, of which {min(are)} to {max(are)} batches are kept, but "
                "processes that train together take equally many: pass steps='keep'"
            )


def batches_of(loader: Any) -> int | None:
    """How many batches a loader gives; None where it does not know."""
    try:
        return len(loader)
    except TypeError:  # a user's batch sampler without a length, or an iterable data set
        return None
