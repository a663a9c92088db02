import collections
import copy
import dataclasses
import pickle
import random
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import transforms as T
from torchvision.transforms import v2

import trainguard
from trainguard import Guard
from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.errors import DataError, ModelError, StateError
from trainguard.results import ScreenResult
from trainguard.screening.settings import PRESETS

FLAGGED = [3, 10, 11, 40, 59]
KEPT = [i for i in range(60) if i not in FLAGGED]


def result_for(images, flagged):
    """What a screening that flags `flagged` would give."""
    suspect = np.zeros(len(images), dtype=bool)
    suspect[flagged] = True
    return ScreenResult(
        score=suspect.astype(np.float32),
        consistency=np.zeros(len(images), np.float32),
        suspect=suspect,
        keep=np.flatnonzero(~suspect & (images.labels >= 0)),
        verdict="poisoned" if flagged else "clean",
        confidence=0.9,
        reason="a test says so",
        target_classes=(0,) if flagged else (),
        labels=images.labels,
        proposed=images.labels,
        thresholds=np.full(images.num_classes, np.inf, np.float32),
        unreadable=images.unreadable,
        class_names=images.class_names,
        fingerprint=images.fingerprint,
        settings={"seed": 0},
        timing={"total": 1.0},
        history=[{"stage": "probe", "epoch": 1, "loss": np.float32(0.5)}],
    )


def test_the_verdict_is_said_and_an_open_question_is_a_warning(screening, capsys, monkeypatch, images, labels):
    loader = DataLoader(TensorDataset(images, labels), 8)
    Guard().protect(loader)
    assert (
        "trainguard: poisoned (confidence 0.90), 5 of 60 samples are left out; a test says so"
        in capsys.readouterr().err
    )
    Guard(progress=False).protect(loader)
    assert not capsys.readouterr().err
    screening.flagged = []
    Guard().protect(loader)
    assert "trainguard: clean (confidence 0.90), all 60 samples are kept; a test says so" in capsys.readouterr().err
    open_case = partial(dataclasses.replace, verdict="undecided")
    monkeypatch.setattr("trainguard.guard.run_screening", lambda images, *_, **__: open_case(result_for(images, [])))
    said = "undecided .*, all 60 samples are kept; a test says so. Training goes on with all that could be read"
    with pytest.warns(UserWarning, match=said) as told:
        assert Guard(progress=False).protect(loader) is loader
    assert told[0].filename == __file__  # the line that protects, not one of ours


@pytest.fixture
def screening(monkeypatch):
    """Replaces the screening by one that flags `.flagged`, and keeps what it was called with in `.calls`."""
    spy = SimpleNamespace(flagged=FLAGGED, calls=[])

    def screen_images(images, model=None, **options):
        torch.rand(5), np.random.rand(), random.random()  # a real one draws
        assert torch.is_grad_enabled()
        if model is not None:
            model.train()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model(images.batch(images.readable[:8]))
        spy.calls.append(SimpleNamespace(images=images, model=model, **options))
        return result_for(images, spy.flagged)

    monkeypatch.setattr("trainguard.screening.screen.screen_images", screen_images)
    return spy


class Augmented(Dataset):
    """Images with a random flip and noise from all three global streams, as dicts or tuples."""

    def __init__(self, images, labels, as_dict=False):
        self.images, self.labels, self.as_dict = images, labels, as_dict

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        image = (image + 0.01 * (np.random.rand() + random.random())).clamp(0, 1)
        label = int(self.labels[index])
        return {"image": image, "label": label, "row": index} if self.as_dict else (image, label, index)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 3)
    )


def rows(loader):
    return sorted(int(row) for batch in loader for row in (batch["row"] if isinstance(batch, dict) else batch[2]))


def train(loader, model, epochs=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def streams():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def same(one, other):
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(one, other))


def seed_all():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["disabled", "nothing flagged"])
def test_off_or_nothing_flagged_is_bit_for_bit_the_unguarded_run(how, workers, screening, images, labels):
    screening.flagged = []

    def run(guarded):
        seed_all()
        model = network()
        loader = DataLoader(Augmented(images, labels), batch_size=16, shuffle=True, num_workers=workers)
        if guarded:
            guard = Guard(progress=False, enabled=how != "disabled")
            before = streams()
            protected = guard.protect(loader, model)
            assert protected is loader and same(streams(), before)
            loader = protected
        train(loader, model, epochs=1)
        if guarded:
            before = streams()
            guard.relabel(model)
            assert same(streams(), before)
        train(loader, model, epochs=1)
        return model.state_dict(), streams()

    (plain, plain_streams), (guarded, guarded_streams) = run(False), run(True)
    assert len(screening.calls) == (how != "disabled")
    assert all(torch.equal(plain[name], guarded[name]) for name in plain)
    assert same(plain_streams, guarded_streams)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("as_dict", [False, True])
def test_protect_drops_what_was_flagged_and_relabel_brings_it_back_with_new_labels(
    workers, as_dict, screening, images, labels
):
    loader = DataLoader(
        Augmented(images, labels, as_dict), 16, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    guard = Guard(progress=False)
    model = network()
    protected = guard.protect(loader, model)
    assert rows(protected) == KEPT and len(protected) == 4 and type(protected) is DataLoader

    class Always(nn.Linear):
        def forward(self, x):
            return torch.tensor([[0.0, 0.0, 5.0]]).expand(len(x), 3)

    guard.relabel(Always(1, 1))
    seen = {}
    for batch in protected:
        numbers, given = (batch["row"], batch["label"]) if as_dict else (batch[2], batch[1])
        seen |= dict(zip(numbers.tolist(), given.tolist(), strict=True))
    assert seen == {row: 2 if row in FLAGGED else int(labels[row]) for row in range(60)}


def test_keep_mode_keeps_the_number_of_steps_and_draws_evenly(screening, images, labels):
    loader = DataLoader(Augmented(images, labels), 16, shuffle=True, drop_last=False)
    protected = Guard(progress=False).protect(loader, network(), steps="keep")
    times = collections.Counter(rows(protected))
    assert len(protected) == len(loader) == 4 and sum(times.values()) == 60
    assert set(times) == set(KEPT) and max(times.values()) == 2
    with pytest.raises(ValueError, match="steps='natural' or 'keep', got 'same'"):
        Guard(progress=False).protect(loader, network(), steps="same")


def test_relabel_in_the_middle_of_an_epoch_shows_nothing_flagged_before_the_next(screening, images, labels):
    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(Augmented(images, labels), 5, shuffle=True), network())
    seen = []
    for step, batch in enumerate(protected):
        seen += batch[2].tolist()
        if step == 3:
            guard.relabel(network())
    assert set(seen) == set(KEPT)
    assert rows(protected) == list(range(60))


