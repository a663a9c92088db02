import collections
import copy
import gc
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trainguard.data.following import Follower, population_of
from trainguard.data.loaders import HOSTS, HostLoader, open_loader
from trainguard.data.views import LiveView
from trainguard.errors import DataError

KEPT = np.array([i for i in range(20) if i not in (3, 4, 11, 17)])
BACK = np.array([3, 4, 11, 17]), np.zeros(4, dtype=np.int64)  # the others, and their new labels


class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index, index % 2


class Backwards(Sampler):
    """A user's sampler that holds the data set and nothing else."""

    def __init__(self, data_source):
        self.data_source = data_source

    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -1))

    def __len__(self):
        return len(self.data_source)


class Paired(BatchSampler):
    """A user's batch sampler with settings of its own."""

    def __init__(self, sampler, batch_size, gap):
        super().__init__(sampler, batch_size, False)
        self.gap = gap


class Frozen(Sampler):
    """A user's sampler that has written the positions down."""

    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)


class FrozenLength(Backwards):
    def __init__(self, data_source):
        super().__init__(data_source)
        self.length = len(data_source)


DATA = Numbers()


def generator():
    return torch.Generator().manual_seed(5)


def followed(loader, kept=KEPT, refill=False):
    view = LiveView(loader.dataset, 1, population_of(loader))
    follower = Follower(loader, view)
    view.refill(kept, 0) if refill else view.keep(kept)
    follower.refresh()
    return view, follower


def numbers(loader):
    return [int(number) for batch in loader for number in np.atleast_1d(batch[0])]


LOADERS = {
    "sequential": lambda: DataLoader(DATA, batch_size=3),
    "shuffled": lambda: DataLoader(DATA, batch_size=3, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(DATA, batch_size=3, shuffle=True, generator=generator()),
    "random sampler": lambda: DataLoader(DATA, batch_size=3, sampler=RandomSampler(DATA)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)),
    "own sampler": lambda: DataLoader(DATA, batch_size=3, sampler=Backwards(DATA)),
    "own batch sampler": lambda: DataLoader(DATA, batch_sampler=Paired(Backwards(DATA), 3, gap=0.5)),
    "no batches": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "subset of all": lambda: DataLoader(DATA, batch_size=3, sampler=SubsetRandomSampler(range(20))),
    "one process": lambda: DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 1, 0)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_natural_epochs_have_every_kept_sample_once_and_follow_a_relabel(name):
    loader = LOADERS[name]()
    view, follower = followed(loader)
    ours = follower.loader
    assert type(ours.sampler) is type(loader.sampler) and type(ours.batch_sampler) is type(loader.batch_sampler)
    for _ in range(2):
        assert sorted(numbers(ours)) == KEPT.tolist()
    assert len(ours) == len(list(ours)) == (16 if loader.batch_sampler is None else 6)
    view.keep(KEPT, BACK)
    follower.refresh()
    assert sorted(numbers(ours)) == list(range(20))
    assert len(ours) == len(loader)


@pytest.mark.parametrize("name", LOADERS)
def test_refilled_epochs_keep_their_length(name):
    loader = LOADERS[name]()
    _, follower = followed(loader, refill=True)
    assert len(follower.loader) == len(loader)
    times = collections.Counter(numbers(follower.loader))
    assert set(times) == set(KEPT.tolist()) and sum(times.values()) == 20 and max(times.values()) == 2


@pytest.mark.parametrize("name", LOADERS)
def test_the_user_s_loader_is_as_it_was(name):
    untouched = LOADERS[name]()
    loader = LOADERS[name]()
    followed(loader)
    torch.manual_seed(0)
    expected = numbers(untouched)
    torch.manual_seed(0)
    assert numbers(loader) == expected and loader.dataset is DATA


def test_with_everything_kept_the_epochs_are_the_user_s_own():
    for name, make in LOADERS.items():
        _, follower = followed(make(), kept=np.arange(20))
        torch.manual_seed(0)
        expected = numbers(make())
        torch.manual_seed(0)
        assert numbers(follower.loader) == expected, name


