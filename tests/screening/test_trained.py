from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import trainguard
from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.distributed import Processes
from trainguard.models import UnitPixels
from trainguard.screening import separating
from trainguard.screening.classes import Classes
from trainguard.screening.probe import MOST_FEATURES, Trained

RANGE = PixelRange.from_mean_std((0.5,), (0.25,))


def test_features_of_a_given_model_are_what_its_last_layer_sees():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU()), nn.Linear(7, 3)
    x = torch.rand(5, 1, 8, 8)
    probe = Trained(UnitPixels(nn.Sequential(body, head), RANGE), 3, x)
    inside = body(RANGE.to_model(x))
    torch.testing.assert_close(probe.features(x), inside)
    torch.testing.assert_close(probe(x), head(inside))
    assert not head._forward_pre_hooks

    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](x))

    torch.testing.assert_close(Trained(UnitPixels(Named(body, head), RANGE), 3, x).features(x), inside)


def test_without_a_last_layer_the_logits_are_the_features_and_wide_ones_are_summed_up():
    x = torch.rand(5, 1, 8, 8)
    flat = Trained(UnitPixels(nn.Flatten(), RANGE), 3, x)
    torch.testing.assert_close(flat.features(x), RANGE.to_model(x).flatten(1))
    wide = Trained(UnitPixels(nn.Flatten(), RANGE), 3, x)
    big = torch.rand(4, 1, 40, 40)
    assert wide.features(big).shape == (4, MOST_FEATURES)
    assert torch.equal(wide.features(big), wide.features(big))


def test_a_model_of_more_classes_than_the_data_have_is_read_before_its_last_layer(images, labels):
    net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 7), nn.ReLU(), nn.Linear(7, 20))
    store = open_images(torch.utils.data.TensorDataset(images, labels))
    probe = separating._learned(
        SimpleNamespace(trained=net, store=store, device=torch.device("cpu"), processes=Processes())
    )
    assert probe.features(store.batch([0, 1])).shape == (2, 7) and probe(store.batch([0])).shape == (1, 20)


@pytest.mark.parametrize("wrong", [{"model": None}, {"preset": "paper"}, {"model": "resnet10t"}])
def test_a_trained_model_has_to_be_there_and_needs_our_own_variant(wrong, images, labels):
    data = torch.utils.data.TensorDataset(images, labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    with pytest.raises(ValueError, match="trained=True needs the model"):
        trainguard.screen(data, **{"model": model} | wrong, trained=True, progress=False)


def test_firmness_is_how_well_a_part_is_known_beside_the_rest_of_its_class():
    store = SimpleNamespace(labels=np.array([1, 0, 1, -1, 1, 0]), readable=np.array([0, 1, 2, 4, 5]))  # 3 is broken
    known = np.log(np.array([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.5, 0.5], [0.9, 0.1]]))
    classes = Classes(
        SimpleNamespace(store=store), None, known.astype(np.float32), None, None, 8, None, np.array([2, 3])
    )
    assert classes.firmness(1, np.array([False, True, True])) == pytest.approx(0.4 / 0.9, rel=1e-4)
    assert classes.firmness(1, np.array([True, False, False])) == pytest.approx(0.9 / 0.4, rel=1e-4)


def test_disbelief_is_how_many_labels_are_not_believed_beside_other_classes():
    store = SimpleNamespace(labels=np.array([1, 0, 1, -1, 1, 0, 2, 2]), readable=np.array([0, 1, 2, 4, 5, 6, 7]))
    known = np.array([[1, 98, 1], [98, 1, 1], [98, 1, 1], [1, 98, 1], [98, 1, 1], [1, 98, 1], [1, 1, 98]]) / 100
    classes = Classes(
        SimpleNamespace(store=store), None, np.log(known).astype(np.float32), None, None, 8, None, np.array([2, 3, 2])
    )
    assert classes.disbelieved == pytest.approx([0, 1 / 3, 1 / 2])
    assert classes.disbelief(1) == pytest.approx((1 / 3) / 0.25)  # the median of none and a half
    assert classes.disbelief(2) == pytest.approx((1 / 2) / (1 / 6))
