import functools
import random
import types

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from trainguard.data.pixels import (
    PixelRange,
    data_range,
    given_range,
    loader_range,
    most_trusted,
    probe_range,
    transform_range,
)
from trainguard.data.walk import find_generators, walk
from trainguard.errors import DataError

MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
NORMALISED = PixelRange.from_mean_std(MEAN, STD)


def picture(size=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_range_maps_black_and_white_as_normalize_does():
    normalize = v1.Normalize(MEAN, STD)
    for unit, value in ((0.0, NORMALISED.low), (1.0, NORMALISED.high)):
        expected = normalize(torch.full((3, 2, 2), unit))
        torch.testing.assert_close(NORMALISED.to_model(torch.full((1, 3, 2, 2), unit))[0], expected)
        torch.testing.assert_close(torch.tensor(value), expected[:, 0, 0])


def test_range_there_and_back_is_the_identity():
    x = torch.rand(4, 3, 5, 5)
    torch.testing.assert_close(NORMALISED.to_unit(NORMALISED.to_model(x)), x)
    outside = torch.full((1, 3, 1, 1), 9.0)
    assert (NORMALISED.to_unit(outside) > 1).all()  # linear: nothing is clamped in silence


def test_range_of_one_channel_serves_three_but_not_three_for_four():
    assert PixelRange((0.0,), (1.0,), "given").for_channels(3).high == (1.0, 1.0, 1.0)
    with pytest.raises(DataError, match="has 3 channels, the images have 4"):
        NORMALISED.for_channels(4)


@pytest.mark.parametrize("low, high", [((0.0,), (0.0,)), ((0.0,), (float("nan"),)), ((), ()), ((0.0, 0.0), (1.0,))])
def test_range_without_width_is_refused(low, high):
    with pytest.raises(DataError):
        PixelRange(low, high, "given")


def test_given_range_takes_three_ways_and_no_two():
    assert given_range(mean=MEAN, std=STD) == NORMALISED
    assert given_range(mean=0.5, std=0.5) == PixelRange((-1.0,), (1.0,), "given")
    assert given_range(bounds=(-1, 1)) == PixelRange((-1.0,), (1.0,), "given")
    assert given_range(NORMALISED) is NORMALISED
    assert given_range() is None
    with pytest.raises(DataError, match="mean= and std= together"):
        given_range(mean=MEAN)
    with pytest.raises(DataError, match="pass one"):
        given_range(NORMALISED, bounds=(0, 1))


def test_a_given_normalisation_of_pixels_to_255_is_refused():
    for mean, std in (((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), (0, 255)):
        with pytest.raises(DataError, match="divide them by 255"):
            given_range(mean=mean, std=std)


def test_a_loader_may_keep_its_normalisation_in_any_precision():
    loader = types.SimpleNamespace(
        mean=torch.full((1, 3, 1, 1), 127.5, dtype=torch.bfloat16), std=torch.full((1, 3, 1, 1), 127.5).half()
    )
    assert loader_range(loader).low == (-1.0,) * 3


def test_loader_range_reads_timm_s_values_times_255():
    tensors = types.SimpleNamespace(
        mean=torch.tensor(MEAN).view(1, 3, 1, 1) * 255, std=torch.tensor(STD).view(1, 3, 1, 1) * 255
    )
    found = loader_range(tensors)
    assert found.source == "loader" and found.agrees_with(NORMALISED)
    assert loader_range(torch.utils.data.DataLoader([1, 2])) is None


class HuggingFaceProcessor:
    def __init__(self, do_normalize=True):
        self.image_mean, self.image_std, self.do_normalize = list(MEAN), list(STD), do_normalize


def closure(transform):
    return lambda image: transform(image)


GLOBAL_PIPELINE = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])


def through_a_global(batch):
    return {"pixel_values": [GLOBAL_PIPELINE(image) for image in batch["image"]]}


PIPELINES = {
    "v1": v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "v2": v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=MEAN, std=STD)]),
    "nested": v1.Compose([v1.RandomApply([v1.ColorJitter(0.1)]), v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])]),
    "partial": functools.partial(closure, v1.Normalize(MEAN, STD)),
    "closure": closure(v1.Normalize(MEAN, STD)),
    "bound method": v1.Normalize(MEAN, STD).forward,
    "global": through_a_global,
    "processor": HuggingFaceProcessor(),
    "timm": timm.data.create_transform(8, is_training=True, mean=MEAN, std=STD),
}


def test_transform_range_reads_albumentations():
    albumentations = pytest.importorskip("albumentations", reason="needs albumentations, which nothing here installs")
    found = transform_range(
        albumentations.Compose([albumentations.HorizontalFlip(), albumentations.Normalize(MEAN, STD)])
    )
    assert found.low == pytest.approx(NORMALISED.low) and found.high == pytest.approx(NORMALISED.high)


@pytest.mark.parametrize("name", PIPELINES)
def test_transform_range_finds_the_normalisation(name):
    found = transform_range(PIPELINES[name])
    assert found is not None and found.source == "transform"
    assert found.low == pytest.approx(NORMALISED.low) and found.high == pytest.approx(NORMALISED.high)


