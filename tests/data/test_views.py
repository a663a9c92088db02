import collections
import functools
from types import MappingProxyType

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from trainguard.data.samples import class_in, find_label, find_twins, label_like, relabelled
from trainguard.data.views import LiveView, evenly
from trainguard.errors import DataError


class Numbers(Dataset):
    """Sample i is (i, i % 3)."""

    def __init__(self, size):
        self.size = size
        self.targets = [i % 3 for i in range(size)]
        self.classes = ["a", "b", "c"]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return index, self.targets[index]


@st.composite
def screenings(draw):
    """A size, the samples kept (one at least), a population, and a new label for each other sample."""
    size = draw(st.integers(1, 40))
    population = draw(st.one_of(st.none(), st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)))
    pool = list(range(size)) if population is None else population
    kept = draw(st.sets(st.integers(0, size - 1))) | {draw(st.sampled_from(pool))}
    flagged = np.array(sorted(set(range(size)) - kept), dtype=np.int64)
    labels = np.array([draw(st.integers(0, 2)) for _ in flagged], dtype=np.int64)
    return size, np.array(sorted(kept)), None if population is None else np.array(population), flagged, labels


def pool_of(size, population):
    return np.arange(size) if population is None else population


def contents(view):
    return [view[position] for position in range(len(view))]


@settings(deadline=None)
@given(screenings())
def test_natural_view_gives_every_kept_sample_once_in_order(case):
    size, kept, population, _, _ = case
    view = LiveView(Numbers(size), 1, population)
    view.keep(kept)
    expected = [sample for sample in pool_of(size, population) if sample in kept]
    assert contents(view) == [(sample, sample % 3) for sample in expected]
    assert view.share == len(expected) / len(pool_of(size, population))


@settings(deadline=None)
@given(screenings(), st.integers(0, 5))
def test_refilled_view_keeps_its_length_and_every_kept_sample_s_position_and_draws_evenly(case, seed):
    size, kept, population, _, _ = case
    pool = pool_of(size, population)
    view = LiveView(Numbers(size), 1, population)
    view.refill(kept, seed)
    assert len(view) == len(pool)
    for position, sample in enumerate(pool):
        if sample in kept:
            assert view[position] == (sample, sample % 3)
    times = collections.Counter(sample for sample, _ in contents(view))
    assert set(times) == {sample for sample in pool.tolist() if sample in kept}
    assert max(times.values()) - min(times.values()) <= 1


@settings(deadline=None)
@given(screenings(), st.booleans())
def test_relabel_brings_every_sample_back_once_and_moves_none(case, natural):
    size, kept, population, flagged, labels = case
    pool = pool_of(size, population)
    view = LiveView(Numbers(size), 1, population)
    view.keep(kept) if natural else view.refill(kept, 0)
    before = contents(view)
    view.keep(kept, (flagged, labels)) if natural else view.refill(kept, 0, (flagged, labels))
    new = dict(zip(flagged.tolist(), labels.tolist(), strict=True))
    assert sorted(contents(view)) == sorted((sample, new.get(sample, sample % 3)) for sample in pool.tolist())
    for position, (sample, label) in enumerate(before):
        if natural or pool[position] in kept:
            assert view[position] == (sample, label)


@settings(deadline=None)
@given(screenings())
def test_views_are_idempotent_and_forget_what_was_before(case):
    size, kept, population, flagged, labels = case
    once, again = LiveView(Numbers(size), 1, population), LiveView(Numbers(size), 1, population)
    once.keep(kept)
    again.refill(kept, 3, (flagged, labels))
    again.keep(kept)
    again.keep(kept)
    assert contents(once) == contents(again)


@settings(deadline=None)
@given(screenings(), st.booleans())
def test_fetching_many_is_fetching_one_by_one(case, relabel):
    size, kept, population, flagged, labels = case
    view = LiveView(Numbers(size), 1, population)
    view.keep(kept, (flagged, labels) if relabel else None)
    positions = np.random.default_rng(0).integers(0, len(view), 10).tolist()
    assert view.__getitems__(positions) == [view[position] for position in positions]


@given(st.integers(1, 20), st.integers(0, 100), st.integers(0, 5))
def test_evenly_draws_each_item_as_often_as_any_other(size, count, seed):
    draws = evenly(np.arange(size), count, np.random.default_rng(seed))
    times = np.bincount(draws, minlength=size)
    assert len(draws) == count and times.max() - times.min() <= 1


def test_view_of_nothing_kept_is_refused():
    view = LiveView(Numbers(5), 1, np.array([1, 2]))
    with pytest.raises(DataError, match="none of the loader's 2 samples is kept"):
        view.keep(np.array([0, 3, 4]))


def test_position_outside_is_an_index_error_so_that_plain_iteration_ends():
    view = LiveView(Numbers(5), 1)
    view.keep(np.array([1, 3]))
    assert list(view) == [(1, 1), (3, 0)]
    with pytest.raises(IndexError, match="position 2 is outside the 2 samples"):
        view[2]


