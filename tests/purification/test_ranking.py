import numpy as np
import torch

from trainguard.purification.ranking import cleanest, logit_similarity, overlap, precision_recall


def test_similarity_is_the_cosine_of_equation_9():
    infected = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    purified = torch.tensor([[2.0, 4.0, 4.0], [0.0, -3.0, -4.0], [0.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    torch.testing.assert_close(logit_similarity(infected, purified), torch.tensor([1.0, -1.0, 0.0, 0.8]))


def test_similarity_knows_no_scale_and_no_order_of_the_models():
    a, b = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logit_similarity(3 * a, b), logit_similarity(b, a))
    assert logit_similarity(a.bfloat16(), b.bfloat16()).dtype == torch.float32


ONE_CLASS = np.zeros(40, dtype=np.int64)


def test_cleanest_takes_the_top_share_in_ascending_order():
    similarity = np.array([0.1, 0.9, np.nan, 0.5, 0.8], dtype=np.float32)
    assert cleanest(similarity, 0.4, ONE_CLASS[:5]).tolist() == [1, 4]
    assert cleanest(similarity, 0.8, ONE_CLASS[:5]).tolist() == [0, 1, 3, 4]
    assert cleanest(similarity, 0.01, ONE_CLASS[:5]).tolist() == [1]
    assert cleanest(similarity, 1.0, ONE_CLASS[:5]).tolist() == [0, 1, 2, 3, 4]


def test_cleanest_gives_ties_to_the_earlier_image():
    assert cleanest(np.ones(10), 0.3, ONE_CLASS[:10]).tolist() == [0, 1, 2]


def test_cleanest_follows_a_permutation():
    rng = np.random.default_rng(0)
    similarity, labels, order = rng.random(40), rng.integers(0, 4, 40), rng.permutation(40)
    assert set(order[cleanest(similarity[order], 0.25, labels[order])]) == set(cleanest(similarity, 0.25, labels))


def test_cleanest_takes_every_class_alike_however_much_it_moved():
    labels = np.repeat(np.arange(3), 20)
    similarity = np.tile(np.arange(20.0), 3) / 100 + 0.03 * labels
    chosen = cleanest(similarity, 0.2, labels)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert chosen.tolist() == [16, 17, 18, 19, 36, 37, 38, 39, 56, 57, 58, 59]


def test_cleanest_leaves_the_far_end_out_even_where_it_is_most_of_a_class():
    """The target class: 10 clean images like all others, and 12 poisoned ones that purification changed most."""
    labels = np.array([0] * 22 + [1] * 50 + [2] * 50)
    similarity = np.concatenate([np.full(10, 0.9), np.full(12, 0.1), np.full(100, 0.9)])
    chosen = cleanest(similarity, 0.7, labels)
    assert chosen[:11].tolist() == [*range(10), 22]
    assert len(chosen) == 10 + 35 + 35


def test_overlap_is_intersection_over_union():
    assert overlap(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    assert overlap(np.array([1, 2]), np.array([2, 1])) == 1.0
    assert overlap(np.array([1]), np.array([2])) == 0.0


def test_precision_and_recall_of_a_known_ranking():
    precision, recall = precision_recall(np.array([0.1, 0.9, 0.5, 0.8]), np.array([True, True, False, False]))
    np.testing.assert_allclose(precision, [1, 1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_allclose(recall, [1 / 2, 1 / 2, 1 / 2, 1])
