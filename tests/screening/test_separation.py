"""Classes in two parts: what a line finds, and what it must not."""

from dataclasses import replace

import numpy as np
import pytest

from trainguard.screening.finding import Finding
from trainguard.screening.separation import (
    Split,
    _first,
    _read_off,
    _two_gaussians,
    leaning,
    shared_direction,
    split_class,
)
from trainguard.screening.settings import Settings
from trainguard.screening.whitening import Whitening

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def heaps(n=600, share=0.3, gap=6.0, seed=0, size=40):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size))
    second = rng.random(n) < share
    x[second, 0] += gap
    return x, second


def test_split_finds_two_heaps():
    x, second = heaps()
    split = split_class(x, seed=0)[0]
    agreement = (split.upper == second).mean()
    assert max(agreement, 1 - agreement) > 0.98
    assert split.distance > 4 and split.valley < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_one_cloud_has_no_wide_gap(seed):
    x = np.random.default_rng(seed).normal(size=(600, 40))
    assert all(split.gap < 2.5 for split in split_class(x, seed))  # 5.8 where two heaps lie six apart


def test_split_finds_a_small_heap_across_the_widest_directions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 40)) * np.r_[np.full(8, 4.0), np.ones(32)]
    small = np.arange(1000) < 60
    x[small, 9] += 9
    found = split_class(x, seed=0)
    assert any(abs(np.corrcoef(split.upper, small)[0, 1]) > 0.95 and split.distance > 5 for split in found)


def test_split_finds_two_triggers_of_one_class():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 40))
    one, two = np.arange(1000) < 120, np.arange(1000) >= 880
    x[one, 0] += 10
    x[two, 1] += 9
    far = [s for s in split_class(x, seed=0) if Finding(0, np.arange(1000), s).is_candidate(Settings())]
    found = [split.upper if split.upper.mean() < 0.5 else ~split.upper for split in far]
    either = np.logical_or.reduce([upper for upper in found if upper.mean() < 0.3])
    assert (either[one | two]).mean() > 0.98 and either[~(one | two)].mean() < 0.05


def test_what_several_classes_share_is_a_direction_and_what_two_share_is_not():
    rng = np.random.default_rng(0)
    trigger = np.eye(40)[0]
    lines = [(label, trigger + 0.2 * rng.normal(size=40)) for label in (2, 5, 7)]
    lines += [(label, rng.normal(size=40)) for label in (0, 1, 2, 5, 9)]
    lines = [(label, line / np.linalg.norm(line)) for label, line in lines]
    common, sharing = shared_direction(lines)
    assert sharing == {2, 5, 7} and common @ trigger / np.linalg.norm(common) > 0.75
    assert shared_direction([line for line in lines if line[0] != 7]) == (None, frozenset())
    assert shared_direction([(4, line) for _, line in lines]) == (None, frozenset())  # one class, however often
    assert shared_direction([]) == (None, frozenset())


def test_the_direction_of_a_split_points_at_its_smaller_part():
    x, second = heaps(share=0.2)
    for split in (Split(second * 1.0, second * 1.0, 6.0, 0.0), Split(second * -1.0, ~second * 1.0, 6.0, 0.0)):
        assert split.direction(x)[0] > 0.95 and np.linalg.norm(split.direction(x)) == pytest.approx(1)


def test_an_order_leads_to_a_heap_that_no_guess_finds():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 60)) * np.r_[np.full(20, 3.0), np.ones(40)]
    small = np.arange(1000) < 60
    x[small, 20:24] += 2.2
    order = x[:, 20:24].sum(1) + 2 * rng.normal(size=1000)

    def best(splits):
        return max((abs(np.corrcoef(split.upper, small)[0, 1]) for split in splits), default=0.0)

    assert best(split_class(x, 0)) < 0.3 and best(split_class(x, 0, [order])) > 0.7


def test_suspicion_reaches_beyond_the_upper_part_but_not_into_the_lower():
    x, second = heaps(gap=4.5)
    split = split_class(x, seed=0)[0]
    split = split if (split.upper == second).mean() > 0.5 else split.turned()
    flagged = split.suspicion > 0.5
    assert flagged[split.upper].all() and flagged.sum() > split.upper.sum()
    assert flagged[second].mean() >= split.upper[second].mean() and flagged[~second].mean() < 0.1
    order = np.argsort(split.position)
    assert (np.diff(split.suspicion[order]) >= 0).all()


def test_where_all_poison_is_known_the_tail_of_the_lower_part_is_its_own():
    rng = np.random.default_rng(0)
    low = np.concatenate([rng.normal(0, 0.1, 900), rng.uniform(0, 2, 100)])  # most are sure, some are hard
    position = np.concatenate([low, rng.normal(8, 0.5, 500)])
    upper = np.arange(1500) >= 1000
    apart = Split(position, upper.astype(float), 9.0, 0.0)
    whole = replace(apart, whole=True)
    before, now = ((split.suspicion > 0.5) for split in (apart, whole))
    assert before[upper].all() and now[upper].all()
    assert now[~upper].sum() < 0.75 * before[~upper].sum()
    assert not whole.turned().whole and whole.subset(upper).whole