def test_protect_passes_on_what_the_user_said(screening, images, labels, tmp_path):
    callback = object()
    guard = Guard(epochs=30, budget=0.25, seed=7, state_dir=tmp_path, progress=False, callbacks=[callback])
    guard.protect(DataLoader(TensorDataset(images, labels), 16), network())
    call = screening.calls[0]
    assert (call.epochs, call.budget, call.seed, call.state_dir, call.progress) == (30, 0.25, 7, tmp_path, False)
    assert call.callbacks == [callback] and call.processes.world == 1 and call.device is None
    assert guard.result.fingerprint == call.images.fingerprint


def test_the_user_s_model_is_untouched_and_so_are_gradients_and_modes(screening, images, labels):
    model = network()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    guard = Guard(progress=False)
    with torch.no_grad():
        protected = guard.protect(DataLoader(TensorDataset(images, labels), 16), model)
        assert not torch.is_grad_enabled()
    assert not calls and protected is not None
    guard.relabel(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not model[0].weight.requires_grad and torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))


def test_relabel_uses_the_model_as_training_feeds_it(screening, images, labels):
    class Brightness(nn.Module):
        """Class 1 above middle grey, told from normalised pixels."""

        def forward(self, x):
            above = x.mean((1, 2, 3)) > 0
            return torch.stack([(~above).float(), above.float(), torch.zeros(len(x))], dim=1)

    guard = Guard(progress=False)
    normalised = TensorDataset((images - 0.5) / 0.5, labels)
    protected = guard.protect(DataLoader(normalised, 60), network(), mean=(0.5,) * 3, std=(0.5,) * 3)
    guard.relabel(Brightness())
    given = torch.cat([batch[1] for batch in protected])
    expected = (images[FLAGGED].mean((1, 2, 3)) > 0.5).long()
    assert given[-len(FLAGGED) :].tolist() == expected.tolist()


def test_weighted_loaders_stay_weighted(screening, images, labels):
    weights = torch.zeros(60)
    weights[[3, 5, 10]] = 1
    loader = DataLoader(Augmented(images, labels), 10, sampler=WeightedRandomSampler(weights, 60))
    assert set(rows(Guard(progress=False).protect(loader, network()))) == {5}


def test_too_few_kept_samples_for_a_batch_is_an_error(screening, images, labels):
    loader = DataLoader(TensorDataset(images, labels), 60, drop_last=True)
    with pytest.raises(DataError, match="the 55 kept samples fill no batch: pass drop_last=False or steps='keep'"):
        Guard(progress=False).protect(loader, network())


def test_a_sampler_that_cannot_be_rebuilt_is_refused_before_any_screening(screening, images, labels):
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(DataError, match="cannot rebuild the sampler list"):
        Guard(progress=False).protect(loader, network())
    assert not screening.calls


def test_relabel_before_protect_is_an_error_and_a_disabled_guard_does_nothing(images, labels):
    with pytest.raises(RuntimeError, match=r"call guard\.protect"):
        Guard().relabel(network())
    off = Guard(enabled=False)
    assert off.relabel(network()) is None and off.result is None
    off.load_state_dict({"format": "of another version"})
    off.adopt(object(), epochs=30)


