import math

import pytest
import torch
from flagged import SCREENING, result_for
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_dataset, create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader
from torch import nn

import trainguard
from trainguard import Guard
from trainguard.data.loaders import open_loader
from trainguard.data.store import open_images
from trainguard.errors import DataError

SIZE, STEP = 30, 8  # image i has the grey value 8 i
FLAGGED = [0, 4, 20]
KEPT = [i for i in range(SIZE) if i not in FLAGGED]


@pytest.fixture
def folder(tmp_path):
    """15 images each of classes 'a' and 'b', of several sizes, told apart by their grey."""
    for row in range(SIZE):
        path = tmp_path / "train" / "ab"[row >= 15] / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + row % 3, 20), (STEP * row,) * 3).save(path)
    return tmp_path


@pytest.fixture
def screened(monkeypatch):
    """The stores that were screened; `FLAGGED` is flagged in each."""
    stores = []

    def screen_images(images, model=None, **options):
        stores.append(images)
        return result_for(images, FLAGGED)

    monkeypatch.setattr(SCREENING, screen_images)
    return stores


def loader_of(folder, **settings):
    usual = {"batch_size": 5, "is_training": True, "num_workers": 0, "device": torch.device("cpu")}
    return create_loader(create_dataset("", str(folder), split="train"), 16, **usual | settings)


def rows(loader, mean=0.0, std=1.0):
    return sorted(round(float(x.mean() * std + mean) * 255 / STEP) for batch, _ in loader for x in batch)


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_prefetch_loader_stays_and_gives_kept_samples_only(workers, folder, screened):
    loader = loader_of(folder, no_aug=True, mean=(0.5,) * 3, std=(0.25,) * 3, num_workers=workers)
    given_loader = open_loader(loader).inner
    protected = Guard(progress=False).protect(loader, network())
    assert protected is loader and type(loader) is PrefetchLoader and loader.loader is not given_loader
    assert len(loader) == 27 // 5 and loader.loader.drop_last
    seen = set()
    for _ in range(6):  # the last two of each epoch are dropped, others each time
        epoch = rows(loader, 0.5, 0.25)
        assert len(epoch) == len(set(epoch)) == 25
        seen.update(epoch)
    assert seen == set(KEPT)


def test_mixup_and_random_erasing_are_what_they_were(folder, screened):
    mixup = FastCollateMixup(mixup_alpha=0.5, num_classes=2)
    loader = loader_of(folder, re_prob=0.9, collate_fn=mixup, batch_size=6)
    erasing = loader.random_erasing
    Guard(progress=False).protect(loader, network())
    assert loader.loader.collate_fn is mixup and loader.random_erasing is erasing is not None
    assert next(iter(loader))[1].shape == (6, 2)
    loader.mixup_enabled = False
    assert not mixup.mixup_enabled
    assert set(next(iter(loader))[1].argmax(1).tolist()) <= {0, 1}


@pytest.mark.parametrize("kind", [RepeatAugSampler, OrderedDistributedSampler])
def test_timm_s_distributed_samplers_count_what_is_kept_and_what_comes_back(kind, folder, screened):
    seen, again = [], []
    for rank in (0, 1):
        loader = loader_of(folder, batch_size=1)
        inner = loader.loader
        loader.loader = torch.utils.data.DataLoader(
            inner.dataset, batch_size=1, sampler=kind(inner.dataset, 2, rank), collate_fn=inner.collate_fn
        )
        guard = Guard(progress=False)
        loader = guard.protect(loader)
        if kind is RepeatAugSampler:
            loader.loader.sampler.set_epoch(3)
        assert len(loader) == math.ceil(len(KEPT) / 2)
        seen += [int(index) for index in loader.loader.sampler]
        guard.relabel(network())
        assert len(loader) == SIZE // 2 and getattr(loader.loader.sampler, "epoch", 3) == 3
        again += [int(index) for index in loader.loader.sampler]
    assert set(seen) <= set(range(len(KEPT))) and len(again) == SIZE
    if kind is OrderedDistributedSampler:
        assert set(seen) == set(range(len(KEPT))) and sorted(again) == list(range(SIZE))


