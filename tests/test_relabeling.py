"""Whether a model is asked about flagged samples as it was trained on them, and what cannot be followed."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from test_guard import FLAGGED, KEPT, network, screening  # noqa: F401  (a fixture)
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision import transforms as T

from trainguard import Guard
from trainguard.data.samples import find_derived
from trainguard.data.store import open_images
from trainguard.errors import DataError, ModelError
from trainguard.screening.relabeling import relabel

LABELS = torch.arange(60) % 3
TRUTH = {row: (int(LABELS[row]) + 1) % 3 for row in FLAGGED}
COLOURS = [(220, 60, 20), (20, 220, 60), (60, 20, 220)]  # of the classes


def coloured():
    """Bytes (60, 8, 8, 3), each of its class's colour, the flagged ones of another's."""
    shown = [COLOURS[TRUTH.get(row, int(LABELS[row]))] for row in range(60)]
    noise = np.random.default_rng(0).integers(-15, 16, (60, 8, 8, 3))
    return (np.array(shown)[:, None, None] + noise).astype(np.uint8)


class Pictures(Dataset):
    """PIL images through a transform, as torchvision's data sets have one."""

    def __init__(self, transform):
        self.images, self.transform = [Image.fromarray(image) for image in coloured()], transform

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(LABELS[index])


class Knows(nn.Module):
    """Knows the class of an image by its three mean colours, where it is fed as in training."""

    def __init__(self, train):
        super().__init__()
        x, _ = next(iter(DataLoader(*train)))
        self.means = torch.stack(
            [x[[row for row in KEPT if LABELS[row] == k]].float().mean((0, 2, 3)) for k in range(3)]
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return -self.scale * (x.mean((2, 3))[:, None] - self.means).square().sum(2)


def normalised(samples):
    x, y = default_collate(samples)
    return (x - 0.5) * 8 - 3 * x.flip(1), y  # what no range per channel is


PLAIN = T.ToTensor()
FLIPPED = T.Compose([T.ToTensor(), T.Lambda(lambda x: x.flip(0))])


@pytest.mark.parametrize("transform", [PLAIN, FLIPPED, T.Compose([FLIPPED, T.Normalize([0.5] * 3, [0.2] * 3)])])
@pytest.mark.parametrize("collate", [default_collate, normalised])
def test_a_model_is_asked_about_what_it_was_trained_on(transform, collate, screening):  # noqa: F811
    data, guard = Pictures(transform), Guard(progress=False)
    model = Knows((data, 60, False, None, None, 0, collate))
    loader = guard.protect(DataLoader(data, 10, collate_fn=collate))
    guard.relabel(model)
    came = torch.cat([y for _, y in loader]).tolist()
    assert came == [int(LABELS[row]) for row in KEPT] + [TRUTH[row] for row in FLAGGED]


def test_a_model_that_knows_what_was_decoded_is_not_asked_otherwise(screening, monkeypatch):  # noqa: F811
    guard = Guard(progress=False)
    guard.protect(DataLoader(Pictures(PLAIN), 10))
    monkeypatch.setattr("trainguard.screening.relabeling.fed_by", lambda *_: pytest.fail("asked"))
    guard.relabel(Knows((Pictures(PLAIN), 60)))
    assert dict(zip(*(part.tolist() for part in guard._new_labels), strict=True)) == TRUTH


def test_mixed_batches_are_not_what_a_model_is_asked_about(screening):  # noqa: F811
    def mixed(samples):
        x, y = default_collate(samples)
        return 0.4 * x + 0.6 * x.roll(1, 0), y

    data, guard = Pictures(PLAIN), Guard(progress=False)
    guard.protect(DataLoader(data, 10, collate_fn=mixed))
    guard.relabel(Knows((data, 60)))
    assert dict(zip(*(part.tolist() for part in guard._new_labels), strict=True)) == TRUTH


def test_a_model_that_knows_nothing_of_kept_samples_is_a_warning(screening, images, labels):  # noqa: F811
    guard, model = Guard(progress=False), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    guard.protect(DataLoader(TensorDataset(images, labels), 10))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=r"gives \d+% of 55 kept samples their labels, no more than by chance"):
        guard.relabel(model)


def test_a_model_that_knows_nearly_all_is_none_that_guesses(screening, images, recwarn):  # noqa: F811
    labels = torch.zeros(60, dtype=torch.int64)
    labels[[20, 30]] = 1
    guard, model = Guard(progress=False), nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    guard.protect(DataLoader(TensorDataset(images, labels), 10), mean=(0.0,), std=(1.0,))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    guard.relabel(model)
    assert not [warning for warning in recwarn if "by chance" in str(warning.message)]