def hugging_face(images, labels):
    features = datasets.Features(
        {"row": datasets.Value("int64"), "img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    return datasets.Dataset.from_dict({"row": range(60), "img": pictures, "kind": labels.tolist()}, features=features)


def to_training_form(batch):
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in batch["img"]]
    return {"pixel_values": tensors, "labels": batch["kind"], "row": batch["row"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_face_data_behind_a_loader(workers, screening, images, labels):
    dataset = hugging_face(images, labels).with_transform(to_training_form)
    loader = DataLoader(dataset, 16, shuffle=True, num_workers=workers)
    guard = Guard(progress=False)
    protected = guard.protect(loader, network())
    assert rows(protected) == KEPT and guard.result.class_names == ("a", "b", "c")
    model = network(4)
    guard.relabel(model)
    given = {
        int(row): int(label) for batch in protected for row, label in zip(batch["row"], batch["labels"], strict=True)
    }
    with torch.no_grad():
        predicted = model.eval()(images[FLAGGED]).argmax(1).tolist()
    assert given == dict(enumerate(labels.tolist())) | dict(zip(FLAGGED, predicted, strict=True))


class Broken(Dataset):
    def __init__(self, images, labels, bad):
        self.images, self.labels, self.bad = images, labels, bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("truncated file")
        return self.images[index], int(self.labels[index]), index


@pytest.mark.parametrize("flagged", [[], FLAGGED])
def test_unreadable_samples_are_left_out_for_good_when_asked(flagged, screening, images, labels):
    screening.flagged = flagged
    guard = Guard(progress=False)
    loader = DataLoader(Broken(images, labels, {0, 7}), 16)
    with pytest.raises(DataError, match="row 0 cannot be read: OSError: truncated file"):
        guard.protect(loader, network())
    protected = guard.protect(loader, network(), on_error="skip")
    assert guard.result.unreadable == (0, 7)
    assert rows(protected) == [row for row in range(60) if row not in (0, 7, *flagged)]
    guard.relabel(network())
    assert rows(protected) == [row for row in range(60) if row not in (0, 7)]


def through_disk(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("steps", ["natural", "keep"])
@pytest.mark.parametrize("when", ["before protect", "after protect"])
def test_a_saved_guard_goes_on_where_it_was(when, steps, screening, images, labels, tmp_path):
    def loader():
        return DataLoader(Augmented(images, labels), 16)

    first = Guard(progress=False)
    protected = first.protect(loader(), network(), steps=steps)
    first.relabel(network(3))
    expected = [batch[1].tolist() for batch in protected]
    state = through_disk(first.state_dict(), tmp_path / "guard.pt")

    second = Guard(progress=False)
    if when == "before protect":
        second.load_state_dict(state)
        resumed = second.protect(loader(), network(), steps=steps)
        assert len(screening.calls) == 1  # no second screening
    else:
        resumed = second.protect(loader(), network(), steps=steps)
        second.load_state_dict(state)
    assert [batch[1].tolist() for batch in resumed] == expected
    assert second.result.verdict == "poisoned" and second.result.target_classes == (0,)
    assert second.result.keep.tolist() == KEPT and second.result.history[0]["loss"] == 0.5


def test_the_steps_of_a_loaded_state_hold_for_every_loader(screening, images, labels):
    def loader():
        return DataLoader(TensorDataset(images, labels), 10)

    first, second = Guard(progress=False), Guard(progress=False)
    first.protect(loader(), network(), steps="keep")
    second.load_state_dict(first.state_dict())
    assert [len(second.protect(loader(), network())) for _ in range(2)] == [len(loader())] * 2
    assert second.state_dict()["steps"] == "keep"


def test_a_state_of_another_data_set_is_refused_with_both_fingerprints(screening, images, labels):
    first = Guard(progress=False)
    first.protect(DataLoader(TensorDataset(images, labels), 16), network())
    other = DataLoader(TensorDataset(images, labels.roll(1)), 16)
    after, before = Guard(progress=False), Guard(progress=False)
    after.protect(other, network())
    both = f"{first.result.fingerprint}.*{after.result.fingerprint}"
    with pytest.raises(StateError, match=both):
        after.load_state_dict(first.state_dict())
    before.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match=both):
        before.protect(other, network())


def test_a_state_that_cannot_be_taken_up_is_refused(screening, images, labels):
    first = Guard(progress=False)
    first.protect(DataLoader(TensorDataset(images, labels), 16), network())
    screening.flagged = []
    clean = Guard(progress=False)
    clean.protect(DataLoader(TensorDataset(images, labels), 16), network())
    with pytest.raises(StateError, match=r"leaves out 5 samples, this run found nothing .* before guard\.protect"):
        clean.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match="format 1, got None"):
        clean.load_state_dict({})
    clean.load_state_dict(Guard(enabled=False).state_dict())
    assert clean.result.verdict == "clean"


@pytest.mark.parametrize("other", ["data", "preset"])
def test_protecting_something_else_screens_again(other, screening, images, labels):
    guard = Guard(progress=False)
    guard.protect(DataLoader(Augmented(images, labels), 16), network())
    guard.relabel(network())
    screening.flagged = [5]
    changed = images.flip(0) if other == "data" else images
    loader = DataLoader(Augmented(changed, labels), 16)
    protected = guard.protect(loader, network(), preset="paper" if other == "preset" else "default")
    assert rows(protected) == [row for row in range(60) if row != 5]


def test_protecting_the_same_data_again_takes_the_same_result(screening, images, labels):
    guard = Guard(progress=False)
    first = guard.protect(DataLoader(Augmented(images, labels), 16), network())
    guard.relabel(network())
    protected = guard.protect(DataLoader(Augmented(images, labels), 16), network())
    assert len(screening.calls) == 1 and rows(protected) == rows(first) == list(range(60))


@pytest.mark.parametrize("arguments", [{}, {"model": network}, {"model": network()}])
def test_screen_gives_the_result_and_moves_nothing(arguments, screening, images, labels):
    seed_all()
    before = streams()
    result = trainguard.screen(TensorDataset(images, labels), progress=False, seed=3, **arguments)
    assert same(streams(), before)
    assert result.keep.tolist() == KEPT and screening.calls[0].seed == 3
    assert screening.calls[0].model is None  # it was checked: what learns is a probe of our own
    trainguard.screen(TensorDataset(images, labels), progress=False, preset="paper", **arguments)
    assert (screening.calls[1].model is None) == (not arguments)


def test_memory_for_decoded_images_is_switchable(screening, images, labels):
    dataset = Augmented(images, labels)
    trainguard.screen(dataset, progress=False, cache_bytes=0)
    protected = Guard(progress=False).protect(DataLoader(dataset, 16), cache_bytes=10 * 192)
    assert [call.images.cached_bytes for call in screening.calls] == [0, 1920] and rows(protected) == KEPT


def test_screen_knows_its_presets(screening, images, labels):
    dataset = TensorDataset(images, labels)
    settings = [
        trainguard.screen(dataset, progress=False, preset=name) and screening.calls[-1].settings for name in PRESETS
    ]
    assert settings == list(PRESETS.values())
    with pytest.raises(ValueError, match="unknown preset 'mine': choose one of default, paper"):
        trainguard.screen(dataset, progress=False, preset="mine")


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"budget": -1},
        {"budget": float("nan")},
        {"epochs": 0},
        {"epochs": "30"},
        {"epochs": float("nan")},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": None},
    ],
)
def test_what_no_screening_can_be_made_with_is_refused_before_anything_is_read(wrong):
    ((name, value),) = wrong.items()
    for call in (lambda: trainguard.Guard(**wrong), lambda: trainguard.screen(None, progress=False, **wrong)):
        with pytest.raises(ValueError, match=f"expected.* {name}.* got {value!r}"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_other_numbers_is_checked_and_relabels(dtype, screening, images, labels):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).to(dtype)
    guard = trainguard.Guard(progress=False)
    loader = guard.protect(DataLoader(TensorDataset(images, labels), batch_size=10), model, bounds=(0, 1))
    guard.relabel(model)
    assert len(loader.dataset) == 60 and {loader.dataset[i][1].item() for i in range(55, 60)} <= {0, 1, 2}


