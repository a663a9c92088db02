"""timm: the loader that `create_loader` gave, and its data sets read without skipping what cannot be read."""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from trainguard.data.loaders import HostLoader
from trainguard.data.pixels import loader_range
from trainguard.errors import DataError


def open_loader(loader: Any) -> HostLoader:
    """Open a `PrefetchLoader`, or a torch loader over one of timm's data sets.

    The `PrefetchLoader` stays: the switch of mixup, random erasing and the normalisation on the device live there. The
    torch loader in it is exchanged.

    Args:
        loader: what `timm.data.create_loader` gave.

    Raises:
        DataError: another kind of loader.
    """
    if isinstance(loader, PrefetchLoader):

        def rebuild(changed: DataLoader) -> Any:
            loader.loader = changed
            return loader

        return HostLoader(loader.loader, rebuild, readable(loader.loader.dataset), loader_range(loader))
    if isinstance(loader, DataLoader):
        return HostLoader(loader, lambda changed: changed, readable(loader.dataset))
    raise DataError(f"expected what timm.data.create_loader gives, got {type(loader).__name__}: protect that")


class Readings:
    """A timm `ImageDataset` for screening: its files before the training transform, and an error for a broken one.

    timm itself puts the next sample in the place of one that it cannot read, with a line in the log.

    Args:
        dataset: any `ImageDataset` whose reader has positions.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset
        self.transform = dataset.transform
        self.samples = getattr(dataset.reader, "samples", None)  # (path, label) of an image folder, for names of rows
        self.classes = _class_names(getattr(dataset.reader, "class_to_idx", None))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.read_raw(index)
        return (self.transform(image) if self.transform else image), label

    def read_raw(self, index: int) -> tuple[Image.Image, Any]:
        """The decoded image and the label of one sample."""
        stream, label = self._dataset.reader[index][:2]
        with stream:
            opened = Image.open(stream)
            image = opened.convert(self._dataset.input_img_mode or opened.mode)
        target_transform = self._dataset.target_transform
        return image, label if target_transform is None else target_transform(label)


def readable(dataset: Any) -> Readings | None:
    """What screening reads in place of a timm data set; None for any other, such as one that changes its samples."""
    if type(dataset).__name__ == "ScheduledTransformDataset":  # not in every version of timm
        raise DataError(
            "a schedule of image sizes (input_size_choices) has no sampler to leave samples out of: screen first, "
            "result = trainguard.screen(dataset, model), and build the loader on result.apply(dataset)"
        )
    if isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset
    plain = isinstance(dataset, ImageDataset) and type(dataset).__getitem__ is ImageDataset.__getitem__
    return Readings(dataset) if plain else None


def counts_of(sampler: Any, dataset: Any) -> dict[str, Any]:
    """What one of timm's distributed samplers would hold for another data set: they count samples only once."""
    fresh: Any
    if isinstance(sampler, RepeatAugSampler):
        settings = sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.num_repeats
        fresh, usual = RepeatAugSampler(dataset, *settings), RepeatAugSampler(sampler.dataset, *settings)
        if len(usual) != len(sampler):  # it was made with a selection of its own, which it does not keep
            share = len(dataset) / len(sampler.dataset)
            fresh.num_selected_samples = max(1, min(fresh.num_samples, round(share * len(sampler))))
    elif isinstance(sampler, OrderedDistributedSampler):
        fresh = OrderedDistributedSampler(dataset, sampler.num_replicas, sampler.rank)
    else:
        return {}
    return {name: value for name, value in vars(fresh).items() if name != "epoch"}


def _class_names(positions: dict[str, int] | None) -> list[str] | None:
    """Names in the order of their numbers; None where numbers are left out."""
    names = sorted(positions, key=positions.__getitem__) if positions else []
    complete = positions is not None and [positions[name] for name in names] == list(range(len(names)))
    return names if names and complete else None
