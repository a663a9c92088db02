import copy
import functools
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import MNIST, FakeData, ImageFolder

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.data.views import LiveView
from trainguard.errors import DataError
from trainguard.sources import open_data

MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
TRAIN = T.Compose(
    [T.RandomCrop(8, padding=2), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing()]
)


class Samples(Dataset):
    """Any list of samples as a data set."""

    def __init__(self, samples):
        self.stored = list(samples)

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, index):
        return self.stored[index]


def as_pil(image):
    return T.functional.to_pil_image((image * 255).round().byte())


FORMS = {
    "float": lambda x, y: (x, int(y)),
    "tensor label": lambda x, y: (x, y),
    "numpy label": lambda x, y: (x, np.int32(y)),
    "uint8": lambda x, y: ((x * 255).round().byte(), int(y)),
    "int64": lambda x, y: ((x * 255).round().long(), int(y)),
    "channels last": lambda x, y: ((x * 255).round().byte().permute(1, 2, 0).numpy(), int(y)),
    "pil": lambda x, y: (as_pil(x), int(y)),
    "list": lambda x, y: [x, int(y), "extra"],
    "dict": lambda x, y: {"image": x, "label": int(y), "id": 7.5},
    "dict with other keys": lambda x, y: {"pixel_values": x, "caption": "a cat", "target": y},
    "float in 0 to 255": lambda x, y: (x * 255, int(y)),
    "float in -1 to 1": lambda x, y: (x * 2 - 1, int(y)),
    "half": lambda x, y: (x.half(), int(y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_sample_gives_the_same_pixels_and_labels(form, images, labels):
    store = open_images(Samples(FORMS[form](x, y) for x, y in zip(images, labels, strict=True)))
    assert torch.equal((store.batch(range(60)) * 255).round(), (images * 255).round())
    assert store.labels.tolist() == labels.tolist()
    assert (store.shape, store.num_classes, store.class_names, len(store)) == ((3, 8, 8), 3, ("0", "1", "2"), 60)
    assert store.readable.tolist() == list(range(60)) and store.unreadable == ()


@pytest.mark.parametrize("as_form", [lambda x: x[:1], lambda x: x[0], lambda x: as_pil(x[:1])])
def test_grey_images_have_one_channel(as_form, images, labels):
    store = open_images(Samples((as_form(x), int(y)) for x, y in zip(images, labels, strict=True)))
    assert store.shape == (1, 8, 8) and len(store.pixel_range.low) == 1
    torch.testing.assert_close(store.batch([5]), images[5:6, :1])


def test_mixed_grey_and_colour_pictures_become_colour(images, labels):
    pictures = [as_pil(x[:1]) if i == 0 else as_pil(x) for i, x in enumerate(images)]
    store = open_images(Samples((x, int(y)) for x, y in zip(pictures, labels, strict=True)))
    assert store.shape == (3, 8, 8)
    torch.testing.assert_close(store.batch([0])[0], images[0, :1].expand(3, -1, -1))


@pytest.mark.parametrize("cached", [0, 10_000])
def test_colour_among_grey_pictures_is_not_lost_where_it_is_rare(cached, images, labels):
    images, labels = images.repeat(3, 1, 1, 1), labels.repeat(3)
    looked_at = set(np.linspace(0, 179, 32).astype(int).tolist())
    rare = next(i for i in range(100, 180) if i not in looked_at)
    pictures = [as_pil(x if i == rare else x[:1]) for i, x in enumerate(images)]
    store = open_images(Samples((x, int(y)) for x, y in zip(pictures, labels, strict=True)), cache_bytes=cached)
    assert store.shape == (3, 8, 8) and store.pixel_range.low == (0.0,) * 3
    torch.testing.assert_close(store.batch([rare])[0], images[rare])
    torch.testing.assert_close(store.batch([0])[0], images[0, :1].expand(3, -1, -1))


def test_batch_is_in_the_order_asked_for_with_repeats(images, labels):
    store = open_images(TensorDataset(images, labels))
    index = [7, 3, 3, 59, 0]
    torch.testing.assert_close(store.batch(index), images[index])
    torch.testing.assert_close(store.batch(torch.tensor(index)), images[index])
    assert store.batch([]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("cached", [0, 1, 17, 60])
def test_a_smaller_cache_gives_the_same_pixels(cached, images, labels):
    store = open_images(TensorDataset(images, labels), cache_bytes=cached * 192 + 5)
    assert store.cached_bytes == cached * 192
    torch.testing.assert_close(store.batch([50, 2, 2, 16, 17]), images[[50, 2, 2, 16, 17]])
    assert store.fingerprint == open_images(TensorDataset(images, labels)).fingerprint


def test_only_holds_some_images_and_still_gives_all(images, labels):
    store = open_images(TensorDataset(images, labels), cache_bytes=30 * 192)
    smaller = store.only([5, 40, 20])
    assert smaller.cached_bytes == 2 * 192 and store.cached_bytes == 30 * 192
    torch.testing.assert_close(smaller.batch(range(60)), images)


class Augmented(Dataset):
    """Random augmentation from every stream there is, its own included."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.own = np.random.default_rng(5)
        self.torch_own = torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        shift = random.randrange(3) + np.random.randint(3) + int(self.own.integers(3)) + int(torch.randint(3, ()))
        shift += int(torch.randint(3, (), generator=self.torch_own))
        return torch.roll(self.images[index], shift, dims=2), int(self.labels[index])


def test_random_augmentation_is_fixed_by_the_index(images, labels):
    stores = [open_images(Augmented(images, labels), cache_bytes=cache) for cache in (0, 1 << 20)]
    forwards, backwards = stores[0].batch(range(60)), stores[0].batch(range(59, -1, -1)).flip(0)
    assert torch.equal(forwards, backwards)
    assert torch.equal(forwards, stores[1].batch(range(60)))
    assert not torch.equal(forwards, images)  # the augmentation was there


def test_reading_moves_no_stream_of_the_user_s(images, labels):
    def draws(dataset):
        return [
            torch.rand(1).item(),
            np.random.rand(),
            random.random(),
            dataset.own.random(),
            dataset[0][0].sum().item(),
        ]

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws(Augmented(images, labels))
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    dataset = Augmented(images, labels)
    open_images(dataset, cache_bytes=0).batch([1, 2, 3])
    assert draws(dataset) == expected


def test_reading_with_processes_gives_the_same_store(images, labels):
    dataset = Augmented(images, labels)
    alone, together = open_images(dataset), open_images(dataset, workers=2)
    assert alone.fingerprint == together.fingerprint
    assert torch.equal(alone.batch(range(60)), together.batch(range(60)))


def test_fingerprint_changes_with_a_label_a_pixel_and_the_order(images, labels):
    def fingerprint(x, y):
        return open_images(TensorDataset(x, y)).fingerprint

    other_pixel, other_label = images.clone(), labels.clone()
    other_pixel[30, 0, 0, 0] = 1 - other_pixel[30, 0, 0, 0]
    other_label[30] = 1
    order = torch.randperm(60)
    found = [(images, labels), (other_pixel, labels), (images, other_label), (images[order], labels[order])]
    assert len({fingerprint(x, y) for x, y in found}) == 4
    assert fingerprint(images, labels) == fingerprint(images.clone(), labels.clone())


def test_torchvision_data_are_read_without_their_augmentation():
    dataset = FakeData(40, (3, 8, 8), 3, transform=TRAIN)
    store = open_images(dataset)
    raw = copy.copy(dataset)
    raw.transform = None
    expected = torch.stack([T.functional.pil_to_tensor(raw[i][0]) for i in range(40)])
    assert torch.equal((store.batch(range(40)) * 255).round().byte(), expected)
    assert store.pixel_range.source == "transform"
    assert store.pixel_range.low == pytest.approx([-m / s for m, s in zip(MEAN, STD, strict=True)])
    assert dataset.transform is TRAIN


def test_torchvision_data_come_at_the_size_that_training_uses():
    dataset = FakeData(40, (3, 16, 12), 3, transform=T.Compose([T.RandomResizedCrop(8), T.Grayscale(), T.ToTensor()]))
    store = open_images(dataset)
    assert store.shape == (1, 8, 8)
    dataset.transform = None
    whole = dataset[3][0].convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    assert (store.batch([3])[0, 0] * 255).round().tolist() == np.array(whole, dtype=float).tolist()


def test_a_given_transform_makes_the_picture_to_screen():
    dataset = FakeData(40, (3, 16, 12), 3, transform=TRAIN)
    evaluation = T.Compose([T.CenterCrop(6), T.ToTensor(), T.Normalize(MEAN, STD)])
    store = open_images(dataset, transform=evaluation)
    dataset.transform = evaluation
    expected = store.pixel_range.to_unit(dataset[3][0][None])
    torch.testing.assert_close(store.batch([3]), expected, atol=0.51 / 255, rtol=0)


def test_read_raw_is_used_where_a_data_set_offers_it(images, labels):
    class WithRaw(Augmented):
        def read_raw(self, index):
            return self.images[index], int(self.labels[index])

    torch.testing.assert_close(open_images(WithRaw(images, labels)).batch(range(60)), images)


def test_a_user_s_own_torchvision_subclass_is_read_as_training_reads_it():
    class Marked(FakeData):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            image[:, 0, 0] = 1.0
            return image, label

    assert (open_images(Marked(40, (3, 8, 8), 3, transform=T.ToTensor())).batch(range(40))[:, :, 0, 0] == 1).all()


class WithTransform(Dataset):
    """The usual data set of a user's: images, labels and a transform."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.labels[index])


TENSOR_TRAIN = T.Compose([T.RandomCrop(8, padding=2), T.RandomHorizontalFlip(), T.Normalize(MEAN, STD)])


def test_a_user_s_data_set_is_read_before_its_transform(images, labels):
    pictures = [as_pil(image) for image in images]
    for stored, transform in ((pictures, TRAIN), (images, TENSOR_TRAIN)):
        dataset = WithTransform(stored, labels, transform)
        store = open_images(Subset(dataset, range(1, 60)))
        assert torch.equal((store.batch(range(59)) * 255).round(), (images[1:] * 255).round())
        assert store.pixel_range.source == "transform" and dataset.transform is transform


def test_a_transform_by_name_is_left_out_too(images, labels):
    class ByName(WithTransform):
        def __getitem__(self, index):
            image = (self.images[index] * 255).round().byte().permute(1, 2, 0).numpy()
            return self.transform(image=image)["image"], int(self.labels[index])

    class Albumentations:
        """Called as albumentations' transforms are."""

        mean, std = MEAN, STD

        def __call__(self, *arguments, **data):
            if arguments:
                raise KeyError("pass named arguments")
            return {"image": T.Normalize(MEAN, STD)(torch.from_numpy(data["image"]).permute(2, 0, 1).flip(2) / 255)}

    torch.testing.assert_close(open_images(ByName(images, labels, Albumentations())).batch(range(60)), images)


def test_a_step_after_the_transform_keeps_the_transform_in(images, labels):
    class MarkedLater(WithTransform):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            if index % 20 == 7:
                image[:, 0, 0] = 1
            return image, label

    whole = (images * 255).round().byte()
    store = open_images(MarkedLater(whole, labels, T.Compose([T.ConvertImageDtype(torch.float32), T.RandomCrop(8, 2)])))
    assert (store.batch([7, 27, 47])[:, :, 0, 0] == 1).all()


def test_a_data_set_that_keeps_what_its_transform_made_is_read_as_it_is(images, labels):
    class Remembering(WithTransform):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.made = {}

        def __getitem__(self, index):
            if index not in self.made:
                self.made[index] = super().__getitem__(index)
            return self.made[index]

    dataset = Remembering([as_pil(image) for image in images], labels, TRAIN)
    before = [dataset[i][0] for i in range(60)]
    store = open_images(dataset)
    assert all(torch.is_tensor(image) for image, _ in dataset.made.values())
    seen = store.pixel_range.to_unit(torch.stack(before)).clamp(0, 1)
    torch.testing.assert_close(store.batch(range(60)), seen, atol=0.51 / 255, rtol=0)


def test_subsets_of_subsets_keep_their_own_positions(images, labels):
    inner = Subset(TensorDataset(images, labels), range(10, 50))
    store = open_images(Subset(inner, [30, 2, 5, 3, 9, 0]))
    rows = [40, 12, 15, 13, 19, 10]
    torch.testing.assert_close(store.batch(range(6)), images[rows])
    assert store.labels.tolist() == labels[rows].tolist()
    assert store.name(1) == "row 1"


def write_folder(root, count=4, kinds=("cat", "dog")):
    for kind in kinds:
        (root / kind).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{number}.png")
    return root


def test_image_folders_name_files_and_classes(tmp_path):
    dataset = ImageFolder(write_folder(tmp_path), T.ToTensor())
    store = open_images(Subset(dataset, [1, 0, 6, 7]))
    assert store.class_names == ("cat", "dog") and store.num_classes == 2
    assert store.name(2) == f"row 2 ({tmp_path}/dog/2.png)"


def test_hugging_face_columns_are_found_by_type(images, labels):
    dataset = hugging_face(images, labels)
    store = open_images(dataset)
    torch.testing.assert_close(store.batch(range(60)), images)
    assert store.class_names == ("cat", "dog", "emu")
    assert store.labels.tolist() == labels.tolist()


def hugging_face(images, labels, **columns):
    features = datasets.Features(
        {
            "number": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["cat", "dog", "emu"]),
            "picture": datasets.Image(),
            **{name: feature for name, (feature, _) in columns.items()},
        }
    )
    values = {"number": list(range(60)), "kind": labels.tolist(), "picture": [as_pil(x) for x in images]}
    return datasets.Dataset.from_dict(values | {name: made for name, (_, made) in columns.items()}, features=features)


def to_pixel_values(transform, batch):
    return {"pixel_values": [transform(picture) for picture in batch["picture"]], "labels": batch["kind"]}


def test_hugging_face_formats_are_seen_through(images, labels):
    dataset = hugging_face(images, labels)
    seen = dataset.with_transform(functools.partial(to_pixel_values, TRAIN))
    store = open_images(seen)
    torch.testing.assert_close(store.batch(range(60)), images)
    assert store.pixel_range.source == "transform" and store.pixel_range.low[0] == pytest.approx(-0.49 / 0.2)
    assert (
        open_images(dataset.with_format("torch")).fingerprint == open_images(dataset.with_format("numpy")).fingerprint
    )
    selected = dataset.select([5, 3, 9, 8, 1, 4])
    torch.testing.assert_close(open_images(selected).batch(range(6)), images[[5, 3, 9, 8, 1, 4]])
    torch.testing.assert_close(open_images(Subset(dataset, [5, 3, 9, 8, 1, 4])).batch([1]), images[3:4])


def test_hugging_face_transform_decides_the_size(images, labels):
    smaller = functools.partial(to_pixel_values, T.Compose([T.Resize(4), T.ToTensor()]))
    assert open_images(hugging_face(images, labels).with_transform(smaller)).shape == (3, 4, 4)


def test_pixel_range_given_is_used_for_floats(images, labels):
    given = PixelRange.from_mean_std(MEAN, STD)
    store = open_images(TensorDataset(given.to_model(images), labels), pixel_range=given)
    assert store.pixel_range is given
    assert torch.equal((store.batch(range(60)) * 255).round(), (images * 255).round())


def test_pixel_range_is_estimated_and_says_so_where_nothing_is_known(images, labels):
    given = PixelRange.from_mean_std(MEAN, STD)
    store = open_images(TensorDataset(given.to_model(images), labels))
    assert store.pixel_range.source == "estimated from the data"
    assert store.pixel_range.agrees_with(given)  # the data hold black and white somewhere


def test_whole_numbers_without_a_transform_are_assumed_to_reach_the_model_in_0_to_1(images, labels):
    store = open_images(TensorDataset((images * 255).round().byte(), labels))
    assert store.pixel_range == PixelRange((0.0,) * 3, (1.0,) * 3, "assumed")


def test_random_erasing_outside_the_range_is_clamped(images, labels):
    class Erased(Augmented):
        transform = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing(p=1, value="random")])

        def __getitem__(self, index):
            return self.transform(as_pil(self.images[index])), int(self.labels[index])

    pixels = open_images(Erased(images, labels)).batch(range(60))
    assert pixels.min() == 0 and pixels.max() == 1


def test_progress_counts_every_sample(images, labels):
    import io

    from trainguard.progress import Progress

    stream = io.StringIO()
    open_images(TensorDataset(images, labels), progress=Progress(stream=stream))
    assert "reading images" in stream.getvalue() and "60 samples" in stream.getvalue()


def test_mnist_s_own_arrays_are_read_as_grey(tmp_path):
    dataset = MNIST.__new__(MNIST)
    dataset.data, dataset.targets = torch.arange(4 * 64).reshape(4, 8, 8).byte(), torch.tensor([0, 1, 0, 1])
    dataset.transform = dataset.target_transform = dataset.transforms = None
    store = open_images(dataset)
    assert store.shape == (1, 8, 8) and store.num_classes == 10
    assert torch.equal((store.batch([2])[0, 0] * 255).round().byte(), dataset.data[2])


class Own(Dataset):
    """Stored images behind the attribute `transform`."""

    def __init__(self, stored, transform):
        self.stored, self.transform = stored, transform

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, index):
        return self.transform(self.stored[index]), index % 2