def worker_init(worker):
    pass


def test_every_other_setting_is_kept():
    settings = {
        "collate_fn": list,
        "pin_memory": False,
        "timeout": 7.0,
        "worker_init_fn": worker_init,
        "generator": generator(),
        "prefetch_factor": 3,
        "persistent_workers": True,
        "num_workers": 2,
        "drop_last": True,
        "in_order": False,
        "multiprocessing_context": "fork",
    }
    loader = DataLoader(DATA, batch_size=3, shuffle=True, **settings)
    next(iter(loader))  # the user's workers are running
    ours = followed(loader)[1].loader
    assert {name: getattr(ours, name) for name in settings} == {name: getattr(loader, name) for name in settings}
    assert ours.batch_size == 3 and ours._iterator is None
    batches = list(ours)
    assert len(batches) == len(ours) == 5 and all(type(batch) is list and len(batch) == 3 for batch in batches)
    assert {number for batch in batches for number, _ in batch} <= set(KEPT.tolist())


def test_a_subclass_of_the_loader_stays_one():
    class Named(DataLoader):
        def __init__(self, name, dataset):
            super().__init__(dataset, batch_size=2)
            self.name = name

    ours = followed(Named("train", DATA))[1].loader
    assert type(ours) is Named and ours.name == "train" and sorted(numbers(ours)) == KEPT.tolist()


def test_subset_sampler_never_gives_a_sample_from_outside_its_subset():
    train = [0, 3, 4, 5, 11, 12, 13]
    loader = DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler(train))
    view, follower = followed(loader)
    assert sorted(numbers(follower.loader)) == [0, 5, 12, 13]
    view.keep(KEPT, BACK)
    follower.refresh()
    assert sorted(numbers(follower.loader)) == train
    refilled = collections.Counter(numbers(followed(loader, refill=True)[1].loader))
    assert set(refilled) == {0, 5, 12, 13} and sum(refilled.values()) == len(train)


def test_subset_inside_a_batch_sampler_is_found():
    loader = DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([7, 3, 5]), 2, False))
    assert population_of(loader).tolist() == [7, 3, 5]
    assert sorted(numbers(followed(loader)[1].loader)) == [5, 7]


class Twice(Sampler):
    """A user's sampler around another one, under a name of its own."""

    def __init__(self, base):
        self.base = base

    def __iter__(self):
        for _ in range(2):
            yield from self.base

    def __len__(self):
        return 2 * len(self.base)


@pytest.mark.parametrize("how", ["own wrapper", "two processes", "skipped batches"])
def test_a_subset_is_found_under_whatever_name_a_sampler_holds_it(how):
    train = [0, 3, 4, 5, 11, 12, 13]
    loader = DataLoader(DATA, batch_size=1, sampler=SubsetRandomSampler(train))
    batches = loader.batch_sampler
    if how == "own wrapper":
        loader = DataLoader(DATA, batch_size=1, sampler=Twice(loader.sampler))
    elif how == "two processes":
        loader = DataLoader(DATA, batch_sampler=BatchSamplerShard(batches, num_processes=2, process_index=1))
    else:
        loader = DataLoader(DATA, batch_sampler=SkipBatchSampler(batches, skip_batches=1))
    assert population_of(loader).tolist() == train
    assert set(numbers(followed(loader)[1].loader)) <= {0, 5, 12, 13}


def test_a_sampler_of_two_subsets_is_refused():
    both = Twice(SubsetRandomSampler([1, 2]))
    both.other = SubsetRandomSampler([5, 6])
    with pytest.raises(DataError, match="it draws from 2 subsets"):
        population_of(DataLoader(DATA, sampler=both))


class Part(Backwards):
    """A user's sampler for a part of the data set."""

    def __init__(self, data_source, start, stop):
        super().__init__(data_source)
        self.start, self.stop = start, stop