def test_attributes_are_the_data_set_s_own_and_lists_by_sample_are_in_view_order():
    dataset = Numbers(6)
    view = LiveView(dataset, 1)
    view.keep(np.array([1, 2, 5]))
    assert view.classes == ["a", "b", "c"] and view.targets == [1, 2, 2]
    view.keep(np.array([1, 2, 5]), (np.array([0, 3, 4]), np.array([2, 2, 2])))
    assert view.targets == [1, 2, 2, 2, 2, 2]
    assert [label for _, label in contents(view)] == view.targets
    view.epoch = 3
    assert dataset.epoch == 3
    with pytest.raises(AttributeError):
        _ = view.nothing_of_the_kind


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_labels_listed_by_sample_follow_in_any_form(kind):
    dataset = Numbers(6)
    dataset.targets = kind(dataset.targets)
    view = LiveView(dataset, 1)
    view.keep(np.array([1, 2, 5]), (np.array([0]), np.array([2])))
    assert type(view.targets) is type(dataset.targets) and [int(label) for label in view.targets] == [1, 2, 2, 2]


def test_fetching_uses_the_data_set_s_own_bulk_read():
    class Bulk(Numbers):
        def __getitems__(self, indices):
            return [(index, "bulk") for index in indices]

    view = LiveView(Bulk(6), 1)
    view.keep(np.array([1, 5]))
    assert view.__getitems__([1, 0]) == [(5, "bulk"), (1, "bulk")]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_see_keep_and_relabel(context):
    view = LiveView(Numbers(12), 1)
    loader = DataLoader(view, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context=context)

    def epoch():
        return [pair for numbers, labels in loader for pair in zip(numbers.tolist(), labels.tolist(), strict=True)]

    assert epoch() == [(i, i % 3) for i in range(12)]
    view.keep(np.arange(0, 12, 2))
    assert epoch() == [(i, i % 3) for i in range(0, 12, 2)]
    view.keep(np.arange(0, 12, 2), (np.arange(1, 12, 2), np.zeros(6, dtype=np.int64)))
    assert epoch() == [(i, i % 3) for i in range(0, 12, 2)] + [(i, 0) for i in range(1, 12, 2)]


Pair = collections.namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "sample, key",
    [
        ((7, 1), 1),
        ([7, 1], 1),
        (Pair(7, 1), 1),
        ({"image": 7, "label": 1}, "label"),
        (collections.OrderedDict(image=7, label=1), "label"),
        ((7, np.int32(1)), 1),
        ((7, torch.tensor(1, dtype=torch.int32)), 1),
        ((7, torch.tensor([1])), 1),
        ((7, np.array(1, dtype=np.uint8)), 1),
        ((7, 1), -1),
    ],
)
def test_a_relabelled_sample_has_the_type_it_had_and_the_old_one_is_untouched(sample, key):
    changed = relabelled(sample, key, 2)
    assert type(changed) is type(sample) and type(changed[key]) is type(sample[key])
    assert getattr(changed[key], "dtype", None) == getattr(sample[key], "dtype", None)
    assert getattr(changed[key], "shape", None) == getattr(sample[key], "shape", None)
    assert int(changed[key]) == 2 and int(sample[key]) == 1
    first = functools.partial(next, iter(changed.values() if isinstance(changed, dict) else changed))
    assert first() == 7


@pytest.mark.parametrize("old", [torch.tensor([0.0, 1.0, 0.0]), np.array([0, 1, 0]), [0.0, 1.0, 0.0], (0, 1, 0)])
def test_a_label_with_a_place_for_each_class_gets_the_new_class(old):
    new = relabelled((7, old), 1, 2)[1]
    assert type(new) is type(old) and list(new) == [0, 0, 1] and list(old) == [0, 1, 0]


def test_a_label_that_a_dict_holds_twice_is_replaced_twice():
    samples = [{"image": i, "label": i % 3, "labels": i % 3, "y": 7} for i in range(6)]
    twins = find_twins(samples, "label")
    view = LiveView(samples, "label", twins=twins)
    view.keep(np.arange(4), (np.array([4, 5]), np.array([0, 0])))
    assert view[4] == {"image": 4, "label": 0, "labels": 0, "y": 7} and samples[4]["labels"] == 1
    assert twins == ("labels",)
    assert find_twins([{"label": 0, "target": 0}, {"label": 0, "target": 0}], "label") == ()  # one class says nothing
    assert find_twins([{"label": 0, "target": 0}, {"label": 1, "target": 0}], "label") == ()
    assert find_twins([{"label": i, "targets": [[i, i], [i]]} for i in range(3)], "label") == ()
    with pytest.raises(DataError, match="3 could be it"):
        find_label(samples[4])


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_label_that_a_sample_holds_in_another_form_is_replaced_as_well(kind):
    one_hot = [kind([int(place == i % 3) for place in range(3)]) for i in range(6)]
    for samples, key, there in (
        ([{"label": i % 3, "class_id": i % 3, "row": i, "places": one_hot[i]} for i in range(6)], "label", "places"),
        ([(f"image {i}", i % 3, i, one_hot[i], i % 3) for i in range(6)], 1, 3),
    ):
        twins = find_twins(samples, key)
        assert twins == (("class_id", "places") if key == "label" else (3, 4))
        changed = relabelled(samples[1], key, 2, twins)
        assert [int(place) for place in changed[there]] == [0, 0, 1]
        assert changed[twins[0] if key == "label" else 4] == changed[key] == 2
    assert find_twins([(i, i % 3, 1 - i % 3) for i in range(6)], -2) == ()