GREY = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
DEEP = np.random.default_rng(0).integers(0, 65536, (20, 8, 8), dtype=np.uint16)


@pytest.mark.parametrize(
    ("stored", "transform", "shape"),
    [
        (list(GREY), T.Compose([T.ToPILImage(), T.Grayscale(3), T.ToTensor()]), (3, 8, 8)),
        (list(COLOUR), T.Compose([T.ToPILImage(), T.Grayscale(1), T.ToTensor()]), (1, 8, 8)),
        ([Image.fromarray(x).convert("RGBA") for x in COLOUR], T.ToTensor(), (4, 8, 8)),
        ([Image.fromarray(x) for x in DEEP], lambda x: torch.from_numpy(np.array(x) / 65535).float()[None], (1, 8, 8)),
        (list(DEEP), lambda x: torch.from_numpy(x / 65535).float()[None], (1, 8, 8)),
    ],
)
def test_a_transform_that_changes_channels_or_depth_is_read_through(stored, transform, shape):
    store = open_images(Own(stored, transform))
    assert store.shape == shape
    expected = torch.stack([transform(image) for image in stored])
    assert torch.equal((store.batch(range(20)) * 255).round(), (expected * 255).round())
    assert store.pixel_range.agrees_with(PixelRange((0.0,) * shape[0], (1.0,) * shape[0], "given"))


