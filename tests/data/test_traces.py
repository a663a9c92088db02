"""What reading a data set changes in it, and in what it reads with, is put back."""

import ctypes
import functools
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from trainguard.data.store import open_images
from trainguard.data.traces import left_as_is
from trainguard.data.walk import find_generators


class Reads:
    """Counts and keeps whatever it reads."""

    total = 0

    def __init__(self):
        self.shared = multiprocessing.Value("i", 3)
        self.row = multiprocessing.Array(ctypes.c_double, [1.0, 2.0])
        self.own = threading.local()
        self.seen = np.zeros(100_000, bool)  # more than counts of a few, less than data
        self.cache = {}

    @functools.lru_cache  # noqa: B019
    def kept(self, index):
        return torch.rand(1)

    def __getitem__(self, index):
        Reads.total += 1
        self.shared.value += 1
        self.row[0] += 1
        self.own.handle = object()
        self.seen[index] = True
        self.cache[index] = index
        return self.kept(index)


def test_whatever_holds_what_was_read_it_is_put_back():
    data = Reads()
    with left_as_is(data):
        data[5]
    assert (Reads.total, data.shared.value, data.row[:]) == (0, 3, [1.0, 2.0])
    assert not hasattr(data.own, "handle") and not data.seen.any() and not data.cache
    assert Reads.kept.cache_info().currsize == 0
    data[5]
    with left_as_is(data):
        data[6]
    assert Reads.total == 1 and Reads.kept.cache_info().currsize == 2  # what the user had is not thrown away
    Reads.kept.cache_clear()


def test_pictures_that_are_opened_and_not_read_yet_can_be_read_afterwards(tmp_path):
    class Lazy(Dataset):
        def __init__(self):
            for row in range(4):
                Image.new("RGB", (8, 8), (60 * row, 0, 0)).save(tmp_path / f"{row}.png")
            self.held = [{"image": Image.open(tmp_path / f"{row}.png"), "label": row % 2} for row in range(4)]

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return self.held[index]

    data = Lazy()
    store = open_images(data, cache_bytes=0)
    for _ in range(2):
        assert store.batch([3])[0, 0, 0, 0] == pytest.approx(180 / 255)
    assert data[3]["image"].getpixel((0, 0)) == (180, 0, 0)


def test_what_the_data_set_is_read_into_is_put_back_once_for_many_batches():
    class Caching(Dataset):
        def __init__(self):
            self.read = {}

        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.read[index] = True
            return torch.full((1, 8, 8), index / 4), index % 2

    data = Caching()
    store = open_images(data, cache_bytes=0)
    with store.left_as_is():
        store.batch([0])
        assert data.read == {0: True}
        assert store.only([]).batch([1]).shape == (1, 1, 8, 8)
    assert data.read == {}


def test_generators_in_long_lists_and_of_named_arguments_are_found():
    class Own:
        def __init__(self):
            self.each = [np.random.default_rng(k) for k in range(70)]

        def __getitem__(self, index, *, last=np.random.default_rng(70)):  # noqa: B008
            return self.each[index], last

    assert len(find_generators(Own())) == 71
