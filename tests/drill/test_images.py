"""What the drill reads: which rows, which split, which pixels."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from trainguard.drill.images import load_images
from trainguard.errors import DataError


def listed(labels, names=None):
    """A Hugging Face data set of grey squares: row i has the value i."""
    names = names or [str(k) for k in range(max(labels) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    pictures = [Image.fromarray(np.full((8, 8, 3), row % 256, dtype=np.uint8)) for row in range(len(labels))]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def rows(images):
    return images[:, 0, 0, 0].tolist()


def foldered(root, counts, *, name="{:02d}.png"):
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for row in range(count):
            Image.fromarray(np.full((8, 8, 3), row, dtype=np.uint8)).save(root / place / name.format(row))
    return root


class Tensors(Dataset):
    """Normalised images, opaque to whoever looks for a transform."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], row % 2


def test_every_fifth_row_is_held_out():
    data = load_images(listed([0, 1, 2] * 10))
    assert rows(data.test) == list(range(4, 30, 5)) and len(data.train) == 24


@pytest.mark.parametrize("form", ["columns", "samples"])
def test_of_labels_in_turn_every_fifth_of_each_class_is_held_out(form):
    given = listed([row % 10 for row in range(100)])
    if form == "samples":
        given = [(torch.full((3, 8, 8), row, dtype=torch.uint8), row % 10) for row in range(100)]
    data = load_images(given)
    assert torch.bincount(data.train_labels).tolist() == [8] * 10
    assert torch.bincount(data.test_labels).tolist() == [2] * 10
    assert not set(rows(data.train)) & set(rows(data.test))


def test_rows_of_a_set_that_comes_class_by_class_are_taken_from_all_over():
    sorted_set = listed([row // 40 for row in range(120)])
    with pytest.warns(UserWarning, match="the first 24 rows hold 1 of 3 classes: 24 rows are taken from all over"):
        data = load_images(sorted_set, test=sorted_set, rows=24, test_rows=100)
    assert torch.bincount(data.train_labels).tolist() == [8] * 3 and rows(data.test) == list(range(100))
    assert rows(load_images(listed([0, 1, 2] * 40), rows=24).train) == [row for row in range(30) if row % 5 != 4]


def test_a_class_of_the_name_test_is_no_split(tmp_path):
    data = load_images(str(foldered(tmp_path, {"cat": 10, "dog": 10, "test": 10})))
    assert data.class_names == ("cat", "dog", "test") and (len(data.train), len(data.test)) == (24, 6)


def test_a_test_folder_without_classes_is_no_test_set(tmp_path):
    data = load_images(str(foldered(tmp_path, {"train/cat": 10, "train/dog": 10, "test": 4})))
    assert data.class_names == ("cat", "dog") and (len(data.train), len(data.test)) == (16, 4)


def test_a_folder_may_be_the_test_set(tmp_path):
    place = foldered(tmp_path, {"learn/cat": 10, "learn/dog": 10, "held/cat": 4, "held/dog": 4})
    data = load_images(str(place / "learn"), test=str(place / "held"))
    assert (len(data.train), len(data.test)) == (20, 8)


def test_digits_are_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(foldered(tmp_path, {"digits/p": 10, "digits/q": 10}))
    with pytest.raises(DataError, match=r"a built-in set and a folder here as well: pass \./digits"):
        load_images("digits")
    assert load_images("./digits").class_names == ("p", "q")


def test_a_test_set_may_lie_on_the_disk_beside_a_data_set_at_hand(tmp_path):
    listed([1, 0, 1]).to_parquet(tmp_path / "held.parquet")
    data = load_images(listed([0, 1] * 5), test=tmp_path / "held.parquet")
    assert len(data.train) == 10 and data.test_labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="digits come with a test set"):
        load_images("digits", test=tmp_path / "held.parquet")


def test_an_estimated_pixel_range_is_that_of_the_training_set_for_both():
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(40, 3, 8, 8, generator=generator) * 5 - 2.2
    train[0, :, 0, 0], train[1, :, 0, 0] = -2.2, 2.8
    test = torch.full((4, 3, 8, 8), 0.3)
    test[:, :, 0, 0], test[:, :, 0, 1] = -0.5, 1.1
    data = load_images(Tensors(train), test=Tensors(test))
    assert data.test[0, 0, 4, 4] == round((0.3 + 2.2) / 5 * 255)