def test_sixteen_bits_without_a_transform_are_refused_by_name():
    from trainguard.errors import DataError

    with pytest.raises(DataError, match=r"row 0 has values from .* expected whole numbers from 0 to 255"):
        open_images([(x, row % 2) for row, x in enumerate(DEEP)])


def test_plain_pixels_under_a_range_of_another_are_normalised_after_the_data_set(images, labels, recwarn):
    given = PixelRange.from_mean_std(MEAN, STD)
    store = open_images(TensorDataset(images, labels), pixel_range=given)
    assert store.pixel_range == given and not recwarn
    assert torch.equal((store.batch(range(60)) * 255).round(), (images * 255).round())


def test_two_valued_images_are_black_and_white():
    masks = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    store = open_images(TensorDataset(masks, torch.arange(20) % 2))
    assert torch.equal(store.batch(range(20)), masks.float())


@pytest.mark.parametrize("feature", [None, datasets.Array3D((8, 8, 3), "uint8")])
def test_a_named_column_of_numbers_is_read_as_images(feature, images, labels):
    values = (images * 255).round().byte().permute(0, 2, 3, 1)
    features = feature and datasets.Features({"pixels": feature, "label": datasets.ClassLabel(3)})
    columns = {"pixels": values.tolist(), "label": labels.tolist()}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    store = open_images(dataset, image_column="pixels", label_column="label")
    assert store.shape == (3, 8, 8) and store.name(5) == "row 5"
    torch.testing.assert_close(store.batch(range(60)), (images * 255).round() / 255)
    with pytest.raises(DataError, match="'label' cannot be image and label"):
        open_images(dataset, image_column="label", label_column="label")
    flat = datasets.Dataset.from_dict(columns | {"pixels": values.flatten(1).tolist()})
    with pytest.raises(DataError, match=r"expected an image, got ndarray of shape \(192,\)"):
        open_images(flat, image_column="pixels", label_column="label")