def test_screen_refuses_a_model_that_does_not_fit(screening, images, labels):
    with pytest.raises(ModelError, match="the model has 3 outputs, the data set has 2 classes"):
        trainguard.screen(TensorDataset(images, labels % 2), network(), progress=False)
    assert not screening.calls


def test_importing_trainguard_imports_no_host_and_no_torch():
    import subprocess
    import sys

    code = "import sys, trainguard; print([m for m in ('torch', 'accelerate', 'timm', 'datasets') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert set(trainguard.__all__) <= set(dir(trainguard))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trainguard.nothing


@pytest.mark.parametrize("same_guard", [False, True])
def test_a_protected_loader_is_protected_as_the_one_it_was_made_of(same_guard, screening, images, labels):
    data = Augmented(images, labels)
    data.transform = transform = lambda image: image.flip(1)
    loader, first = DataLoader(data, 16), Guard(progress=False)
    second = first if same_guard else Guard(progress=False)
    protected = second.protect(first.protect(loader, None), None)
    assert rows(protected) == KEPT and data.transform is transform
    assert len(second.result.score) == 60 and len(screening.calls) == 2 - same_guard
    screening.flagged = []
    assert Guard(progress=False).protect(protected, None) is loader


def test_a_protected_loader_that_was_built_anew_is_refused(screening, images, labels):
    protected = Guard(progress=False).protect(DataLoader(Augmented(images, labels), 16), None)
    with pytest.raises(DataError, match="protected already"):
        Guard(progress=False).protect(DataLoader(protected.dataset, 16), None)


class Pixels(nn.Module):
    """Class 2 where an image comes as training feeds it, else class 0."""

    def forward(self, x):
        assert x.ndim == 4
        return nn.functional.one_hot((x.amin((1, 2, 3)) < -1).long() * 2, 3).float()


@pytest.mark.parametrize("how", ["collate", "said", "unsaid"])
def test_relabel_knows_a_normalisation_after_the_data_set(how, screening, images, labels):
    step = T.Normalize([0.4] * 3, [0.2] * 3)
    kept = torch.cat([images[:, :, :7], torch.zeros(60, 3, 1, images.shape[3])], 2)  # black somewhere
    pictures = [(T.functional.to_pil_image(image), int(label)) for image, label in zip(kept, labels, strict=True)]
    tensors = TensorDataset(kept, labels)

    def collate(samples):
        return torch.stack([step(image) for image, _ in samples]), torch.tensor([label for _, label in samples])

    guard = Guard(progress=False)
    if how == "collate":
        protected = guard.protect(DataLoader(tensors, 16, collate_fn=collate), None)
    elif how == "said":
        protected = guard.protect(DataLoader(tensors, 16), None, mean=[0.4] * 3, std=[0.2] * 3)
    else:
        protected = guard.protect(DataLoader(pictures, 16, collate_fn=lambda samples: samples), None)
    assert torch.equal(screening.calls[0].images.batch([0])[0], (kept[0] * 255).round() / 255)
    if how == "unsaid":
        with pytest.warns(UserWarning, match="pass mean= and std="):
            guard.relabel(Pixels())
    else:
        guard.relabel(Pixels())
        assert [int(protected.dataset[55 + row][1]) for row in range(5)] == [2] * 5


def test_the_user_s_own_handle_of_a_sampler_still_sets_the_epoch(screening, images, labels):
    data = Augmented(images, labels)
    sampler = DistributedSampler(data, 2, 0, seed=3)
    protected = Guard(progress=False).protect(DataLoader(data, 16, sampler=sampler), None)
    orders = []
    for epoch in (0, 7):
        sampler.set_epoch(epoch)
        orders.append(list(protected.sampler))
    assert protected.sampler.epoch == sampler.epoch == 7 and orders[0] != orders[1]
    again = Guard(progress=False).protect(DataLoader(data, 16, sampler=pickle.loads(pickle.dumps(sampler))), None)
    assert again.sampler.epoch == 7


def test_whole_batches_and_columns_are_read_from_a_protected_data_set(screening, images, labels):
    data = TensorDataset(images, labels)
    batches = DataLoader(data, sampler=BatchSampler(RandomSampler(data), 10, False), batch_size=None)
    guard = Guard(progress=False)
    protected = guard.protect(batches, None)
    assert sum(len(y) for _, y in protected) == 55
    guard.relabel(Pixels())
    given = torch.cat([y for _, y in protected])
    assert len(given) == 60 and torch.equal(protected.dataset[-5:][1], torch.zeros(5, dtype=labels.dtype))
    table = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy()) for x in images],
            "label": labels.tolist(),
        },
        datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(3)),
    )
    view = Guard(progress=False).protect(DataLoader(table, 16, collate_fn=list), None).dataset
    assert view["label"] == view[:]["label"] == [int(labels[row]) for row in KEPT]
    assert view[[1, 3]]["label"] == [int(labels[1]), int(labels[4])]