class Endless(DataLoader):
    """A user's loader that keeps one iterator for all epochs."""

    def __init__(self, dataset, **settings):
        super().__init__(dataset, **settings)
        self.iterator = super().__iter__()

    def __iter__(self):
        return self.iterator


class OnDevice(DataLoader):
    """A user's loader that takes the data set's arrays and never asks it again."""

    def __init__(self, dataset, **settings):
        super().__init__(dataset, **settings)
        self.images, self.labels = dataset.tensors

    def __iter__(self):
        return iter(zip(self.images, self.labels, strict=True))


@pytest.mark.parametrize("loader", [lambda: Endless(DATA), lambda: OnDevice(TensorDataset(*torch.ones(2, 20)))])
def test_a_loader_that_reads_past_its_data_set_is_refused(loader):
    with pytest.raises(DataError, match=r"cannot rebuild the loader .* which reads the data set by itself"):
        followed(loader())


def test_a_loader_that_holds_its_data_set_twice_holds_the_view_twice():
    loader = DataLoader(DATA, batch_size=3)
    loader.train_set = DATA
    view, follower = followed(loader)
    assert follower.loader.train_set is view and loader.train_set is DATA


@pytest.mark.parametrize("refill", [False, True])
def test_samples_of_weight_zero_are_not_drawn_where_none_comes_twice(refill):
    weights = [float(i < 10) for i in range(20)]
    loader = DataLoader(DATA, sampler=WeightedRandomSampler(weights, 10, replacement=False))
    drawn = numbers(followed(loader, refill=refill)[1].loader)
    assert set(drawn) == {i for i in range(10) if i not in (3, 4)}


@pytest.mark.parametrize("refill", [False, True])
def test_weights_follow_the_kept_samples(refill):
    weights = torch.arange(20.0) ** 2
    loader = DataLoader(DATA, batch_size=8, sampler=WeightedRandomSampler(weights, 40, generator=generator()))
    view, follower = followed(loader, refill=refill)
    sampler = follower.loader.sampler
    assert sampler.generator is loader.sampler.generator and sampler.num_samples == (40 if refill else 32)
    by_sample = torch.zeros(20, dtype=torch.float64).index_add_(0, torch.from_numpy(view.positions), sampler.weights)
    expected = weights.double()
    expected[[3, 4, 11, 17]] = 0
    torch.testing.assert_close(by_sample, expected)
    assert set(numbers(follower.loader)) <= set(KEPT.tolist())


def test_weights_that_leave_nothing_are_refused():
    weights = [1.0 if i in (3, 4) else 0.0 for i in range(20)]
    with pytest.raises(DataError, match="every kept sample has the sampling weight 0"):
        followed(DataLoader(DATA, sampler=WeightedRandomSampler(weights, 20)))


def test_a_number_of_samples_per_epoch_is_shortened_in_proportion_and_comes_back():
    loader = DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, replacement=True, num_samples=100))
    view, follower = followed(loader)
    assert len(numbers(follower.loader)) == 80
    view.keep(KEPT, BACK)
    follower.refresh()
    assert len(numbers(follower.loader)) == 100


def test_shares_of_two_processes_cover_the_kept_samples_and_the_epoch_is_kept_through_a_refresh():
    parts, orders = [], []
    for rank in range(2):
        loader = DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 2, rank))
        loader.sampler.set_epoch(4)
        _, follower = followed(loader)
        assert follower.loader.sampler.epoch == 4
        orders.append(numbers(follower.loader))
        parts += orders[-1]
        follower.loader.sampler.set_epoch(6)
        follower.refresh()
        assert follower.loader.sampler.epoch == 6
    assert sorted(parts) == KEPT.tolist() and len(orders[0]) == len(orders[1]) == 8


class OnePerProcess(DistributedSampler):
    """A user's own: everything in order, and a setting that happens to be the number of samples."""

    def __iter__(self):
        return iter(range(self.rank, len(self.dataset), self.num_replicas))