GREY = T.Compose([T.Grayscale(), T.ToTensor(), T.Normalize([0.5], [0.5])])


@pytest.mark.parametrize("sizes", [(8,), (8, 9, 10)])
def test_pictures_in_colour_that_training_sees_in_grey_are_grey(sizes, tmp_path, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / str(int(label))).mkdir(exist_ok=True)
        side = sizes[i % len(sizes)]
        as_pil(image).resize((side, side)).save(tmp_path / str(int(label)) / f"{i}.png")
    pipeline = GREY if len(sizes) == 1 else T.Compose([T.Resize((8, 8)), GREY])
    store = open_images(ImageFolder(tmp_path, pipeline))
    assert store.shape == (1, 8, 8) and store.pixel_range.low == (-1.0,)


def test_rare_colour_is_not_lost_where_pictures_are_scaled(tmp_path):
    looked_at = set(np.linspace(0, 179, 32).astype(int).tolist())
    for i in range(180):
        folder = tmp_path / f"{'ab'[i // 90]}"
        folder.mkdir(exist_ok=True)
        rare = i in (95, 97) and i not in looked_at
        side = 10 + i % 3
        Image.new("RGB" if rare else "L", (side, side), (255, 0, 0) if rare else 90).save(folder / f"{i:03}.png")
    store = open_images(open_data(tmp_path, size=8))
    assert store.shape == (3, 8, 8) and store.batch([95])[0, :, 4, 4].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("sizes", [(8,), (8, 9, 10)])
