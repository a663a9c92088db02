import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.errors import DataError
from trainguard.progress import Progress


class Listed(Dataset):
    """Samples in a list; an exception in it is raised when its row is read."""

    def __init__(self, images, labels, **changed):
        self.samples = list(zip(images, labels, strict=True))
        for row, sample in changed.items():
            self.samples[int(row[3:])] = sample

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


def with_pixel(image, value):
    changed = image.clone()
    changed[0, 0, 0] = value
    return changed


@pytest.mark.parametrize(
    "label, message",
    [
        (torch.tensor([0.1, 0.9]), r"row 17 has a soft label of shape \(2,\): .*mix labels after the data set"),
        ([0.1, 0.9], "row 17 has a soft label of 2 values"),
        (0.5, r"row 17 has the label 0.5 \(float\): expected a class number"),
        (torch.tensor(1.0), r"row 17 has the label 1.0 \(float\)"),
        ("cat", r"row 17 has the label 'cat' \(str\)"),
        (None, "row 17 has no label: expected a class number"),
        (-1, "row 17 has the label -1, out of range"),
        (10**6, "row 17 has the label 1000000, out of range"),
        (2**64 - 1, "row 17 has the label 18446744073709551615, out of range"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_bad_label_is_named_and_never_skipped(label, message, on_error, images, labels):
    with pytest.raises(DataError, match=message):
        open_images(Listed(images, labels.tolist(), row17=(images[17], label)), on_error=on_error)


def test_a_few_images_of_many_classes_may_have_any_label_where_nothing_is_compared(images):
    labels = torch.arange(60) * 16
    with pytest.raises(DataError, match="expected class numbers from 0 without large gaps"):
        open_images(TensorDataset(images, labels))
    assert open_images(TensorDataset(images, labels), comparable=False).num_classes == 945
    with pytest.raises(DataError, match="without large gaps"):
        open_images(TensorDataset(images, labels * 10**6), comparable=False)


def test_a_label_beyond_the_class_names_is_named(images, labels):
    dataset = Listed(images, labels.tolist(), row17=(images[17], 3))
    dataset.classes = ["cat", "dog", "emu"]
    with pytest.raises(DataError, match="row 17 has the label 3, out of range: the data set names 3 classes, 0 to 2"):
        open_images(dataset)


def test_one_class_only_is_refused(images):
    with pytest.raises(DataError, match=r"all 60 samples have the label 2 \('2'\): screening needs at least two"):
        open_images(TensorDataset(images, torch.full((60,), 2)))


def test_a_class_with_one_sample_is_named_with_its_row(images, labels):
    with pytest.raises(DataError, match=r"class 3 \('3'\) has a single sample, row 17: .*leave the class out"):
        open_images(Listed(images, labels.tolist(), row17=(images[17], 3)))


@pytest.mark.parametrize("empty", [TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)), []])
def test_an_empty_data_set_is_refused(empty):
    with pytest.raises(DataError, match="the data set is empty"):
        open_images(empty)


def test_images_outside_the_declared_range_are_named_with_their_values(images, labels):
    given = PixelRange((0.0,) * 3, (1.0,) * 3, "given")
    dataset = Listed(images, labels.tolist(), row17=(with_pixel(images[17], 2.64), 1))
    message = (
        r"row 17 has values from 0.* to 2.64, outside the pixel range \[0, 0, 0\] to \[1, 1, 1\] \(given\): pass mean="
    )
    with pytest.raises(DataError, match=message):
        open_images(dataset, pixel_range=given)


def test_noise_in_a_few_pixels_does_not_contradict_a_declared_range(images, labels):
    given = PixelRange((0.0,) * 3, (1.0,) * 3, "given")
    erased = images[17].clone()
    erased[:, :2, :3] = torch.tensor([-0.4, 1.4, 0.5])
    store = open_images(Listed(images, labels.tolist(), row17=(erased, 1)), pixel_range=given)
    torch.testing.assert_close(store.batch([17])[0, 0, 0, :3], torch.tensor([0.0, 1.0, 128 / 255]))
    erased[:, :2] = 1.1
    with pytest.raises(DataError, match=r"row 17 has values from .* to 1\.1, outside the pixel range"):
        open_images(Listed(images, labels.tolist(), row17=(erased, 1)), pixel_range=given)


def test_a_little_overshoot_of_the_declared_range_is_an_interpolation_s(images, labels):
    given = PixelRange((0.0,) * 3, (1.0,) * 3, "given")
    dataset = Listed(images, labels.tolist(), row17=(with_pixel(images[17], 1.01), 1))
    assert open_images(dataset, pixel_range=given).batch([17])[0, 0, 0, 0] == 1


def test_whole_numbers_beyond_a_byte_are_named(images, labels):
    whole = (images * 255).long()
    with pytest.raises(DataError, match=r"row 17 has values from .* to 256: expected whole numbers from 0 to 255"):
        open_images(Listed(whole, labels.tolist(), row17=(with_pixel(whole[17], 256), 1)))


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_nan_and_infinite_pixels_are_named_or_skipped(value, word, images, labels, monkeypatch):
    dataset = Listed(images, labels.tolist(), row17=(with_pixel(images[17], value), 1))
    with pytest.raises(DataError, match=rf"row 17 has {word} pixels \(1 of 192\); repair it"):
        open_images(dataset)
    counted = []
    monkeypatch.setattr("trainguard.progress.Stage.advance", lambda stage, n=1: counted.append(n))
    assert open_images(dataset, on_error="skip", progress=Progress(False)).unreadable == (17,)
    assert sum(counted) == len(dataset)  # what cannot be read is done as well


def test_images_of_differing_sizes_are_named_with_both_sizes(images, labels):
    dataset = Listed(images, labels.tolist(), row17=(torch.zeros(3, 8, 9), 1))
    with pytest.raises(DataError, match="row 17 has the shape 3x8x9, the first image 3x8x8: images must have one size"):
        open_images(dataset)


def folder_of_images(root, sizes):
    for number, size in enumerate(sizes):
        kind = root / ("cat" if number < len(sizes) // 2 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), number, np.uint8)).save(kind / f"{number}.png")
    return root


def test_images_of_differing_sizes_in_a_folder_are_an_error_unless_the_transform_evens_them_out(tmp_path):
    root = folder_of_images(tmp_path, [8, 8, 8, 9, 8, 8])
    with pytest.raises(DataError, match=r"row 3 \(.*3.png\) has the shape 3x9x9, the first image 3x8x8"):
        open_images(ImageFolder(root, T.ToTensor()))
    store = open_images(ImageFolder(root, T.Compose([T.RandomResizedCrop(8), T.ToTensor()])))
    assert store.shape == (3, 8, 8)
    assert (store.batch([3]) * 255).round().unique().tolist() == [3.0]


def test_an_unreadable_file_is_named_by_row_and_path_or_skipped_without_a_shift(tmp_path):
    dataset = ImageFolder(folder_of_images(tmp_path, [8] * 8), T.ToTensor())
    path = tmp_path / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"row 2 \(.*cat/2\.png\) cannot be read: .*on_error='skip'"):
        open_images(dataset)
    store = open_images(dataset, on_error="skip")
    assert store.unreadable == (2,)
    assert store.labels.tolist() == [0, 0, -1, 0, 1, 1, 1, 1]
    assert store.readable.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert (store.batch([3, 7])[:, 0, 0, 0] * 255).round().tolist() == [3, 7]
    with pytest.raises(DataError, match=r"row 2 \(.*2\.png\) cannot be read"):
        store.batch([1, 2])


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_data_set_of_which_nothing_can_be_read_is_refused_with_the_first_cause(on_error, images, labels):
    broken = {f"row{row}": OSError("truncated file") for row in range(60)}
    with pytest.raises(DataError, match=r"none of .* the first: row 0 cannot be read: OSError: truncated file"):
        open_images(Listed(images, labels.tolist(), **broken), on_error=on_error)


def test_the_first_row_may_be_the_broken_one(images, labels):
    dataset = Listed(images, labels.tolist(), row0=OSError("truncated file"))
    with pytest.raises(DataError, match="row 0 cannot be read: OSError: truncated file"):
        open_images(dataset)
    store = open_images(dataset, on_error="skip")
    assert store.unreadable == (0,)
    torch.testing.assert_close(store.batch([1]), images[1:2])


def test_a_picture_that_is_opened_but_cut_off_is_named_or_skipped(tmp_path, images, labels):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-1000])
    pictures = [Image.new("RGB", (64, 64), (value, 0, 0)) for value in range(len(labels))]
    pictures[7] = Image.open(tmp_path / "cut.jpg")  # read at its first pixel
    rows = Listed(pictures, labels.tolist())
    with pytest.raises(DataError, match=r"row 7 cannot be read: .*truncated"):
        open_images(rows)
    assert open_images(rows, on_error="skip").unreadable == (7,)