class Elsewhere(torch.Tensor):
    """A tensor that lies on another device, as a checkpoint read with map_location= has them."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_state_that_was_loaded_onto_a_device_is_taken_up(screening, images, labels):
    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 10), network())
    guard.relabel(network())
    state = guard.state_dict()
    there = lambda value: value.as_subclass(Elsewhere) if isinstance(value, torch.Tensor) else value  # noqa: E731
    moved = state | {
        "result": {name: there(value) for name, value in state["result"].items()},
        "relabelled": [there(part) for part in state["relabelled"]],
    }
    again = Guard(progress=False)
    again.load_state_dict(moved)
    assert again.result.keep.tolist() == KEPT


@pytest.mark.parametrize("form", ["torch", "transform", "some columns"])
def test_annotate_leaves_columns_and_format_as_they_are(form, screening, images, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    pictures = [T.functional.to_pil_image(image) for image in images]
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features)
    shuffled = dataset.shuffle(seed=1)
    result = trainguard.screen(shuffled, progress=False)
    if form == "torch":
        shuffled = shuffled.with_format("torch")
    elif form == "some columns":
        shuffled = shuffled.with_format("numpy", columns=["label"])
    else:
        shuffled = shuffled.with_transform(lambda batch: {"pixel_values": [T.ToTensor()(x) for x in batch["image"]]})
    noted = result.annotate(shuffled)
    every = ["image", "label", "poison_score", "keep"]
    assert noted.column_names == every and noted.features["image"] == datasets.Image()
    assert noted.format["type"] == shuffled.format["type"]
    assert list(noted[0]) == {"torch": every, "some columns": ["label"], "transform": ["pixel_values"]}[form]
    assert noted.with_format(None)["keep"][:] == np.isin(np.arange(60), KEPT).tolist()


def test_relabelled_samples_come_back_in_every_loader_over_the_data(screening, images, labels):
    guard = Guard(progress=False)
    first = guard.protect(DataLoader(Augmented(images, labels), 16), network())
    second = guard.protect(DataLoader(Augmented(images, labels), 10), network(), steps="keep")
    assert len(screening.calls) == 1 and not guard.relabelled
    guard.relabel(network())
    assert guard.relabelled and rows(first) == rows(second) == list(range(60)) and len(second) == 6


def test_a_guard_that_turns_to_other_data_says_that_it_forgets_the_former(screening, images, labels):
    guard = Guard(progress=False)
    first = guard.protect(DataLoader(Augmented(images, labels), 16), network())
    with pytest.warns(UserWarning, match="use a Guard for each data set"):
        second = guard.protect(DataLoader(Augmented(images.flip(0), labels), 16), network())
    guard.relabel(network())
    assert rows(first) == KEPT and rows(second) == list(range(60))


def test_another_state_s_result_brings_the_given_labels_back(screening, images, labels):
    guard, other = Guard(progress=False), Guard(progress=False)
    protected = guard.protect(DataLoader(TensorDataset(images, labels), 16), network())
    guard.relabel(Pixels())
    screening.flagged = [5]
    other.protect(DataLoader(TensorDataset(images, labels), 16), network())
    guard.load_state_dict(other.state_dict())
    assert torch.cat([y for _, y in protected]).tolist() == [int(y) for row, y in enumerate(labels) if row != 5]


def test_a_state_whose_result_is_of_another_version_is_refused(screening, images, labels):
    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 16), network())
    for change in ({"surprise": 1}, {"target_classes": None}):
        state = guard.state_dict()
        state["result"] |= change
        with pytest.raises(StateError, match=r"of another version .* screen again without it"):
            Guard(progress=False).load_state_dict(state)


def test_what_cannot_relabel_is_refused_and_outputs_beyond_the_classes_say_nothing(screening, images, labels):
    class Wide(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 2.0, 1.0, 9.0, 9.0]).expand(len(x), 5)

    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(TensorDataset(images, labels), 16), network())
    with pytest.raises(ModelError, match=r"expected the model that was trained, an nn\.Module, got function"):
        guard.relabel(network)
    guard.relabel(Wide())
    assert protected.dataset[-5:][1].tolist() == [1] * 5


@pytest.mark.parametrize("form", ["hugging face", "targets"])
def test_a_result_is_not_applied_to_the_same_data_in_another_order(form, screening, images, labels):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(3), "row": datasets.Value("int64")}
    )
    pictures = [T.functional.to_pil_image(image) for image in images]
    columns = {"image": pictures, "label": labels.tolist(), "row": list(range(60))}
    dataset, shuffled = datasets.Dataset.from_dict(columns, features=features), torch.randperm(60)
    result = trainguard.screen(dataset, progress=False)
    if form == "targets":
        same_order, other = TensorDataset(images, labels), TensorDataset(images[shuffled], labels[shuffled])
        same_order.targets, other.targets = labels.tolist(), labels[shuffled]
    else:
        same_order, other = dataset.with_format("torch"), dataset.select(shuffled)
        with pytest.raises(ValueError, match="or have another order here"):
            result.annotate(other)
    assert len(result.apply(same_order)) == 55
    with pytest.raises(ValueError, match="or have another order here"):
        result.apply(other)


def test_names_of_labels_that_a_transform_changes_are_not_those_of_the_data_set(images, labels):
    class Folder(TensorDataset):
        classes, target_transform = ["a", "b", "c"], staticmethod(lambda label: 2 - label)

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, self.target_transform(int(label))

    data = Folder(images, labels)
    data.targets = labels.tolist()
    opened = open_images(data)
    assert opened.class_names == ("0", "1", "2")
    assert len(result_for(opened, FLAGGED).apply(data)) == len(KEPT)  # what it lists are other numbers


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_relabel_feeds_images_of_the_size_that_collating_makes(form, screening, images, labels):
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape[1:]))
            return x.flatten(1)[:, :3]

    def collate(samples):
        pixels = F.interpolate(torch.stack([sample[0] for sample in samples]), (12, 20), mode="bilinear")
        targets = torch.tensor([int(sample[1]) for sample in samples])
        return (pixels, targets) if form == "tuple" else {"pixel_values": pixels, "labels": targets}

    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 5, collate_fn=collate), Net())
    assert seen[0] == (3, 12, 20)  # the check of the model, before any screening
    seen.clear()
    guard.relabel(Net())
    assert set(seen) == {(3, 12, 20)}


def test_a_normalisation_that_the_data_set_holds_but_does_not_apply_leaves_pixels_as_they_are(
    screening, images, labels
):
    data = TensorDataset(images, labels)
    data.mean, data.std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    opened = open_images(data)
    assert torch.allclose(opened.batch(range(60)), images, atol=1 / 255)
    assert opened.pixel_range.agrees_with(PixelRange.from_mean_std(data.mean, data.std))


class Counting:
    """A user's transform that changes images once it has been called often enough."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return image.flip(2) if self.calls > 70 else image