def test_what_a_hugging_face_transform_makes_counts_and_not_what_it_leaves_beside_it(sizes, images, labels):
    pictures = [as_pil(x).resize((sizes[i % len(sizes)],) * 2) for i, x in enumerate(images)]
    pipeline = T.Compose([T.Resize((4, 4)), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])

    def transformed(batch):
        batch["pixel_values"] = [pipeline(image) for image in batch["image"]]
        batch["labels"] = batch["label"]
        return batch

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features)
    dataset.set_transform(transformed)
    for named in ({}, {"image_column": "pixel_values", "label_column": "labels"}):
        store = open_images(dataset, **named)
        assert store.shape == (3, 4, 4) and store.pixel_range.low == (-1.0,) * 3
    with pytest.raises(
        DataError, match="nor what with_transform gives has 'pixels': it has image, label, pixel_values"
    ):
        open_images(dataset, image_column="pixels")


class Around(Dataset):
    """Another data set's samples."""

    def __init__(self, base):
        self.base = base

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        return self.base[index]


class Wrapper(Around):
    """Hands its transform on to the data set inside."""

    @property
    def transform(self):
        return self.base.transform

    @transform.setter
    def transform(self, transform):
        self.base.transform = transform


class Delegating(Around):
    """Asks the data set inside for whatever it does not have: it cannot be copied before it is filled."""

    def __getattr__(self, name):
        return getattr(self.base, name)