@pytest.mark.parametrize(
    "pipeline",
    [v1.ToTensor(), HuggingFaceProcessor(do_normalize=False), np.ones(3), torch.ones(3), [torch.ones(3)] * 100, None],
    ids=lambda pipeline: type(pipeline).__name__,
)
def test_transform_range_sees_nothing_where_there_is_nothing(pipeline):
    assert transform_range(pipeline) is None


JITTER = v1.Compose(
    [v1.RandomCrop(16, padding=4), v1.ColorJitter(0.4, 0.4, 0.4, 0.1), v1.ToTensor(), v1.RandomErasing(p=0.5)]
)


@pytest.mark.parametrize(
    "run, expected",
    [
        (v1.ToTensor(), ((0, 0, 0), (1, 1, 1))),
        (JITTER, ((0, 0, 0), (1, 1, 1))),
        (lambda image: F.normalize(JITTER(image), MEAN, STD), (NORMALISED.low, NORMALISED.high)),
        (lambda image: JITTER(image) * 255, ((0, 0, 0), (255, 255, 255))),
    ],
)
def test_probe_range_is_exact_under_augmentation(run, expected):
    found = probe_range(run, 16, 16, 3)
    assert found.low == pytest.approx(expected[0], abs=1e-5) and found.high == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize(
    "run", [lambda image: 1 / 0, v1.PILToTensor(), lambda image: torch.zeros(3, 4, 4), lambda image: image]
)
def test_probe_range_says_nothing_where_it_cannot_know(run):
    assert probe_range(run, 16, 16, 3) is None


def test_data_range_snaps_to_usual_ranges_and_else_takes_the_extremes():
    assert data_range([0.02], [0.97]).high == (1.0,)
    assert data_range([-0.98, -0.9], [0.97, 0.8]).low == (-1.0, -1.0)
    assert data_range([0.0], [250.0]).high == (255.0,)
    odd = data_range([-2.1, -2.0], [2.6, 2.4])
    assert (odd.low, odd.high, odd.source) == ((-2.1, -2.0), (2.6, 2.4), "estimated from the data")
    assert data_range([3.0], [3.0]).high == (4.0,)  # a constant image still has a range


def test_most_trusted_takes_the_first_and_warns_about_a_contradiction():
    other = PixelRange((0.0,) * 3, (1.0,) * 3, "probe")
    with pytest.warns(UserWarning, match=r"given\) is used, but another source says .*probe"):
        assert most_trusted([NORMALISED, None, other], 3) is NORMALISED
    close = PixelRange(NORMALISED.low, tuple(v + 1e-4 for v in NORMALISED.high), "probe")
    assert most_trusted([None, NORMALISED, close], 3) is NORMALISED
    assert most_trusted([None, None], 3) is None


class Part:
    def __init__(self, k):
        self.k = k


def test_walk_ends_on_circles_and_leaves_long_lists_out():
    inner = v1.Normalize(MEAN, STD)
    circle = [inner]
    circle.append(circle)
    assert sum(found is inner for found in walk(circle)) == 1
    assert not any(type(found) is str for found in walk(["a"] * 65, {"b": "c"}))
    parts = [Part(k) for k in range(70)]  # of a data set: they come after all that is nearer
    assert [found for found in walk([parts, [inner]]) if found is inner or found in parts] == [inner, *parts]


def test_a_model_in_the_pipeline_is_no_normalisation():
    class Normalize(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.std, self.layer = list(MEAN), list(STD), torch.nn.Linear(1, 1)

    assert transform_range([Normalize()]) is None
    assert transform_range([v2.Normalize(MEAN, STD)]).agrees_with(NORMALISED)


def test_a_source_of_randomness_without_a_state_is_left_alone():
    assert find_generators(types.SimpleNamespace(one=random.SystemRandom(), other=random.Random(0))) != []
    assert find_generators(types.SimpleNamespace(one=random.SystemRandom())) == []


def test_find_generators_finds_those_a_data_set_keeps():
    dataset = types.SimpleNamespace(rng=np.random.default_rng(), transform=types.SimpleNamespace(g=torch.Generator()))
    assert find_generators(dataset) == [dataset.rng, dataset.transform.g]


def test_noise_is_no_normalisation():
    class AddGaussianNoise:
        mean, std = 0.0, 0.1

    class Stats:
        mean, std = (0.4,), (0.2,)

    class Normalize:
        mean, std = (0.5,), (0.25,)

    for first in (AddGaussianNoise(), Stats()):
        assert transform_range([first, Normalize()]).high == (2.0,)
    assert transform_range([AddGaussianNoise()]) is None
    assert transform_range([Stats()]).low == pytest.approx((-2.0,))


def test_a_normalisation_may_be_of_pixels_to_255():
    class Normalize:
        mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    found = transform_range([Normalize()])
    assert found.agrees_with(PixelRange.from_mean_std((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mean": [0.5], "std": [0]}, "above 0"),
        ({"mean": [0.5, 0.5, 0.5], "std": 0.2}, "as many values for mean as for std"),
        ({"bounds": (0,)}, r"bounds= as the two model inputs .*, got \(0,\)"),
        ({"bounds": 5}, "bounds= as the two model inputs"),
        ({"pixel_range": (0, 1)}, "pixel_range= as a PixelRange"),
    ],
)
def test_what_is_no_range_is_refused(said, message):
    with pytest.raises(DataError, match=message):
        given_range(**said)
