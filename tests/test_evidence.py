import numpy as np
import pytest
import torch

from trainguard.evidence import AVERAGE_SIDE, THUMBNAIL_SIDE, Evidence, collect_evidence


class Recorded:
    """Stands for a store: random images of one shape, and a list of what was read."""

    def __init__(self, n, shape):
        self.shape = shape
        self.images = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
        self.read = []

    def batch(self, index):
        self.read += list(index)
        return self.images[torch.as_tensor(index)]

    def described(self, i):
        return f"row {i}"


def findings(n=200, k=4, flagged=40, seed=0):
    rng = np.random.default_rng(seed)
    proposed = rng.integers(0, k, n)
    suspect = np.zeros(n, dtype=bool)
    suspect[:flagged] = True
    labels = np.where(suspect, 2, proposed)
    score = rng.normal(size=n).astype(np.float32) + 5 * suspect
    return score, suspect, labels, proposed


def test_evidence_averages_are_those_of_the_flagged_samples():
    store = Recorded(200, (3, 8, 8))
    score, suspect, labels, proposed = findings()
    evidence = collect_evidence(store, score, suspect, labels, proposed)
    flagged = store.images[torch.from_numpy(suspect)].permute(0, 2, 3, 1).numpy()
    assert evidence.groups.tolist() == [2] and evidence.counts.tolist() == [40]
    np.testing.assert_allclose(evidence.flagged_mean[0], flagged.mean(0), atol=1e-6)
    np.testing.assert_allclose(evidence.flagged_var[0], flagged.var(0), atol=1e-6)


def test_evidence_cards_pair_flagged_samples_with_kept_ones():
    score, suspect, labels, proposed = findings()
    evidence = collect_evidence(Recorded(200, (1, 8, 8)), score, suspect, labels, proposed)
    for flagged, same, other in evidence.cards.tolist():
        i, j = evidence.index[flagged], evidence.index[same]
        assert suspect[i] and not suspect[j] and labels[i] == labels[j] == 2
        if proposed[i] == 2:
            assert other == -1
        else:
            k = evidence.index[other]
            assert not suspect[k] and labels[k] == proposed[i]


def test_evidence_shows_the_most_and_the_least_suspicious_flagged_sample():
    score, suspect, labels, proposed = findings(n=400, flagged=100)
    evidence = collect_evidence(Recorded(400, (1, 8, 8)), score, suspect, labels, proposed)
    shown = evidence.index[evidence.cards[:, 0]]
    members = np.flatnonzero(suspect)
    assert members[score[members].argmax()] in shown and members[score[members].argmin()] in shown


def test_evidence_borderline_samples_are_the_nearest_to_their_threshold():
    score, suspect, labels, proposed = findings()
    thresholds = np.full(4, 3.0, dtype=np.float32)
    evidence = collect_evidence(Recorded(200, (1, 8, 8)), score, suspect, labels, proposed, thresholds)
    shown = evidence.index[evidence.borderline]
    for side in (suspect, ~suspect):
        mine = shown[side[shown]]
        nearest = np.flatnonzero(side)[np.argsort(np.abs(score[side] - 3.0))[: len(mine)]]
        assert len(mine) == 12 and set(mine) == set(nearest)


def test_evidence_is_the_same_every_time_and_moves_no_random_stream():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    once, twice = (collect_evidence(Recorded(200, (3, 8, 8)), *findings()).to_arrays() for _ in range(2))
    for name in once:
        np.testing.assert_array_equal(once[name], twice[name])
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_evidence_survives_a_file(tmp_path):
    evidence = collect_evidence(Recorded(200, (3, 8, 8)), *findings())
    np.savez(tmp_path / "e.npz", **evidence.to_arrays())
    with np.load(tmp_path / "e.npz", allow_pickle=False) as arrays:
        again = Evidence.from_arrays(dict(arrays))
    for name, value in evidence.to_arrays().items():
        np.testing.assert_array_equal(getattr(again, name), value)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 512, 300)])
def test_evidence_of_any_image_size_is_small(shape):
    evidence = collect_evidence(Recorded(200, shape), *findings())
    assert max(evidence.thumbnails.shape[1:3]) == min(THUMBNAIL_SIDE, max(shape[1:]))
    assert max(evidence.flagged_mean.shape[1:3]) == min(AVERAGE_SIDE, max(shape[1:]))
    assert evidence.thumbnails.shape[-1] == shape[0]


def test_evidence_reads_a_bounded_number_of_images():
    n = 50_000
    store = Recorded(n, (1, 2, 2))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, n)
    suspect = rng.random(n) < 0.5
    collect_evidence(store, rng.normal(size=n).astype(np.float32), suspect, labels, labels)
    assert len(store.read) <= 6 * 2 * 1000 + 48 * 3 + 24


def test_evidence_with_nothing_flagged_has_the_borderline_alone():
    score, _, labels, proposed = findings()
    evidence = collect_evidence(Recorded(200, (1, 8, 8)), score, np.zeros(200, dtype=bool), labels, proposed)
    assert len(evidence.cards) == 0 and len(evidence.groups) == 0
    top = np.argsort(-score)[:24]
    assert set(evidence.index[evidence.borderline]) == set(top)


def test_evidence_leaves_unreadable_samples_alone():
    score, suspect, labels, proposed = findings()
    score[150], labels[150], proposed[150] = np.nan, -1, -1
    store = Recorded(200, (1, 8, 8))
    evidence = collect_evidence(store, score, suspect, labels, proposed)
    assert 150 not in store.read and "row 150" in evidence.names
