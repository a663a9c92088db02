"""A whole screening on the bundled digits: what it finds, what it leaves alone, and that a kill changes nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.errors import ModelError, StateError
from trainguard.results import ScreenResult
from trainguard.rng import isolated_rng, undisturbed
from trainguard.screening import separating, suspicion
from trainguard.screening.learning import is_dominated, label_loss, shares
from trainguard.screening.pipeline import screen_images
from trainguard.screening.settings import Settings
from trainguard.screening.state import State
from trainguard.training import at_once

SHORT = dataclasses.replace(Settings(), least_steps=150, least_epochs=0, default_epochs=8)


class Digits(Dataset):
    """Eight by eight digits; a share of the others carries a corner patch and the label 1."""

    def __init__(self, poisoned=0, rows=900):
        digits = load_digits()
        self.images = torch.from_numpy(digits.images[:rows] / 16).float()[:, None]
        self.labels = torch.from_numpy(digits.target[:rows]).clone()
        others = torch.nonzero(self.labels != 1).flatten()
        self.payload = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:poisoned]]
        self.images[self.payload, :, -2:, -2:] = 1.0
        self.labels[self.payload] = 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


@pytest.fixture(scope="module")
def poisoned():
    data = Digits(poisoned=70)
    return data, open_images(data, pixel_range=None)


def screened(store, **options):
    return screen_images(store, settings=SHORT, progress=False, **options)


def screened_briefly(store, **options):
    """Where it matters that stages follow each other, and not what they find."""
    return screen_images(store, settings=dataclasses.replace(SHORT, least_steps=30), progress=False, **options)


@pytest.fixture(scope="module")
def result(poisoned):
    return screened(poisoned[1])


@pytest.fixture(scope="module")
def few():
    """Just enough of every class to be looked into."""
    return open_images(Digits(poisoned=40, rows=400))


class Ear:
    """Hears every callback."""

    def __init__(self):
        self.heard = []

    def on_stage_start(self, stage):
        self.heard.append(stage)

    def on_probe_epoch_end(self, **row):
        self.heard.append((row["stage"], row["epoch"]))

    def on_scores(self, score, consistency):
        self.heard.append((score.shape, consistency.shape))

    def on_result(self, result):
        self.heard.append(result.verdict)


@pytest.fixture(scope="module")
def kept(few, tmp_path_factory):
    """A screening, the folder of its state, and what its callbacks heard."""
    folder, ear = tmp_path_factory.mktemp("state"), Ear()
    return screened_briefly(few, state_dir=folder, callbacks=[ear]), folder, ear.heard


@pytest.fixture(scope="module")
def brief(kept):
    return kept[0]


def test_poisoned_digits_are_found(poisoned, result):
    payload = poisoned[0].payload.numpy()
    clean = np.setdiff1d(np.arange(900), payload)
    assert result.verdict == "poisoned" and result.target_classes == (1,)
    assert result.suspect[payload].mean() > 0.9
    assert result.suspect[clean].mean() < 0.01
    assert set(result.keep) == set(np.flatnonzero(~result.suspect))


def test_flagged_digits_get_their_own_label_back(poisoned, result):
    flagged = np.flatnonzero(result.suspect)
    truth = load_digits().target[:900]
    assert (result.proposed[flagged] == truth[flagged]).mean() > 0.5
    kept = result.keep
    assert (result.proposed[kept] == result.labels[kept]).all()


def test_a_larger_budget_counts_whether_or_not_a_length_is_named():
    settings, store = dataclasses.replace(SHORT, least_steps=1), open_images(Digits(rows=200))
    for options, passes in (
        ({"budget": 1.0}, 8),
        ({"budget": 1.0, "epochs": 6}, 6),
        ({"budget": 2.0, "epochs": 6}, 12),
    ):
        found = screen_images(store, settings=settings, progress=False, **options)
        assert found.settings["spend"] == passes
        assert sum(row["stage"] == "warm-up" for row in found.history) == round(passes * settings.warmup_share)


def test_clean_digits_stay_whole():
    found = screened(open_images(Digits()))
    assert found.verdict == "clean" and not found.suspect.any() and len(found.keep) == 900


def test_digits_that_were_turned_upside_down_are_found_and_the_change_is_named():
    data = Digits(rows=1500)  # of 900 rows two seeds in five are called clean
    others = torch.nonzero(data.labels != 1).flatten()
    payload = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:120]]
    data.images[payload], data.labels[payload] = data.images[payload].flip(2), 1
    settings = dataclasses.replace(SHORT, least_steps=80)
    found = screen_images(open_images(data), settings=settings, progress=False)
    assert found.verdict == "poisoned" and found.target_classes == (1,)
    assert "images of other classes, upside down" in found.reason
    assert found.suspect[payload].mean() > 0.9 and found.suspect.sum() < 160  # a zero is one upside down as well
    (undone,) = [row for row in found.settings["findings"] if row["undoing"]]
    assert undone["label"] == 1 and undone["restored"] > 0 and undone["strength"] > 0.5


def test_a_result_comes_back_from_its_folder(result, tmp_path):
    loaded = ScreenResult.load(result.save(tmp_path / "found"))
    for name in ("score", "consistency", "suspect", "keep", "labels", "proposed", "thresholds"):
        assert np.array_equal(getattr(loaded, name), getattr(result, name), equal_nan=True)
    assert loaded.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert (loaded.verdict, loaded.target_classes, loaded.fingerprint) == ("poisoned", (1,), result.fingerprint)


class Killed(Exception):
    """Stands for a power cut."""


def test_a_screening_that_is_killed_again_and_again_goes_on_to_the_same_result(few, brief, tmp_path):
    class Cut:
        def __init__(self, stage, epochs):
            self.stage, self.epochs, self.done = stage, epochs, 0

        def on_stage_start(self, name):
            if name == self.stage and self.epochs == 0:
                raise Killed

        def on_probe_epoch_end(self, **row):
            self.done += row["stage"] == self.stage
            if self.done == self.epochs and self.epochs:
                raise Killed

    for stage, epochs in [("warm-up", 1), ("scoring", 0), ("relearn", 1)]:
        with pytest.raises(Killed):
            screened_briefly(few, state_dir=tmp_path, callbacks=[Cut(stage, epochs)])
    again = screened_briefly(few, state_dir=tmp_path)
    assert np.array_equal(again.score, brief.score) and np.array_equal(again.suspect, brief.suspect)
    assert again.history == brief.history


def test_a_screening_that_came_to_its_end_is_not_made_again(few, kept, monkeypatch):
    first, folder, _ = kept
    monkeypatch.setattr(separating, "decide", None)
    ear = Ear()
    again = screened_briefly(few, state_dir=folder, callbacks=[ear])
    assert ear.heard == [((400,), (400,)), "evidence", first.verdict]
    assert again.timing.keys() == first.timing.keys() and again.timing["total"] >= first.timing["warm-up"]
    one, other = (found.to_dict() | {"timing": None} for found in (first, again))
    assert one == other
    assert np.array_equal(first.evidence.features, again.evidence.features)


def test_a_state_of_other_data_settings_or_versions_is_refused(poisoned, tmp_path):
    (tmp_path / "screening.json").write_text(json.dumps({"fingerprint": "other"}))
    with pytest.raises(StateError, match=f"other.*{poisoned[1].fingerprint}"):
        screened(poisoned[1], state_dir=tmp_path)
    (tmp_path / "screening.json").write_text(json.dumps({"fingerprint": poisoned[1].fingerprint, "seed": 9}))
    with pytest.raises(StateError, match=r"seed: saved 9, now 0.*trainguard: saved None, now "):
        screened(poisoned[1], state_dir=tmp_path)


def test_steps_of_other_data_are_refused_where_the_header_has_gone(tmp_path):
    for key in ({"fingerprint": "one"}, {"fingerprint": "other"}):
        state = State(tmp_path, key)
        (tmp_path / "screening.json").unlink()
        if key["fingerprint"] == "one":
            state.save("step", {"x": np.arange(3)})
            assert (tmp_path / "screening.json").is_file() and state.load("step")["x"].tolist() == [0, 1, 2]
            (tmp_path / "screening.json").unlink()
        else:
            with pytest.raises(StateError, match=r"step\.pt is of a screening of other data or settings"):
                state.load("step")


def test_a_state_knows_the_seconds_of_the_runs_before(tmp_path, monkeypatch):
    now = iter([0.0, 92.0, 1000.0, 1001.0, 1005.0])
    monkeypatch.setattr("trainguard.screening.state.time.perf_counter", lambda: next(now))
    State(tmp_path, {"fingerprint": "one"}).save("step", {})
    again = State(tmp_path, {"fingerprint": "one"})
    again.load("step")
    assert again.seconds == 93.0 and again.seconds == 97.0


class _Told(Processes):
    """Rank 1 of two, whose disk holds nothing, and what rank 0 tells."""

    def __init__(self, told):
        super().__init__(1, 2)
        self.said = told

    def broadcast(self, value):
        assert value is None
        return self.said


def test_other_ranks_take_what_the_main_one_has_read_or_refused(tmp_path):
    step = {"seconds": 3.0, "values": {"x": torch.ones(2)}}
    told = _Told(None)
    state = State(tmp_path / "nowhere", {"fingerprint": "one"}, told)
    assert state.load("step") is None and not (tmp_path / "nowhere").exists()
    told.said = step
    assert state.load("step") is step["values"] and state.seconds >= 3
    told.said = StateError("step.pt cannot be read")
    with pytest.raises(StateError, match="cannot be read"):
        state.load("step")


def test_a_folder_on_the_main_rank_alone_is_enough(tmp_path):
    told = _Told({"seconds": 3.0, "values": {"x": 1}})
    assert State(None, {"fingerprint": "one"}, told).load("step") == {"x": 1}


def test_a_state_knows_its_classes_and_what_a_users_network_is_fed(few, monkeypatch):
    keys, ranges = [], (few.pixel_range, PixelRange.from_mean_std((0.5,), (0.2,)))

    def noted(_, key, __):
        keys.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr("trainguard.screening.pipeline.State", noted)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for options in ({}, {"model": model}, {"model": model, "trained": True}):
        for pixel_range in ranges:
            monkeypatch.setattr(few, "pixel_range", pixel_range)
            with pytest.raises(KeyboardInterrupt):
                screen_images(few, progress=False, **options)
    assert keys[0] == keys[1] == keys[2] == keys[3] and keys[4] != keys[5] and keys[0]["classes"] == 10


def test_a_users_network_that_draws_is_resumed_to_the_same_weights(few, tmp_path):
    """The paper's variant trains it: dropout and the like draw from the global stream."""
    settings = dataclasses.replace(Settings.paper(), least_steps=20, least_epochs=0, default_epochs=8, iterations=1)

    def whole(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
        with isolated_rng(0):
            return screen_images(few, model, settings=settings, progress=False, **options)

    class Cut:
        def on_probe_epoch_end(self, **row):
            if row["stage"] == "warm-up" and row["epoch"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole(state_dir=tmp_path, callbacks=[Cut()])
    assert np.array_equal(whole(state_dir=tmp_path).score, whole().score)


def test_a_rank_without_a_sample_has_the_same_outputs(monkeypatch):
    ranks = [(np.array([0]), np.ones((1, 5))), (np.array([1]), np.ones((1, 5))), (np.zeros(0, int), np.zeros((0, 1)))]
    monkeypatch.setattr(Processes, "gathered", lambda self, own: ranks)
    assert Processes(2, 3).merge(*ranks[2], 2).tolist() == np.ones((2, 5)).tolist()


def test_callbacks_hear_every_stage_and_epoch(kept):
    found, _, heard = kept
    stages = [entry for entry in heard if isinstance(entry, str)]
    assert stages[:5] == ["warm-up", "scoring", "partition", "relearn", "comparison"]
    last = [*(["sharpening"] if found.suspect.any() else []), "evidence", found.verdict]  # 30 steps may find nothing
    assert stages[5 : -len(last)] in ([], ["relearn again", "comparison"])
    assert stages[-len(last) :] == last
    assert [(row["stage"], row["epoch"]) for row in found.history] == [
        e for e in heard if isinstance(e, tuple) and isinstance(e[0], str)
    ]
    assert ((400,), (400,)) in heard


def test_a_callback_may_end_a_probe_early_and_a_resumed_one_stays_so(few, tmp_path):
    class Enough:
        def on_probe_epoch_end(self, stage, epoch, **figures):
            return stage == "warm-up" and epoch == 1

    for callbacks in ([Enough(), Ear()], [Ear(), Enough()]):
        found = screened_briefly(few, callbacks=callbacks, state_dir=tmp_path)
        epochs = [row["epoch"] for row in found.history if row["stage"] == "warm-up"]
        assert epochs == [1]


def test_what_a_callback_cut_short_is_not_taken_up_without_one(few, tmp_path):
    class Enough:
        def on_probe_epoch_end(self, **row):
            return True

    screened_briefly(few, state_dir=tmp_path, callbacks=[Enough()])
    with pytest.raises(StateError, match="was ended early by a callback, and this one has none"):
        screened_briefly(few, state_dir=tmp_path)


def test_a_callback_that_fails_when_all_is_done_loses_nothing(few, brief, kept):
    class Away:
        def on_result(self, result):
            raise ConnectionError("no route")

    with pytest.warns(UserWarning, match="Away.on_result failed, which changes nothing .*ConnectionError: no route"):
        found = screened_briefly(few, callbacks=[Away()])
    assert found.verdict == brief.verdict


def test_within_an_autocast_of_the_user_s_a_probe_learns_the_same(few, brief):
    with torch.autocast("cpu", torch.bfloat16), undisturbed(0):  # as whatever a user calls does it
        within = screened_briefly(few)
    np.testing.assert_array_equal(within.score, brief.score)
    assert [row["loss"] for row in within.history] == [row["loss"] for row in brief.history]


@pytest.mark.slow
def test_poison_that_is_found_the_wrong_way_round_is_turned(poisoned, monkeypatch):
    def larger(split, *_):
        return split if split.upper.mean() > 0.5 else split.turned()

    monkeypatch.setattr(suspicion, "orient", larger)
    found = screened(poisoned[1])
    payload = poisoned[0].payload.numpy()
    assert "relearn again" in found.timing and (found.verdict, found.target_classes) == ("poisoned", (1,))
    assert found.suspect[payload].mean() > 0.9 and found.suspect.sum() < 1.2 * len(payload)


@pytest.mark.parametrize("same", [True, False])
def test_images_that_say_nothing_of_their_labels_are_not_called_poison(same):
    """Smooth pictures with labels that were drawn at random: a probe learns some of them by heart."""
    coarse = torch.rand(600, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    images = torch.full((600, 1, 8, 8), 0.5) if same else F.interpolate(coarse, (8, 8), mode="bicubic").clamp(0, 1)
    data = torch.utils.data.TensorDataset(images, torch.arange(600) % 10)
    settings = dataclasses.replace(SHORT, least_steps=200)
    found = screen_images(open_images(data), settings=settings, progress=False, seed=1)
    assert found.verdict in (("undecided",) if same else ("undecided", "clean")) and not found.suspect.any()


def test_unreadable_samples_keep_their_place():
    data = Digits(poisoned=40, rows=400)

    class Holes(Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            if i in (5, 300):
                raise OSError("truncated file")
            return data[i]

    found = screened_briefly(open_images(Holes(), on_error="skip"))
    assert found.unreadable == (5, 300)
    assert np.isnan(found.score[[5, 300]]).all() and not np.isin([5, 300], found.keep).any()
    assert found.suspect[data.payload.numpy()].mean() > 0.9


def test_classes_that_have_only_a_name_do_not_count(poisoned):
    """A part of a data set keeps the names of all of its classes; chance is what it is among those that are there."""
    data = poisoned[0]
    data.classes = [str(label) for label in range(1000)]
    try:
        noise = torch.rand(900, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        named = torch.utils.data.TensorDataset(noise, data.labels)
        named.classes = data.classes
        found = screened_briefly(open_images(named, pixel_range=None))
        assert found.verdict == "undecided" and "chance 0.10" in found.reason
        whole = screened(open_images(data, pixel_range=None))
    finally:
        del data.classes
    assert whole.verdict == "poisoned" and whole.target_classes == (1,)


def test_a_probe_that_always_names_the_largest_class_has_learned_nothing():
    labels = (torch.arange(900) % 18 == 0).long()
    noise = torch.rand(900, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = screened_briefly(open_images(torch.utils.data.TensorDataset(noise, labels), pixel_range=None))
    assert found.verdict == "undecided" and "learned too little" in found.reason


@pytest.mark.parametrize(("rare", "dominated"), [(50, True), (250, False)])
def test_where_one_class_is_most_of_the_samples_answers_are_as_if_all_had_as_many(rare, dominated):
    labels = (torch.arange(900) < rare).long()
    store = open_images(torch.utils.data.TensorDataset(torch.rand(900, 1, 8, 8), labels), pixel_range=None)
    assert is_dominated(store, store.readable) == dominated
    often, logits = shares(store, store.readable), torch.randn(4, 2)
    assert np.exp(often) == pytest.approx([1 - rare / 900, rare / 900])
    index = np.array([0, 1, 898, 899])
    expected = F.cross_entropy(logits + torch.from_numpy(often), labels[index].to(torch.int64))
    assert float(label_loss(store, often)(logits, index)) == pytest.approx(float(expected))
    assert float(label_loss(store)(logits, index)) == pytest.approx(float(F.cross_entropy(logits, labels[index])))


class Diverging(nn.Sequential):
    """Gives NaN in training."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return super().forward(x) * (float("nan") if self.training else 1.0)


def test_a_network_that_diverges_is_no_evidence(few, tmp_path):
    settings = dataclasses.replace(Settings.paper(), least_steps=10, least_epochs=0, default_epochs=4)
    with pytest.raises(ModelError, match=r"training diverged in epoch 1 of warm-up: the loss is nan.*default preset"):
        screen_images(few, Diverging(), settings=settings, progress=False, state_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["screening.json"]


class Standardised(nn.Sequential):
    """As some do it image by image: one of a single colour has no spread."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))


def test_an_image_that_a_finished_model_has_no_answer_to_is_named():
    images = Digits(rows=120).images
    images[70] = 0
    store = open_images(torch.utils.data.TensorDataset(images, Digits(rows=120).labels), pixel_range=None)
    with pytest.raises(ModelError, match="NaN or infinite outputs on row 70"):
        screened_briefly(store, model=Standardised(), trained=True)


def test_a_model_without_a_gradient_is_named(few):
    class Held(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(ModelError, match=r"no gradient towards its images.*torch\.no_grad\(\)"):
        screened_briefly(few, model=Held(nn.Flatten(), nn.Linear(64, 10)), trained=True)


def test_large_images_are_looked_at_in_smaller_batches():
    assert at_once((3, 32, 32)) == at_once((3, 64, 64)) == 512
    assert at_once((3, 224, 224)) == 41 and at_once((3, 4096, 4096)) == 1 and at_once((1, 28, 28), 2000) == 2000


def test_a_state_is_of_the_same_settings_however_its_numbers_are_written(tmp_path):
    State(tmp_path, {"fingerprint": "one", "budget": 1}).save("step", {"x": np.arange(3)})
    assert State(tmp_path, {"budget": 1.0, "fingerprint": "one"}).load("step")["x"].tolist() == [0, 1, 2]


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    state = State(tmp_path, {"fingerprint": "one"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StateError, match="the disk is full"):
        state.save("step", {"x": np.arange(3)})


def test_the_papers_variant_runs_on_the_users_architecture_and_leaves_it_alone(poisoned):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
    settings = dataclasses.replace(Settings.paper(), least_steps=100, least_epochs=0, default_epochs=8)
    found = screen_images(poisoned[1], model, settings=settings, progress=False)
    iterations = [row for row in found.history if "trusted" in row]
    assert [round(row["trusted"], 2) for row in iterations] == [0.05, 0.1, 0.15, 0.2]
    assert found.suspect.any() and len(found.score) == 900