def test_split_probability_never_falls_along_the_line():
    x, _ = heaps(gap=3.0)
    split = split_class(x, seed=0)[0]
    order = np.argsort(split.position)
    assert (np.diff(split.probability[order]) >= 0).all()


def read_off(position):
    return _read_off(position, *(part[0] for part in _two_gaussians(position[None])))


def test_a_line_is_read_alone_as_among_others():
    rng = np.random.default_rng(0)
    lines = [rng.normal(0, 1, 300), np.r_[rng.normal(0, 1, 280), rng.normal(9, 1, 20)], np.full(300, 2.0)]
    together = _two_gaussians(np.stack(lines))
    for k, line in enumerate(lines):
        for part, alone in zip(together, _two_gaussians(line[None]), strict=True):
            np.testing.assert_allclose(part[k], alone[0], rtol=1e-9)
    np.testing.assert_allclose(np.sort(together[1][1]), [0, 9], atol=0.5)


def test_a_sample_far_out_changes_nobody_elses_part():
    rng = np.random.default_rng(0)
    position = np.r_[rng.normal(0, 1, 900), rng.normal(8, 3, 100), -14.0]  # the wide part reaches past the narrow one
    split = read_off(position)
    assert (split.probability[:900] > 0.05).mean() < 0.1 and split.probability[-1] < 0.05
    assert split.probability[900:1000].mean() > 0.9
    turned = read_off(-position)
    assert (turned.probability[:900] > 0.95).mean() > 0.9 and turned.probability[-1] > 0.95


def test_turning_a_split_twice_gives_it_back():
    split = Split(np.array([1.0, -1.0]), np.array([0.9, 0.2]), 4.0, 0.1)
    again = split.turned().turned()
    assert np.array_equal(again.position, split.position) and np.allclose(again.probability, split.probability)


def test_whitening_makes_the_spread_within_classes_round():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=3000)
    features = rng.normal(size=(3000, 6)) * [1, 2, 3, 4, 5, 6] + rng.normal(size=(3000, 1)) + labels[:, None]
    white = Whitening.fit(features.astype(np.float32), labels)(features.astype(np.float32))
    for k in range(3):
        white[labels == k] -= white[labels == k].mean(0)
    assert np.allclose(np.cov(white.T), np.eye(6), atol=0.25)


def test_a_feature_that_was_dead_where_it_was_learned_does_not_rule_what_comes_later():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=600)
    features = rng.normal(size=(600, 6)).astype(np.float32)
    features[:, 0] = 0
    whitening = Whitening.fit(features, labels)
    later = features[:20].copy()
    later[0, 0] = 1.0  # the first sample it answers to
    assert np.allclose(whitening(later), whitening(features[:20]))
    later[0, 1] = 1e4
    assert np.abs(whitening(later)).max() < 40


def test_split_finds_a_heap_by_a_fifth_of_it_among_the_doubtful():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 100)) * np.r_[np.full(40, 3.0), np.ones(60)]
    small = np.arange(1000) < 80
    x[small, 50] += 4.5
    doubt = rng.normal(size=1000) + 0.8 * small

    def found(splits):
        return max((abs(np.corrcoef(split.upper, small)[0, 1]) for split in splits), default=0.0)

    assert found(split_class(x, 0)) < 0.5
    assert found(split_class(x, 0, [doubt])) > 0.85


def test_a_fold_of_a_small_class_is_no_part_of_it():
    """One line may part the samples that it is drawn from far better than the others do theirs: a guess of theirs."""
    for seed in range(4, 7):
        x = np.random.default_rng(seed).normal(size=(200, 400))
        x -= x.mean(0)
        x = x @ np.linalg.svd(x, full_matrices=False)[2][:40].T
        fold = np.random.default_rng(seed).permutation(200) % 4
        for split in split_class(x, seed):
            assert max(abs(np.corrcoef(split.upper, fold == k)[0, 1]) for k in range(4)) < 0.9


def test_where_a_sample_leans_is_read_without_it():
    rng = np.random.default_rng(1)
    noise, part = rng.normal(size=(200, 2_000)), np.arange(200) < 60
    assert abs(leaning(noise, part, 0)[part].mean() - leaning(noise, part, 0)[~part].mean()) < 3  # not from its own
    told = noise + 0.3 * part[:, None]
    places = leaning(told, part, 0)
    assert places[part].min() > places[~part].max()
    assert not leaning(noise, np.zeros(200, bool), 0).any()


@pytest.mark.parametrize("count", [1, 7, 40, 60])
def test_the_first_of_an_order_are_those_of_a_stable_sort(count):
    order = np.random.default_rng(0).integers(0, 9, 40).astype(float)  # many are equal
    expected = np.zeros(40, dtype=bool)
    expected[np.argsort(-order, kind="stable")[:count]] = True
    assert np.array_equal(_first(order, count), expected)


def test_copies_of_one_image_are_not_parted_by_what_rounding_makes_of_them():
    rng = np.random.default_rng(0)
    same = np.tile(rng.normal(size=20), (100, 1))
    assert split_class(same, 0) == []
    assert split_class(same + 1e-6 * rng.normal(size=same.shape), 0) == []
    twelve = np.tile(rng.normal(size=(12, 20)), (25, 1))  # fewer images than directions
    assert all(np.isfinite(split.gap) for split in split_class(twelve, 0))