def test_a_page_reads_broken_files_as_screening_did(folder, screened, tmp_path):
    dataset = create_dataset("", str(folder), split="train")
    settings = {"batch_size": 9, "is_training": True, "num_workers": 0, "device": torch.device("cpu"), "no_aug": True}
    create_loader(dataset, 16, **settings)  # sets a transform: the files are of several sizes
    (folder / "train" / "a" / "05.png").write_bytes(b"no image")
    result = trainguard.screen(dataset, progress=False, on_error="skip")
    assert result.unreadable == (5,) and result.evidence is None
    page = result.report(tmp_path / "report.html", dataset=dataset)
    assert "<img" in page.read_text()


def test_a_repeating_sampler_with_a_selection_of_its_own_keeps_it(folder, screened):
    for steps, share in (("keep", 1.0), ("natural", len(KEPT) / SIZE)):
        loader = loader_of(folder, batch_size=1)
        inner = loader.loader
        sampler = RepeatAugSampler(inner.dataset, 2, 0, selected_ratio=1)
        loader.loader = torch.utils.data.DataLoader(
            inner.dataset, batch_size=1, sampler=sampler, collate_fn=inner.collate_fn
        )
        assert len(loader) == SIZE
        assert len(Guard(progress=False).protect(loader, steps=steps)) == round(share * SIZE)


def test_flagged_samples_come_back_relabelled(folder, screened):
    class Always(nn.Linear):
        def forward(self, x):
            return torch.tensor([[0.0, 5.0]]).expand(len(x), 2)

    loader = loader_of(folder, no_aug=True, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=1)
    guard = Guard(progress=False)
    guard.protect(loader, network())
    guard.relabel(Always(1, 1))
    labels = {round(float(x.mean()) * 255 / STEP): int(y) for x, y in loader}
    assert labels == {row: 1 if row in FLAGGED else int(row >= 15) for row in range(SIZE)}


def test_screening_sees_whole_files_before_augmentation_and_the_loader_s_normalisation(folder, screened):
    loader = loader_of(folder, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), color_jitter=0.9, auto_augment="rand-m5")
    Guard(progress=False).protect(loader, network())
    (images,) = screened
    assert images.shape == (3, 16, 16) and images.class_names == ("a", "b")
    grey = torch.arange(SIZE).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) * STEP / 255
    torch.testing.assert_close(images.batch(range(SIZE)), grey)
    assert images.pixel_range.source == "loader"
    assert images.pixel_range.low == pytest.approx((-2.5, -1.6, -0.6), abs=1e-6)
    assert images.pixel_range.high == pytest.approx((2.5, 2.4, 1.4), abs=1e-6)


@pytest.mark.parametrize("prefetcher", [True, False])
def test_a_file_that_cannot_be_read_is_named_and_not_replaced_by_the_next(prefetcher, folder, screened):
    (folder / "train" / "a" / "07.png").write_bytes(b"not an image")
    loader = loader_of(folder, use_prefetcher=prefetcher)
    with pytest.raises(DataError, match=r"row 7 \(.*07\.png\) cannot be read: UnidentifiedImageError"):
        Guard(progress=False).protect(loader, network())
    guard = Guard(progress=False)
    guard.protect(loader, network(), on_error="skip")
    assert guard.result.unreadable == (7,)


