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


def test_cleanest_takes_the_top_share_in_ascending_order():
    similarity = np.array([0.1, 0.9, np.nan, 0.5, 0.8], dtype=np.float32)
    assert cleanest(similarity, 0.4).tolist() == [1, 4]
    assert cleanest(similarity, 0.8).tolist() == [0, 1, 3, 4]
    assert cleanest(similarity, 0.01).tolist() == [1]
    assert cleanest(similarity, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_cleanest_gives_ties_to_the_earlier_image():
    assert cleanest(np.ones(10), 0.3).tolist() == [0, 1, 2]


def test_cleanest_follows_a_permutation():
    rng = np.random.default_rng(0)
    similarity, order = rng.random(40), rng.permutation(40)
    assert set(order[cleanest(similarity[order], 0.25)]) == set(cleanest(similarity, 0.25))


def test_overlap_is_intersection_over_union():
    assert overlap(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    assert overlap(np.array([1, 2]), np.array([2, 1])) == 1.0
    assert overlap(np.array([1]), np.array([2])) == 0.0


def test_precision_and_recall_of_a_known_ranking():
    precision, recall = precision_recall(np.array([0.1, 0.9, 0.5, 0.8]), np.array([True, True, False, False]))
    np.testing.assert_allclose(precision, [1, 1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_allclose(recall, [1 / 2, 1 / 2, 1 / 2, 1])