def test_columns_give_the_new_labels_in_every_form():
    class Columns(Numbers):
        def __getitem__(self, index):
            names = [str(i % 3) for i in range(6)]
            columns = {"label": self.targets, "name": names, "places": np.eye(3)[self.targets]}
            return columns[index] if isinstance(index, str) else {k: column[index] for k, column in columns.items()}

    view = LiveView(Columns(6), "label", twins=("places",))
    view.keep(np.array([0, 1, 2, 4, 5]), (np.array([3]), np.array([2])))
    assert view["label"] == [0, 1, 2, 1, 2, 2] and view["name"] == ["0", "1", "2", "1", "2", "0"]
    assert view["places"].argmax(1).tolist() == view["label"] and view[5]["places"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, tuple])
def test_what_is_set_in_the_view_s_order_arrives_in_the_data_set_s(kind):
    numbers, kept = Numbers(6), np.array([1, 2, 4, 5])
    view = LiveView(numbers, 1)
    view.keep(kept, (np.array([3]), np.array([2])))
    assert list(view.targets) == [1, 2, 1, 2, 2]
    view.targets = kind([int(label) + 10 for label in view.targets])
    assert type(numbers.targets) is type(kind([0]))
    assert [int(label) for label in numbers.targets] == [0, 11, 12, 0, 11, 12]
    assert [int(label) for label in view.targets] == [11, 12, 11, 12, 2]
    view.targets = [9] * 6  # as many as the data set has
    assert numbers.targets == [9] * 6


def test_a_hugging_face_data_set_behind_a_view_gives_no_other_one_of_all_samples():
    view = LiveView(datasets.Dataset.from_dict({"label": [0, 1, 0, 1]}), "label")
    view.keep(np.array([0, 1, 2]))
    assert view.num_rows == len(view) == 3 and view.column_names == ["label"]
    for name in ("shuffle", "filter", "map", "train_test_split", "with_format", "remove_columns", "to_pandas", "iter"):
        with pytest.raises(DataError, match=rf"{name}\(\) of a protected data set .* result\.apply\(dataset\)"):
            getattr(view, name)(lambda row: True)


def test_a_view_lies_on_the_cpu_wherever_new_tensors_go():
    torch.set_default_device("meta")
    try:
        view = LiveView(Numbers(4), 1)
        assert len(view) == 4 and view[3] == (3, 0)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.array([False, True, False]), 1),
        ([0.05, 0.05, 0.9], 2),
        ([0.3, 0.7], None),  # of two classes, which may be mixed
        (torch.tensor([0.3, 0.7, 0.0]), None),  # mixed
        (torch.tensor([float("nan"), 1.0, 0.0]), None),
        ([2, 0, 0], None),
        ([1, 1, 0], None),
    ],
)
def test_the_class_in_a_vector(value, found):
    assert class_in(value) == found


@pytest.mark.parametrize("form", [np.array, torch.tensor, list, tuple])
def test_a_vector_of_truth_values_takes_another_class(form):
    new = label_like(form([False, True, False]), 0)
    assert type(new) is type(form([True])) and [bool(value) for value in new] == [True, False, False]


@pytest.mark.parametrize("form", [np.array, torch.tensor, list, tuple])
def test_a_vector_takes_another_class_and_stays_as_smooth(form):
    new = label_like(form([0.05, 0.05, 0.9]), 0)
    assert type(new) is type(form([0.05])) and list(map(float, new)) == pytest.approx([0.9, 0.05, 0.05])


def test_a_data_set_that_grows_is_spoken_of_once():
    data = Numbers(10)
    view = LiveView(data, 1)
    data.size = len(data) + 3
    with pytest.warns(UserWarning, match="has 3 samples more than were screened"):
        assert len(view) == data.size - 3
    assert len(view) == data.size - 3


def test_a_sample_that_cannot_be_written_to_comes_back_all_the_same():
    sample = MappingProxyType({"image": 1, "label": 2})
    assert relabelled(sample, "label", 0) == {"image": 1, "label": 0} and sample["label"] == 2


def test_samples_of_a_list_of_positions_are_relabelled_one_by_one():
    class Several(Numbers):
        def __getitem__(self, index):
            one = super().__getitem__
            return [one(i) for i in index] if isinstance(index, list) else one(index)

    view = LiveView(Several(10), 1)
    view.keep(np.arange(1, 10), (np.array([0]), np.array([7])))
    assert [label for _, label in view[[0, 9]]] == [view[0][1], 7]