def test_a_distributed_sampler_of_the_user_s_gets_the_length_of_what_is_kept():
    loader = DataLoader(DATA, batch_size=1, sampler=OnePerProcess(DATA, 2, 0, seed=len(DATA)))
    _, follower = followed(loader)
    assert type(follower.loader.sampler) is OnePerProcess
    assert len(follower.loader) == -(-len(KEPT) // 2) and numbers(follower.loader) == KEPT[::2].tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stateful_loader_that_was_asked_for_its_state_goes_on_in_mid_epoch(shuffle):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def protected():
        loader = torchdata.StatefulDataLoader(DATA, batch_size=3, shuffle=shuffle, generator=generator())
        loader.state_dict()  # accelerate's prepare does that: an iterator over everything waits then
        return followed(loader)[1].loader

    whole, stopped, resumed = protected(), protected(), protected()
    batches = [batch[0].tolist() for batch in whole]
    assert sorted(number for batch in batches for number in batch) == KEPT.tolist()
    iterator = iter(stopped)
    before = [next(iterator)[0].tolist() for _ in range(2)]
    resumed.load_state_dict(stopped.state_dict())
    assert before + [batch[0].tolist() for batch in resumed] == batches
    assert sorted(numbers(resumed)) == KEPT.tolist()


class Reordered(Sampler):
    """Draws its order when it is told the epoch."""

    def __init__(self, data):
        self.data, self.order = data, None

    def set_epoch(self, epoch):
        self.order = [(position + epoch) % len(self.data) for position in range(len(self.data))]

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.data)


def test_a_sampler_that_has_drawn_its_order_meanwhile_is_followed_through_a_refresh():
    loader = DataLoader(DATA, batch_size=3, sampler=Reordered(DATA))
    view, follower = followed(loader)
    loader.sampler.set_epoch(2)
    assert sorted(numbers(follower.loader)) == KEPT.tolist()
    view.keep(KEPT, BACK)
    follower.refresh()
    loader.sampler.set_epoch(3)
    assert sorted(numbers(follower.loader)) == list(range(20))


class OfTheFirst(Sampler):
    """Trains on the first samples: so many as it worked out, or what share of them."""

    def __init__(self, data, count=None, share=None):
        self.data, self.count, self.share = data, count, share

    def __iter__(self):
        return iter(torch.randperm(self.count or int(self.share * len(self.data))).tolist())

    def __len__(self):
        return self.count or int(self.share * len(self.data))


class AnyOf(Sampler):
    """Draws with replacement, as often as it was told to."""

    def __init__(self, data, draws):
        self.data, self.draws = data, draws

    def __iter__(self):
        for _ in range(self.draws):
            yield int(torch.randint(len(self.data), ()))