def encoded(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{value}.png"}


BAD_ROWS = {
    "junk": {"bytes": b"junk", "path": "2.png"},
    "truncated": {"bytes": encoded(2)["bytes"][:50], "path": "2.png"},
    "missing": {"bytes": None, "path": "2.png"},
    "null": None,
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_of_hugging_face_data_are_named_or_skipped(kind):
    rows = [encoded(value) for value in range(8)]
    rows[2] = BAD_ROWS[kind]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * 4}, features=features)
    named = r"row 2" if kind == "null" else r"row 2 \(2\.png\)"
    with pytest.raises(DataError, match=f"{named} cannot be read: .*"):
        open_images(dataset)
    store = open_images(dataset, on_error="skip")
    assert store.unreadable == (2,) and (store.batch([3])[0, 0, 0, 0] * 255).round() == 3


def test_hugging_face_columns_that_cannot_be_told_are_asked_for():
    kinds = datasets.ClassLabel(names=["a", "b"])
    values = {"image": [encoded(value) for value in range(4)], "fine": [0, 1] * 2, "coarse": [1, 0] * 2}
    dataset = datasets.Dataset.from_dict(
        values, features=datasets.Features({"image": datasets.Image(), "fine": kinds, "coarse": kinds})
    )
    with pytest.raises(DataError, match=r"one ClassLabel column, found 2 \(fine, coarse\): pass label_column="):
        open_images(dataset)
    with pytest.raises(DataError, match="no column 'medium': it has image, fine, coarse"):
        open_images(dataset, label_column="medium")
    assert open_images(dataset, label_column="coarse").labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="one Image column, found none among fine, coarse: pass image_column="):
        open_images(dataset.remove_columns("image"), label_column="fine")