@pytest.mark.parametrize("wrap", [Wrapper, Delegating, lambda base: LiveView(base, 1)])
def test_the_transform_of_a_wrapped_data_set_stays_where_it_is(wrap, tmp_path):
    base = ImageFolder(write_folder(tmp_path), T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)]))
    before = base.transform
    store = open_images(wrap(base))
    assert base.transform is before and store.pixel_range.agrees_with(PixelRange.from_mean_std(MEAN, STD))


class Lazy(Dataset):
    """Opens its file when it is first read, and keeps it."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 400

    def __getitem__(self, index):
        if self.file is None:
            self.file = open(self.path, "rb")
        self.file.seek(192 * index)
        content = self.file.read(192)
        return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(3, 8, 8).copy()), index % 2


PIXELS = np.random.default_rng(0).integers(0, 256, (400, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def pixel_file(tmp_path):
    (tmp_path / "data.bin").write_bytes(PIXELS.tobytes())
    return tmp_path / "data.bin"


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("wrap", [lambda base: base, Delegating, lambda base: ConcatDataset([base])])
def test_a_file_that_is_opened_on_the_first_read_is_left_to_the_user_and_to_each_process(wrap, pixel_file):
    base = Lazy(pixel_file)
    for workers, cached in ((0, 10**6), (2, 10**6), (2, 10**6), (0, 0)):
        store = open_images(wrap(base), workers=workers, cache_bytes=cached)
        assert np.array_equal((store.batch(range(400)) * 255).round().byte().numpy(), PIXELS)
        assert base.file is None


class Closing(Lazy):
    """Opens its file at once, closes it when it goes, and cannot be pickled with it."""

    def __init__(self, path):
        super().__init__(path)
        self.file = open(path, "rb")
        self.transform = functools.partial(torch.flip, dims=(2,))

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return self.transform(image), label

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __del__(self):
        self.file.close()


class Opening(Closing):
    """Opens its file on the first read, and counts how often."""

    opened = 0

    def __init__(self, path):
        super().__init__(path)
        self.file.close()
        self.file = None

    def __getitem__(self, index):
        Opening.opened += self.file is None
        return super().__getitem__(index)

    def __del__(self):
        pass


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_file_is_not_opened_for_every_image(pixel_file):
    dataset = Opening(pixel_file)
    store = open_images(dataset)
    assert np.array_equal((store.batch(range(400)) * 255).round().byte().numpy(), PIXELS)
    assert dataset.file is None and Opening.opened < 5


def test_a_data_set_with_an_open_file_keeps_it(pixel_file):
    dataset = Closing(pixel_file)
    before = dataset.transform
    store = open_images(dataset)
    assert np.array_equal((store.batch(range(400)) * 255).round().byte().numpy(), PIXELS)
    assert dataset.transform is before and not dataset.file.closed
    assert np.array_equal(dataset[3][0].numpy(), PIXELS[3][:, :, ::-1])


class Slotted:
    """Has no __dict__, and a transform all the same."""

    __slots__ = ("images", "transform")

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), index % 2


def test_attributes_may_lie_in_slots(images):
    dataset = Slotted([as_pil(x) for x in images], TRAIN)
    store = open_images(dataset)
    torch.testing.assert_close(store.batch(range(60)), images)
    assert dataset.transform is TRAIN


def test_tensors_beside_a_picture_are_not_taken_for_it(images, labels):
    columns = {"image": [as_pil(x) for x in images], "label": labels.tolist(), "boxes": [[[0, 0, 4, 4]]] * 60}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset = dataset.cast_column("label", datasets.ClassLabel(3))
    dataset.set_transform(lambda batch: batch | {"boxes": [torch.tensor(box) for box in batch["boxes"]]})
    assert open_images(dataset).shape == (3, 8, 8)


def test_a_range_of_three_channels_says_that_grey_pictures_are_shown_in_colour(images, labels):
    samples = Samples((as_pil(x[:1]), int(y)) for x, y in zip(images, labels, strict=True))
    store = open_images(samples, pixel_range=PixelRange.from_mean_std(MEAN, STD))
    torch.testing.assert_close(store.batch([3])[0], images[3, :1].expand(3, -1, -1))


class Entropic(Dataset):
    """Noise of a generator that nobody can seed."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.from_numpy(np.random.default_rng().random((3, 8, 8), dtype=np.float32)), index % 2


def test_random_numbers_that_nobody_can_hold_are_named():
    with pytest.warns(UserWarning, match="row 0 is another image when it is read again"):
        open_images(Entropic())


def test_images_that_are_views_turned_round_are_read_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)

    class Turned(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return np.flip(pixels[index], 1), index % 2

    read = open_images(Turned()).batch(range(12))
    assert torch.equal((read * 255).round().byte(), torch.from_numpy(pixels[:, :, ::-1].copy()).permute(0, 3, 1, 2))