def test_a_transform_that_counts_its_calls_begins_training_where_it_was(screening, images, labels):
    class Transformed(TensorDataset):
        transform = None

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return self.transform(image), label

    screening.flagged = []
    data = Transformed(images, labels)
    data.transform = T.Compose([Counting()])
    Guard(progress=False).protect(DataLoader(data, 10))
    assert data.transform.transforms[0].calls == 0


def twisted(image, by=None):
    return by(image)


@pytest.mark.parametrize("place", ["dict", "partial", "collate", "hugging face"])
def test_what_counts_its_calls_does_so_wherever_it_is_held(place, screening, images, labels):
    counting, collate = Counting(), None

    class Transformed(TensorDataset):
        how = None

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            how = self.how["train"] if isinstance(self.how, dict) else self.how
            return how(image), label

    screening.flagged = []
    data = Transformed(images, labels)
    data.how = {"dict": {"train": counting}, "partial": partial(twisted, by=counting)}.get(place, lambda image: image)
    if place == "collate":

        def collate(samples):
            return counting(torch.stack([image for image, _ in samples])), torch.tensor([label for _, label in samples])

    if place == "hugging face":
        pictures = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for image in images]
        data = datasets.Dataset.from_dict({"image": pictures, "label": labels.tolist()})
        data = data.cast_column("image", datasets.Image())
        change = T.Compose([T.ToTensor(), counting])
        data = data.with_transform(lambda rows: {**rows, "image": [change(image) for image in rows["image"]]})
    loader = DataLoader(data, 10, collate_fn=collate)
    assert Guard(progress=False).protect(loader, label_column="label" if place == "hugging face" else None) is loader
    assert counting.calls == 0


def test_a_file_that_is_opened_on_the_first_read_is_not_shared_with_workers(screening, images, labels, tmp_path):
    """Wherever a data set holds it: forked processes would read from one another's places in it."""
    (tmp_path / "all.bin").write_bytes((images * 255).to(torch.uint8).numpy().tobytes())

    class Reader:
        file = None

        def read(self, index):
            self.file = self.file or open(tmp_path / "all.bin", "rb", buffering=0)
            self.file.seek(index * 192)
            return torch.from_numpy(np.frombuffer(self.file.read(192), np.uint8).reshape(3, 8, 8).copy()).float() / 255

    class Lazy(Dataset):
        def __init__(self):
            self.reader, self.files, self.parts = Reader(), {}, [Reader()]

        def __len__(self):
            return 60

        def __getitem__(self, index):
            other = self.files.setdefault("other", Reader())
            read = (self.reader, other, self.parts[0])[index % 3].read
            return read(index), int(labels[index]), index

    data = Lazy()
    protected = Guard(progress=False).protect(DataLoader(data, 10))
    assert data.reader.file is None and data.parts[0].file is None and data.files == {}
    assert rows(protected) == KEPT


class Adapter(nn.Linear):
    """Merges itself into the weight in eval mode, and takes itself out again, as some libraries' do."""

    merged = False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return super().train(mode)


def test_what_a_model_does_in_eval_mode_is_undone_by_itself(screening, images, labels):
    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 16))
    model = nn.Sequential(nn.Flatten(), Adapter(192, 3), nn.Dropout())
    model[2].eval()
    before = model[1].weight.detach().clone()
    guard.relabel(model)
    assert model.training and not model[1].merged and not model[2].training
    assert torch.allclose(model[1].weight, before, atol=1e-6)


def test_other_data_that_cannot_be_protected_do_not_make_the_guard_forget(screening, images, labels):
    guard = Guard(progress=False)
    protected = guard.protect(DataLoader(Augmented(images, labels), 10), network())
    with pytest.raises(ModelError):
        guard.protect(DataLoader(Augmented(images + 0.1, labels), 10), nn.Linear(5, 5))
    guard.relabel(network())
    assert len(protected.dataset) == 60


def test_a_state_of_another_variant_is_refused(screening, images, labels):
    loader = DataLoader(TensorDataset(images, labels), 16)
    guard = Guard(progress=False)
    guard.protect(loader)
    state = guard.state_dict()
    state["result"]["settings"]["variant"] = "separation"
    for preset in ("default", "paper"):
        again = Guard(progress=False)
        again.load_state_dict(state)
        if preset == "default":
            again.protect(loader, preset=preset)
        else:
            with pytest.raises(StateError, match="of the variant 'separation', preset='paper' asks for 'paper'"):
                again.protect(loader, preset=preset)
    state["result"]["settings"]["variant"] = "paper"
    with pytest.raises(StateError, match="of the variant 'paper', preset='default' asks for 'separation'"):
        guard.load_state_dict(state)


def test_numbers_may_be_numpys(screening, images, labels):
    guard = Guard(epochs=np.int64(30), budget=np.float32(0.5), seed=np.int64(3), progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 16))
    call = screening.calls[0]
    assert (call.epochs, call.budget, call.seed) == (30, 0.5, 3) and type(call.epochs) is type(call.seed) is int