def test_what_undoes_a_normalisation_is_none(screening):  # noqa: F811
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    class Shown(Dataset):
        def __init__(self):
            self.undo = T.Normalize([-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std])
            self.undo_in_steps = [
                T.Normalize([0.0] * 3, [1 / s for s in std]),
                T.Normalize([-m for m in mean], [1.0] * 3),
            ]
            self.steps = T.Compose([T.ToTensor(), T.Normalize(mean, std)])
            self.images = [Image.fromarray(image) for image in coloured()]

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return self.steps(self.images[index]), int(LABELS[index])

    Guard(progress=False).protect(DataLoader(Shown(), 10))
    found = screening.calls[0].images
    assert torch.allclose(found.batch([1])[0], PLAIN(Shown().images[1]), atol=1 / 255)


def test_a_data_set_in_another_order_is_refused_when_it_relabels(screening, images):  # noqa: F811
    class Reordered(Dataset):
        order = torch.arange(60)

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return images[self.order[index]], int(LABELS[self.order[index]])

    data, guard = Reordered(), Guard(progress=False)
    loader = guard.protect(DataLoader(data, 10))
    data.order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="has changed since it was screened: row 0 had the label 0"):
        guard.relabel(network())
    del loader
    guard.relabel(network())  # nothing is trained on that could be mistaken


@pytest.mark.parametrize("form", [tuple, dict])
def test_a_data_set_that_gives_whole_batches_is_refused_before_any_screening(form, screening, images):  # noqa: F811
    class Whole(TensorDataset):
        def __getitems__(self, index):
            x, y = images[index], LABELS[index]
            return (x, y) if form is tuple else {"image": x, "label": y}

    with pytest.raises(DataError, match=f"__getitems__ gives a {form.__name__} for 3 samples"):
        Guard(progress=False).protect(DataLoader(Whole(images, LABELS), 10, collate_fn=lambda batch: batch))
    assert not screening.calls


def test_labels_that_collating_changes_are_refused_and_mixed_ones_are_not(screening, images):  # noqa: F811
    def shifted(samples):
        x, y = default_collate(samples)
        return x, (y + 1) % 3

    def soft(samples):
        x, y = default_collate(samples)
        return x, torch.eye(3)[y]

    data = TensorDataset(images, LABELS)
    with pytest.raises(DataError, match="collate_fn changes labels: row 57 has 0, and training gets 1"):
        Guard(progress=False).protect(DataLoader(data, 10, collate_fn=shifted))
    Guard(progress=False).protect(DataLoader(data, 10, collate_fn=soft))
    Guard(progress=False).protect(DataLoader(data, 10, collate_fn=lambda samples: (samples[0][0], LABELS[:10])))