def test_splits_and_streams_are_refused_with_what_to_do():
    dataset = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    with pytest.raises(DataError, match=r"of train, test: pass dataset\['train'\]"):
        open_images(datasets.DatasetDict(train=dataset, test=dataset))
    with pytest.raises(DataError, match="load it with streaming=False"):
        open_images(dataset.to_iterable_dataset())


def test_iterable_data_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 8, 8), 0

    with pytest.raises(DataError, match="Endless is an IterableDataset, it has no positions to flag: pass a map-style"):
        open_images(Endless())
    with pytest.raises(DataError, match="expected a data set with __len__ and __getitem__, got int"):
        open_images(7)


@pytest.mark.parametrize(
    "sample, message",
    [
        (
            {"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 8), "label": 1},
            "one image in a sample, but 2 could be it: 'a', 'b'",
        ),
        (
            {"image": torch.zeros(3, 8, 8), "x": 1, "z": 2},
            "one label in a sample, but 2 could be it: 'x', 'z'; pass label_column=",
        ),
        ({"label": 1}, "one image in a sample, but it has 'label'; pass image_column="),
        (torch.zeros(3, 8, 8), r"expected samples \(image, label\) or a dict with both, got Tensor"),
        ((torch.zeros(3, 8, 8),), r"expected samples \(image, label\) or a dict with both, got tuple of 1"),
        ((torch.zeros(64), 1), r"expected an image of shape \(H, W\) or \(C, H, W\) as part 0 .*, got \(64,\)"),
        ((1, torch.zeros(3, 8, 8)), "expected an image as part 0 of a sample, got int: pass image_column="),
    ],
)
def test_samples_whose_parts_cannot_be_told_are_refused(sample, message):
    with pytest.raises(DataError, match=message):
        open_images([sample] * 4)


def test_columns_may_be_named_for_dicts_and_tuples(images, labels):
    dicts = [{"a": x, "b": x * 0, "y": int(y), "z": 0} for x, y in zip(images, labels, strict=True)]
    store = open_images(dicts, image_column="a", label_column="y")
    torch.testing.assert_close(store.batch(range(60)), images)
    tuples = [("name", int(y), x) for x, y in zip(images, labels, strict=True)]
    assert open_images(tuples, image_column=2).fingerprint == store.fingerprint
    turned = [("name", x, int(y)) for x, y in zip(images, labels, strict=True)]
    assert open_images(turned, image_column=-2, label_column=-1).fingerprint == store.fingerprint
    with pytest.raises(DataError, match="has no image 'c': it has 'a', 'b', 'y', 'z'"):
        open_images(dicts, image_column="c")
    with pytest.raises(DataError, match="is a tuple of 3, it has no part 3"):
        open_images(tuples, image_column=3)


def test_pictures_with_16_bits_are_refused(labels):
    deep = [Image.fromarray(np.zeros((8, 8), np.uint16))] * 60
    with pytest.raises(DataError, match="8 bits per value, got PIL mode 'I;16'"):
        open_images(list(zip(deep, labels.tolist(), strict=True)))


def test_pixels_that_are_nan_throughout_are_named(images, labels):
    with pytest.raises(DataError, match="row 0 has NaN pixels"):
        open_images(TensorDataset(images * torch.nan, labels))


def test_grey_among_coloured_tensors_is_named(images, labels):
    rows = [(image[:1] if i == 17 else image, int(labels[i])) for i, image in enumerate(images)]
    with pytest.raises(DataError, match="row 17 has 1 channels, the first image 3: give all images in grey, or all"):
        open_images(rows)


@pytest.mark.parametrize("given", [-1, "4GB", float("inf"), None])
def test_a_cache_is_a_number_of_bytes(given, images, labels):
    with pytest.raises(DataError, match="expected cache_bytes= as a number of bytes"):
        open_images(TensorDataset(images, labels), cache_bytes=given)
    assert len(open_images(TensorDataset(images, labels), cache_bytes=5e2)) == len(images)


def test_on_error_has_two_values(images, labels):
    with pytest.raises(DataError, match="on_error='raise' or 'skip', got 'ignore'"):
        open_images(TensorDataset(images, labels), on_error="ignore")