def test_grey_images_that_the_collate_function_makes_coloured_are_relabelled_so(screening, images, labels):
    def coloured(samples):
        return torch.stack([image for image, _ in samples]).expand(-1, 3, -1, -1), torch.tensor([y for _, y in samples])

    guard = Guard(progress=False)
    loader = DataLoader(TensorDataset(images[:, :1], labels), 16, collate_fn=coloured)
    protected = guard.protect(loader)
    guard.relabel(network())
    assert guard.relabelled and len(protected.dataset) == 60
    with pytest.raises(ModelError, match=r"cannot run on images of shape \(16, 3, 8, 8\) .*, to relabel them: "):
        guard.relabel(nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten()))


def test_a_data_set_that_workers_open_is_named_as_such(images, labels):
    class Closed(Dataset):
        file = None

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return self.file[index], int(labels[index])

    with pytest.raises(DataError, match="worker_init_fn has not run: what it opens, let the data set open as it reads"):
        Guard(progress=False).protect(DataLoader(Closed(), 10, worker_init_fn=print))


def test_processes_with_parts_of_one_data_set_must_keep_equally_much(screening, images, labels, monkeypatch):
    data = TensorDataset(images, labels)
    halves = [DataLoader(data, 5, sampler=SubsetRandomSampler(range(part, 60, 2))) for part in range(2)]
    screening.flagged = list(range(0, 20, 2))
    lengths = [len(Guard(progress=False).protect(half)) for half in halves]
    assert lengths == [4, 6]
    monkeypatch.setattr("trainguard.distributed.Processes.gathered", lambda self, own: [own, (6, 4)])
    with pytest.raises(DataError, match="each process has samples of its own, of which 4 to 6 batches are kept"):
        Guard(progress=False).protect(halves[1])


def test_relabelling_asks_for_no_more_at_once_than_training_has_room_for(screening, images, labels):
    sizes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            sizes.append(len(x))
            return self.net(x)

    guard = Guard(progress=False)
    guard.protect(DataLoader(TensorDataset(images, labels), 2))
    guard.relabel(Watched())
    assert max(sizes) == 2 and sizes[-3:] == [2, 2, 1]


def pictures_of(images):
    return [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for image in images]


def as_pixels(rows):
    return {**rows, "image": [torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x in rows["image"]]}


def test_new_labels_are_written_where_the_screened_ones_came_from(screening, images, labels):
    """A Hugging Face data set's labels are found by their type, whatever another column is called."""
    kinds = {
        "image": datasets.Image(),
        "breed": datasets.ClassLabel(names=list("abc")),
        "label": datasets.Value("int64"),
    }
    columns = {"image": pictures_of(images), "breed": labels.tolist(), "label": list(range(60))}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).with_transform(as_pixels)
    guard, model = Guard(progress=False), network()
    loader = guard.protect(DataLoader(data, 10), model)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    guard.relabel(model)
    breeds, rows_seen = (torch.cat([batch[key] for batch in loader]).tolist() for key in ("breed", "label"))
    assert rows_seen == [*KEPT, *FLAGGED] and breeds == [*labels[KEPT].tolist(), *[2] * 5]