def test_a_bare_data_set_names_what_cannot_be_read(folder):
    (folder / "train" / "a" / "07.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"row 7 \(.*07\.png\) cannot be read"):
        trainguard.screen(loader_of(folder).dataset, progress=False)


def test_without_the_prefetcher_the_normalisation_is_found_in_the_transform(folder):
    loader = loader_of(folder, use_prefetcher=False, mean=(0.5,) * 3, std=(0.25,) * 3)
    host = open_loader(loader)
    assert host.inner is loader and host.pixel_range is None
    assert open_images(host.dataset).pixel_range.low == pytest.approx((-2.0,) * 3)


def test_schedules_of_sizes_are_refused_before_any_screening(folder, screened):
    loader = loader_of(folder, input_size_choices=(16, 24))
    with pytest.raises(DataError, match=r"schedule of image sizes \(input_size_choices\) .* screen first"):
        Guard(progress=False).protect(loader, network())
    assert not screened


@pytest.fixture
def parquet(tmp_path):
    """The 30 images as a Hugging Face data set in a folder, row 7 broken at will."""
    import datasets

    def written(broken=False):
        rows = []
        for row in range(SIZE):
            path = tmp_path / "one.png"
            Image.new("RGB", (20, 20), (STEP * row,) * 3).save(path)
            rows.append({"bytes": b"not an image" if broken and row == 7 else path.read_bytes(), "path": None})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        data = datasets.Dataset.from_dict({"image": rows, "label": [int(row >= 15) for row in range(SIZE)]}, features)
        (tmp_path / "data").mkdir()
        data.to_parquet(tmp_path / "data" / "train.parquet")
        return f"{tmp_path / 'data'}"

    return written


def hugging_face_loader(kind, path, tmp_path, **settings):
    known = {"num_samples": SIZE} if kind == "hfids" else {}
    cache = str(tmp_path / "cache")
    data = create_dataset(f"{kind}/{path}", cache, split="train", is_training=True, batch_size=1, **known)
    usual = {"batch_size": 1, "is_training": True, "no_aug": True, "num_workers": 0, "device": torch.device("cpu")}
    return create_loader(data, 16, mean=(0.0,) * 3, std=(1.0,) * 3, **usual | settings)


def test_a_hugging_face_reader_gives_kept_samples_only(parquet, screened, tmp_path):
    loader = hugging_face_loader("hfds", parquet(), tmp_path)
    assert rows(Guard(progress=False).protect(loader, network())) == KEPT
    (images,) = screened
    assert images.class_names == ("a", "b") and images.labels.tolist() == [int(row >= 15) for row in range(SIZE)]


def test_a_hugging_face_reader_s_bad_row_is_named(parquet, screened, tmp_path):
    loader = hugging_face_loader("hfds", parquet(broken=True), tmp_path)
    with pytest.raises(DataError, match=r"row 7 cannot be read: UnidentifiedImageError"):
        Guard(progress=False).protect(loader, network())


def test_a_streaming_hugging_face_reader_is_refused(parquet, tmp_path):
    loader = hugging_face_loader("hfids", parquet(), tmp_path)
    with pytest.raises(DataError, match="no positions to flag"):
        Guard(progress=False).protect(loader, network())


def test_what_is_kept_of_a_timm_data_set_takes_the_transform_that_timm_sets(folder, screened):
    dataset = create_dataset("", str(folder), split="train")
    settings = {"batch_size": 9, "is_training": True, "num_workers": 0, "device": torch.device("cpu"), "no_aug": True}
    create_loader(dataset, 16, **settings)  # sets a transform: the files are of several sizes
    kept = trainguard.screen(dataset, progress=False).apply(dataset)
    dataset.transform = None
    loader = create_loader(kept, 16, mean=(0.0,) * 3, std=(1.0,) * 3, use_multi_epochs_loader=True, **settings)
    assert rows(loader) == KEPT and kept.transform is dataset.transform is not None
    again = trainguard.screen(kept, progress=False)
    assert len(again.score) == len(KEPT) and screened[-1].class_names == ("a", "b")
    fewer = again.apply(kept)
    fewer.transform = None
    assert dataset.transform is None and len(fewer) == len(again.keep)


def test_a_subclass_that_changes_its_samples_is_screened_as_it_gives_them(folder, screened):
    class Exchanged(ImageDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, 1 - label

    data = Exchanged(str(folder / "train"))
    settings = {"batch_size": 5, "is_training": True, "num_workers": 0, "device": torch.device("cpu")}
    Guard(progress=False).protect(create_loader(data, (3, 16, 16), **settings))
    assert screened[0].labels.tolist() == [1] * 15 + [0] * 15