class Named(TensorDataset):
    """Samples by name, with the class's name, the row, and the label as a float."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"image": x, "label": int(y), "name": "abc"[y], "row": index, "wanted": y[None].float()}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda sample: "abc".index(sample["name"]), "takes labels from another part of the samples than the label"),
        (lambda sample: (1, 2, 0)[sample["label"]], "changes labels: row 57 has 0, and training gets 1"),
        (lambda sample: sample.pop("label"), None),
    ],
)
def test_what_a_batch_takes_for_the_label_is_the_sample_s(make, said, screening, images):  # noqa: F811
    def collate(samples):
        return torch.stack([s["image"] for s in samples]), *(torch.tensor([f(s) for s in samples]) for f in (row, make))

    def row(sample):
        return sample["row"]

    loader = DataLoader(Named(images, LABELS), 10, collate_fn=collate)
    if said:
        with pytest.raises(DataError, match=said):
            Guard(progress=False).protect(loader)
        assert not screening.calls
    else:
        assert len(Guard(progress=False).protect(loader).dataset) == len(KEPT)


def test_a_batch_may_be_in_another_order(screening, images):  # noqa: F811
    loader = DataLoader(TensorDataset(images, LABELS), 10, collate_fn=lambda samples: default_collate(samples[::-1]))
    assert len(Guard(progress=False).protect(loader).dataset) == len(KEPT)


def test_a_label_that_is_held_as_a_float_as_well_is_relabelled_twice(screening, images):  # noqa: F811
    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(Named(images, LABELS), 10))
    with pytest.warns(UserWarning, match="'name' of a sample goes with its label 'label', and stays as it was"):
        guard.relabel(network())
    assert all(sample["wanted"].tolist() == [sample["label"]] for sample in protected.dataset)


def test_images_that_the_model_normalises_itself_are_asked_about_as_bytes(screening):  # noqa: F811
    class Bytes(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index], int(LABELS[index])

    class Normalises(Knows):
        def forward(self, x):
            return super().forward((x.float() - 128) / 64)

    data = Bytes(torch.from_numpy(coloured()).permute(0, 3, 1, 2))
    model = Normalises((data, 60))
    model.means = (model.means - 128) / 64
    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(data, 10))
    with pytest.warns(UserWarning, match="pixels from 0"):
        guard.relabel(model)
    assert [protected.dataset[len(KEPT) + k][1] for k in range(len(FLAGGED))] == [TRUTH[row] for row in FLAGGED]


def test_a_smoothed_label_beside_the_number_is_relabelled_and_stays_smoothed(screening, images):  # noqa: F811
    class Both(TensorDataset):
        def __getitem__(self, index):
            return {"image": images[index], "label": int(LABELS[index]), "soft": soft[LABELS[index]]}

    soft, guard = 0.9 * torch.eye(3) + 0.1 / 3, Guard(progress=False)
    protected = guard.protect(DataLoader(Both(images), 10))
    guard.relabel(network())
    for sample in protected.dataset:
        assert torch.allclose(sample["soft"], soft[sample["label"]])


def test_the_tensors_of_a_protected_data_set_are_those_that_are_kept(screening, images):  # noqa: F811
    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(TensorDataset(images, LABELS), 10)).dataset
    assert all(torch.equal(*pair) for pair in zip(protected.tensors, (images[KEPT], LABELS[KEPT]), strict=True))
    guard.relabel(network())
    assert torch.equal(protected.tensors[0], images[KEPT + FLAGGED])
    assert protected.tensors[1].tolist() == [label for _, label in protected]


def test_a_generator_that_a_class_holds_stays_where_it_was(screening, images):  # noqa: F811
    class Own(Dataset):
        rng = np.random.default_rng(5)

        def __len__(self):
            return 60

        def added(self, x):
            return x + 0.01 * self.rng.random()

        def __getitem__(self, index):
            return self.added(images[index]).float(), int(LABELS[index])

    before = Own.rng.bit_generator.state
    Guard(progress=False).protect(DataLoader(Own(), 10))
    assert Own.rng.bit_generator.state == before


@pytest.mark.parametrize("wrong", [30, nn.Linear(1, 1)])
def test_what_is_no_accelerator_is_refused(wrong, images):
    with pytest.raises(ValueError, match="expected accelerator= as an accelerate"):
        Guard(wrong, progress=False).protect(DataLoader(TensorDataset(images, LABELS), 10))


def test_a_model_that_gives_a_tuple_cannot_relabel(screening, images):  # noqa: F811
    class Two(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x

    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, LABELS), 10))
    with pytest.raises(ModelError, match="the model gives a tuple for 10 images"):
        guard.relabel(Two())


def test_truth_values_stay_truth_values_and_fields_have_names(screening, images):  # noqa: F811
    Sample = namedtuple("Sample", ("label", "image"))

    class Named(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            return Sample(bool(LABELS[index] > 0), images[index])

    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(Named(), 10), image_column="image", label_column="label")
    guard.relabel(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    assert {type(sample.label) for sample in protected.dataset} == {bool} and len(protected.dataset) == 60


@pytest.mark.parametrize(
    ("form", "shape"), [((12, 12, 13), (13, 12, 12)), ((5, 12, 12), (5, 12, 12)), ((9, 12, 2), (2, 9, 12))]
)
def test_spectral_bands_are_found_at_either_end(form, shape, screening):  # noqa: F811
    data = [(np.random.default_rng(i).random(form).astype(np.float32), i % 3) for i in range(60)]
    Guard(progress=False).protect(DataLoader(data, 10))
    assert screening.calls[0].images.shape == shape


def test_what_a_loader_does_not_feed_is_asked_about_as_it_was_decoded(images):
    store, index, given = open_images(TensorDataset(images, LABELS)), np.arange(7), LABELS[:7].numpy()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    plain = relabel(model, store, index, given=given, batch_size=3)
    few = relabel(
        model, store, index, given=given, batch_size=3, feed=lambda part: images[part] if len(part) > 1 else None
    )
    assert np.array_equal(plain, few)


def test_what_goes_with_a_label_is_told_from_what_does_not():
    def samples(**made):
        rows = [(row, row % 4) for row in range(40)]
        return [{"image": 0, "label": y} | {name: f(row, y) for name, f in made.items()} for row, y in rows]

    some = samples(coarse=lambda row, y: y // 2, name=lambda row, y: "abcd"[y], row=lambda row, y: row)
    assert find_derived(some, "label") == ("coarse", "name")
    assert find_derived(some, "label", ("coarse",)) == ("name",)
    assert find_derived(samples(source=lambda row, y: 3, odd=lambda row, y: row // 20), "label") == ()
    assert find_derived([(0, y, y // 2) for _, y in ((s["row"], s["label"]) for s in some)], 1) == (2,)
    assert find_derived(some[:8], "label") == ()  # too few to say
    assert find_derived([torch.zeros(2)], 1) == ()