@pytest.mark.parametrize("part", [{"count": 1000}, {"share": 0.8}, {"count": 1999}])
def test_a_sampler_that_keeps_to_a_part_of_the_data_is_refused(part):
    data = TensorDataset(torch.arange(2000), torch.zeros(2000))
    state = torch.get_rng_state()
    with pytest.raises(DataError, match=r"OfTheFirst .* draws from a part of the data set, or by numbers"):
        Follower(DataLoader(data, 10, sampler=OfTheFirst(data, **part)), LiveView(data, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("draws", [500, 5000])
def test_a_sampler_that_draws_anywhere_is_followed(draws):
    data = TensorDataset(torch.arange(2000), torch.zeros(2000))
    view = LiveView(data, 1)
    follower = Follower(DataLoader(data, 10, sampler=AnyOf(data, draws)), view)
    view.keep(np.arange(0, 2000, 2))
    follower.refresh()
    drawn = torch.cat([numbers for numbers, _ in follower.loader])
    assert len(drawn) == draws and not (drawn % 2).any() and drawn.max() > 1900


def test_a_refresh_leaves_what_was_set_on_our_samplers():
    view, follower = followed(DataLoader(DATA, batch_sampler=Paired(Backwards(DATA), 3, gap=0.5)))
    follower.loader.batch_sampler.gap = 0.25
    view.keep(KEPT, BACK)
    follower.refresh()
    assert follower.loader.batch_sampler.gap == 0.25 and sorted(numbers(follower.loader)) == list(range(20))


def test_batches_of_one_s_own_are_drawn_from_a_subset_and_from_no_part_of_it():
    class Pairs(BatchSampler):
        def __init__(self, sampler, upto=None):
            super().__init__(sampler, 2, False)
            self.upto = upto

        def __iter__(self):
            yield from islice(super().__iter__(), self.upto)

    loader = DataLoader(DATA, batch_sampler=Pairs(SubsetRandomSampler(range(len(DATA) // 2))))
    view = LiveView(DATA, 1, population_of(loader))
    follower = Follower(loader, view)
    view.keep(np.arange(3, len(DATA)))
    follower.refresh()
    assert sorted(int(i) for batch in follower.loader.batch_sampler for i in batch) == list(range(len(view)))
    with pytest.raises(DataError, match="Pairs without the flagged samples, it draws from a part"):
        data = [(row, row % 2) for row in range(1000)]
        Follower(DataLoader(data, batch_sampler=Pairs(SequentialSampler(data), 100)), LiveView(data, 1))


def test_a_sampler_that_is_protected_again_and_again_keeps_no_track_of_loaders_that_are_gone():
    loader = DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 1, 0))
    Follower(loader, LiveView(DATA, 1))
    assert "set_epoch" not in vars(loader.sampler)  # nothing was left out: it is as it was
    for _ in range(2):
        view, follower = followed(loader)
        del view, follower
        gc.collect()
    _, follower = followed(loader)
    told = vars(loader.sampler)["set_epoch"]
    assert told.live() is follower.loader.sampler and not hasattr(told.own, "live")
    copy.deepcopy(loader.sampler).set_epoch(3)
    loader.sampler.set_epoch(4)
    assert follower.loader.sampler.epoch == loader.sampler.epoch == 4


def test_a_seeded_sampler_of_a_host_draws_as_many_in_proportion():
    class Seeded(RandomSampler):
        """As accelerate's."""

    ours = followed(DataLoader(DATA, batch_size=5, sampler=Seeded(DATA, replacement=True, num_samples=100)))[1].loader
    assert type(ours.sampler) is Seeded and len(numbers(ours)) == 80


def test_a_sampler_object_stays_the_same_through_a_refresh():
    view, follower = followed(DataLoader(DATA, batch_size=3, shuffle=True))
    sampler, batch_sampler = follower.loader.sampler, follower.loader.batch_sampler
    view.keep(KEPT, BACK)
    follower.refresh()
    assert follower.loader.sampler is sampler and follower.loader.batch_sampler is batch_sampler
    assert batch_sampler.sampler is sampler


@pytest.mark.parametrize(
    "loader, reason",
    [
        (lambda: DataLoader(DATA, sampler=Frozen(list(range(20)))), "Frozen .* because of its attribute 'indices'"),
        (lambda: DataLoader(DATA, sampler=Part(DATA, 0, 10)), "Part .* because of its attribute 'stop'"),
        (lambda: DataLoader(DATA, sampler=FrozenLength(DATA)), "FrozenLength .* because of its attribute 'length'"),
        (lambda: DataLoader(DATA, sampler=Backwards(range(20))), "Backwards .* because of its attribute 'data_source'"),
        (lambda: DataLoader(DATA, sampler=SequentialSampler(range(7))), "SequentialSampler .* 'data_source'"),
        (lambda: DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 7, 7)), "WeightedRandomSampler .* 'weights'"),
        (lambda: DataLoader(DATA, sampler=range(20)), "cannot rebuild the sampler range"),
        (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]), "cannot rebuild the sampler list"),
    ],
)
def test_samplers_that_cannot_be_rebuilt_are_refused_with_a_way_out(loader, reason):
    with pytest.raises(DataError, match=rf"(?s){reason}.*result\.apply\(dataset\)"):
        followed(loader())


