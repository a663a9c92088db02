"""Whether a part is of its class, by what a probe says that has learned neither."""

import numpy as np
import pytest

from trainguard.screening.resemblance import resemblance


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("skill", [1.0, 3.0])  # of a weak probe, and of a good one
def test_resemblance_tells_hard_images_of_a_class_from_other_classes_images(classes, skill):
    rng = np.random.default_rng(0)

    def answers(truth, sight):
        found = rng.normal(size=(len(truth), classes))
        found[np.arange(len(truth)), truth] += skill * sight
        return found.astype(np.float32)

    labels = np.repeat(np.arange(classes), 200)
    held = answers(labels, 1.0)
    others = rng.integers(1, classes, 400)
    poison, own = answers(others, 1.0), answers(np.zeros(400, int), 1.0)
    hard = answers(others, 1.0)
    hard[:, 0] += 0.6 * skill  # they show something else, and a little of what they are
    values = [resemblance(part, held, labels, 0) for part in (poison, hard, own)]
    assert abs(values[0]) < 0.35 < values[1] < values[2] and abs(values[2] - 1) < 0.35


def test_resemblance_of_a_few_samples_is_said_with_less_certainty():
    rng = np.random.default_rng(0)
    held, labels = rng.normal(size=(100, 4)).astype(np.float32), np.repeat(np.arange(4), 25)
    held[np.arange(100), labels] += 2
    few = np.mean([resemblance(held[labels == 1][k : k + 5], held, labels, 0) for k in range(0, 25, 5)])
    assert few > resemblance(held[labels == 1], held, labels, 0) + 0.05


def test_resemblance_is_none_where_there_is_nothing_to_compare_with():
    some = np.eye(3, dtype=np.float32)
    assert resemblance(some[1:], some[:1], np.array([0]), 0) == 0.0
    assert resemblance(some[1:], some[1:], np.array([1, 2]), 0) == 0.0
