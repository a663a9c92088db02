"""accelerate: a loader that `Accelerator.prepare` gave, opened for the guard and changed in place."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from trainguard.data import loaders
from trainguard.data.loaders import HostLoader
from trainguard.errors import DataError
from trainguard.warning import warn


def open_loader(loader: Any) -> HostLoader:
    """Open a `DataLoaderShard` or a `DataLoaderDispatcher`.

    The accelerator knows its loaders by identity (it saves their state, and cuts `gather_for_metrics` by their length),
    so the loader itself stays, with another torch loader in it. Its epoch count, its synchronised generator and the
    split among processes stay with it.

    Args:
        loader: what `prepare` gave for a torch `DataLoader`.

    Raises:
        DataError: another kind of loader, such as the one for TPUs.
    """
    inner = getattr(loader, "base_dataloader", None)
    if not isinstance(inner, DataLoader):
        raise DataError(
            f"expected a loader that accelerate prepared, got {type(loader).__name__}: protect the torch DataLoader "
            "before accelerator.prepare"
        )
    _warn_if_split_twice(inner)
    core = loaders.open_loader(inner)

    def rebuild(changed: DataLoader) -> Any:
        loader.base_dataloader = core.rebuild(changed)
        return loader

    return HostLoader(core.inner, rebuild, core.dataset, core.pixel_range)


def _warn_if_split_twice(inner: DataLoader) -> None:
    """A `DistributedSampler` under accelerate's own split leaves samples out of epochs, and accelerate is silent."""
    sampler: Any = inner.batch_sampler
    split = hasattr(sampler, "num_processes") and sampler.num_processes > 1
    while hasattr(sampler, "batch_sampler") or hasattr(sampler, "sampler"):
        inner_batches = getattr(sampler, "batch_sampler", None)
        sampler = sampler.sampler if inner_batches is None else inner_batches
    if split and isinstance(sampler, DistributedSampler):
        warn(
            "the loader is split among processes twice, by its DistributedSampler and by accelerate: leave the sampler "
            "to accelerate (shuffle=True)"
        )