class Stream(IterableDataset):
    def __iter__(self):
        yield 1, 0


def test_loaders_without_positions_are_refused():
    with pytest.raises(DataError, match="no positions to flag: use a map-style"):
        open_loader(DataLoader(Stream()))
    with pytest.raises(DataError, match="expected a torch DataLoader, got list"):
        open_loader([1, 2])


def test_a_host_s_loader_is_opened_by_its_adapter(monkeypatch):
    class Prefetching:
        __module__ = "timm.data.loader"

        def __init__(self, loader):
            self.loader = loader

    adapter = SimpleNamespace(open_loader=lambda loader: HostLoader(loader.loader, Prefetching))
    monkeypatch.setitem(HOSTS, "timm", "an_adapter")
    monkeypatch.setitem(sys.modules, "an_adapter", adapter)
    inner = DataLoader(DATA)
    host = open_loader(Prefetching(inner))
    assert host.inner is inner and type(host.rebuild(inner)) is Prefetching
    monkeypatch.setitem(HOSTS, "timm", "trainguard.no_such_adapter")
    with pytest.raises(DataError, match="protect the torch DataLoader before it is handed to timm"):
        open_loader(Prefetching(inner))


def test_a_plain_loader_is_its_own_core():
    loader = DataLoader(DATA)
    host = open_loader(loader)
    assert host.inner is loader and host.rebuild(7) == 7 and host.pixel_range is None and host.dataset is DATA


class Stacked(DataLoader):
    """A user's fast loader: it reads everything once, and goes through that."""

    def __init__(self, dataset, keep):
        super().__init__(dataset, 4)
        self.all = keep(torch.stack([torch.tensor(dataset[i]) for i in range(len(dataset))]))

    def __iter__(self):
        return iter(self.all)


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: (x, 1), lambda x: {"x": x.numpy()}, TensorDataset, list])
def test_a_loader_that_goes_through_a_copy_of_its_own_is_refused(keep):
    with pytest.raises(DataError, match="attribute 'all', which reads the data set by itself"):
        Follower(Stacked(Numbers(), keep), LiveView(Numbers(), 1))


def test_a_batch_may_be_as_large_as_the_data_set():
    data = Numbers()
    loader = DataLoader(data, batch_sampler=Paired(SequentialSampler(data), 20, 0))
    view = LiveView(data, 1)
    follower = Follower(loader, view)
    view.keep(KEPT)
    follower.refresh()
    assert [batch[0].tolist() for batch in follower.loader] == [KEPT.tolist()]


def test_what_a_host_builds_anew_is_built_of_the_view():
    """Lightning writes down the arguments of what is built in a hook, and later builds it again with some exchanged."""
    data = Numbers()
    sampler = RandomSampler(data)
    loader = DataLoader(data, 4, sampler=sampler)
    vars(sampler).update(__pl_saved_args=(data,), __pl_saved_kwargs={}, __pl_saved_arg_names=("data_source",))
    vars(loader).update(__pl_saved_args=(data, 4), __pl_saved_kwargs={"sampler": sampler})
    view = LiveView(data, 1)
    ours = vars(Follower(loader, view).loader)
    assert ours["__pl_saved_args"] == (view, 4) and ours["__pl_saved_kwargs"] == {"sampler": ours["sampler"]}
    assert vars(ours["sampler"])["__pl_saved_args"] == (view,) and vars(loader)["__pl_saved_args"] == (data, 4)


def test_a_loader_that_makes_its_own_data_set_is_not_built_anew_from_its_arguments():
    class Own(DataLoader):
        def __init__(self, size):
            super().__init__(Numbers(), 4)

    loader = Own(20)
    vars(loader).update(__pl_saved_args=(20,), __pl_saved_kwargs={}, __pl_attrs_record=[])
    ours = vars(Follower(loader, LiveView(loader.dataset, 1)).loader)
    assert not [name for name in ours if name.startswith("__pl_")]