def test_labels_that_training_does_not_see_are_not_screened(screening, images, labels):
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdef"))})
    data = datasets.Dataset.from_dict(
        {"image": pictures_of(images), "label": [i % 6 for i in range(60)]}, features=kinds
    )
    halved = data.with_transform(lambda rows: as_pixels({**rows, "label": [label // 2 for label in rows["label"]]}))
    with pytest.raises(DataError, match="row 1 has 1, and training gets 0"):
        Guard(progress=False).protect(DataLoader(halved, 10))
    assert not screening.calls


def test_a_few_labels_may_be_drawn_at_random(screening, images, labels):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, torch.randint(3, ()) if torch.rand(()) < 0.03 else label

    loader = Guard(progress=False).protect(DataLoader(Noisy(images, labels), 10))
    assert sum(len(batch[0]) for batch in loader) == len(KEPT)


def test_what_reads_for_the_data_set_inside_does_not_read_for_a_wrapper(screening, images, labels):
    class Inside(Dataset):
        def read_raw(self, index):
            return images[index], int(labels[index])

        __getitem__ = read_raw

        def __len__(self):
            return 60

    class Turned(Dataset):
        def __init__(self, inside):
            self.inside = inside

        def __getattr__(self, name):
            return getattr(vars(self)["inside"], name)

        def __len__(self):
            return 60

        def __getitem__(self, index):
            image, label = self.inside[59 - index]
            return image, 2 - label

    store = open_images(Turned(Inside()))
    assert store.labels.tolist() == (2 - labels.flip(0)).tolist() and torch.equal(store.batch([0])[0], images[59])
    view = Guard(progress=False).protect(DataLoader(Inside(), 10)).dataset
    assert open_images(view).labels.tolist() == labels[KEPT].tolist()


@pytest.mark.parametrize("levels", [(0, 180), (90, 255)])
def test_a_given_normalisation_is_not_taken_for_one_of_plain_pixels_that_are_dark_or_bright(levels, screening, labels):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(*levels, (60, 3, 8, 8))).float() / 255
    seen = []

    class Watching(nn.Sequential):
        def forward(self, x):
            seen.append((float(x.min()), float(x.max())))
            return super().forward(x)

    guard, model = Guard(progress=False), Watching(*network())
    guard.protect(DataLoader(TensorDataset(pixels, labels), 10), model, mean=0.5, std=0.25)
    assert torch.allclose(screening.calls[0].images.batch([0])[0], pixels[0], atol=1e-3)
    seen.clear()
    guard.relabel(model)
    low, high = ((value / 255 - 0.5) / 0.25 for value in levels)
    assert low <= seen[0][0] < seen[0][1] <= high


@pytest.mark.parametrize("said", ["by arithmetic", "by an object"])
def test_dark_images_that_a_batch_normalises_are_relabelled_as_they_are_fed(said, screening, labels):
    pixels = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.55  # on no level of eight bits
    normalize = v2.Normalize([0.2] * 3, [0.25] * 3) if said == "by an object" else lambda x: (x - 0.2) / 0.25
    seen = []

    class Watching(nn.Sequential):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    def collate(batch, normalize=normalize):
        images, given = torch.utils.data.default_collate(batch)
        return normalize(images), given

    guard, model = Guard(progress=False), Watching(*network())
    guard.protect(DataLoader(TensorDataset(pixels, labels), 10, collate_fn=collate), model)
    seen.clear()
    guard.relabel(model)
    flagged = np.flatnonzero(guard.result.suspect)
    assert torch.allclose(seen[-1], (pixels[flagged] - 0.2) / 0.25, atol=0.02)


def test_a_set_of_many_parts_keeps_no_file_open_and_moves_no_generator(screening, images, labels):
    class Part(Dataset):
        def __init__(self, k):
            self.k, self.opened, self.random = k, None, np.random.default_rng(k)

        def __len__(self):
            return 1

        def __getitem__(self, _):
            self.opened = self.opened or object()
            self.random.random()
            return images[self.k % 60], int(labels[self.k % 60])

    parts = [Part(k) for k in range(90)]
    before = [part.random.bit_generator.state for part in parts]
    trainguard.screen(ConcatDataset(parts), progress=False)
    assert all(part.opened is None for part in parts)
    assert before == [part.random.bit_generator.state for part in parts]


def test_a_trained_model_whose_hooks_change_what_it_says_is_refused(screening, images, labels):
    model = network()
    model.register_forward_hook(lambda _, __, found: found.flip(1))
    with pytest.raises(ModelError, match="gives something else without its forward hooks"):
        trainguard.screen(TensorDataset(images, labels), model, trained=True, progress=False)


def test_a_data_set_may_keep_what_it_knows_under_any_name(screening, images, labels):
    data = Augmented(images, labels)
    data._labels, data._count = labels.tolist(), "mine"
    view = Guard(progress=False).protect(DataLoader(data, 10)).dataset
    assert view._labels == labels[KEPT].tolist() and view._count == "mine"


def test_images_that_are_normalised_by_halves_are_no_plain_pixels(screening, labels):
    """Bright images of a mean and deviation of a half lie in [0, 1] as well, on every second level."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(170, 230, (60, 3, 8, 8))).float() / 255
    Guard(progress=False).protect(DataLoader(TensorDataset((pixels - 0.5) / 0.5, labels), 10), mean=0.5, std=0.5)
    assert torch.allclose(screening.calls[0].images.batch([0])[0], pixels[0], atol=1e-3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_hugging_face_column_says_in_which_colours_its_images_are(mode, channels, screening, images, labels):
    kinds = datasets.Features({"image": datasets.Image(mode=mode), "label": datasets.ClassLabel(names=list("abc"))})
    stored = [picture.convert("L" if mode == "RGB" else "RGB") for picture in pictures_of(images)]
    data = datasets.Dataset.from_dict({"image": stored, "label": labels.tolist()}, features=kinds).with_format("torch")
    Guard(progress=False).protect(DataLoader(data, 10))
    assert screening.calls[0].images.shape == (channels, 8, 8)


def test_whatever_a_data_set_fills_is_as_full_as_it_was(screening, images, labels):
    class Filling(Dataset):
        def __init__(self):
            self.last, self.seen, self.count = collections.deque(maxlen=8), {1}, torch.zeros(1)
            self.kept, self.held, self.found = np.zeros(2400), [None] * 2400, np.full(60, None)

        def __len__(self):
            return 2400

        def __getitem__(self, index):
            self.last.append(index)
            self.seen.add(index)
            self.count += 1
            self.kept[index], self.held[index], self.found[index % 60] = 1, index, index
            return images[index % 60], int(labels[index % 60])

    screening.flagged = []
    data = Filling()
    Guard(progress=False).protect(DataLoader(data, 10))
    assert (len(data.last), data.seen, float(data.count)) == (0, {1}, 0)
    assert not data.kept.any() and set(data.held) == {None} and set(data.found) == {None}


def test_a_loader_that_was_protected_in_inference_mode_takes_new_labels_outside(screening, images, labels):
    guard, model = Guard(progress=False), network()
    with torch.inference_mode():
        loader = guard.protect(DataLoader(TensorDataset(images, labels), 10))
    guard.relabel(model)
    assert sum(len(batch[0]) for batch in loader) == 60


def test_a_guard_may_be_pickled_and_leads_no_loaders_then(screening, images, labels):
    guard = Guard(progress=False)
    loader = guard.protect(DataLoader(TensorDataset(images, labels), 10))
    other = pickle.loads(pickle.dumps(guard))
    assert other.result.keep.tolist() == KEPT
    other.relabel(network())
    assert other.relabelled and not guard.relabelled and sum(len(batch[0]) for batch in loader) == len(KEPT)


def test_what_can_be_known_to_be_wrong_is_said_before_all_is_read(images, tmp_path):
    class Read(TensorDataset):
        rows = 0

        def __getitem__(self, index):
            Read.rows += 1
            return super().__getitem__(index)

    data, place = Read(images, torch.arange(60) % 3), tmp_path / "file"
    place.touch()
    with pytest.raises(StateError, match="file"):
        Guard(progress=False, state_dir=place).protect(DataLoader(data, 10))
    with pytest.raises(StateError, match="file"):
        trainguard.screen(data, state_dir=place, progress=False)
    with pytest.raises(DataError, match="cannot rebuild the sampler list"):
        Guard(progress=False).protect(DataLoader(data, batch_sampler=[[0, 1]]))
    assert Read.rows == 0
