import pytest
import torch
from torch import nn

import trainguard
from trainguard.data.pixels import PixelRange
from trainguard.models import UnitPixels
from trainguard.screening.probe import MOST_FEATURES, Trained

RANGE = PixelRange.from_mean_std((0.5,), (0.25,))


def test_features_of_a_given_model_are_what_its_last_layer_sees():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU()), nn.Linear(7, 3)
    probe = Trained(UnitPixels(nn.Sequential(body, head), RANGE), 3)
    x = torch.rand(5, 1, 8, 8)
    inside = body(RANGE.to_model(x))
    torch.testing.assert_close(probe.features(x), inside)
    torch.testing.assert_close(probe(x), head(inside))
    assert not head._forward_pre_hooks


def test_without_a_last_layer_the_logits_are_the_features_and_wide_ones_are_summed_up():
    flat = Trained(UnitPixels(nn.Flatten(), RANGE), 3)
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(flat.features(x), RANGE.to_model(x).flatten(1))
    wide = Trained(UnitPixels(nn.Flatten(), RANGE), 3)
    big = torch.rand(4, 1, 40, 40)
    assert wide.features(big).shape == (4, MOST_FEATURES)
    assert torch.equal(wide.features(big), wide.features(big))


@pytest.mark.parametrize("wrong", [{"model": None}, {"preset": "paper"}])
def test_a_trained_model_has_to_be_there_and_needs_our_own_variant(wrong, images, labels):
    data = torch.utils.data.TensorDataset(images, labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    with pytest.raises(ValueError, match="trained=True needs the model"):
        trainguard.screen(data, **{"model": model} | wrong, trained=True, progress=False)
