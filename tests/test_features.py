import torch
from torch import nn

from trainguard.features import classifier_layer, watched


class TwoHeads(nn.Module):
    """A head, and one for training alone that is defined last."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.beside = nn.Flatten(), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        seen = self.body(x)
        return self.head(seen) + (0 * self.beside(seen) if self.training else 0)


def test_the_classifier_layer_is_the_last_of_that_width_that_runs():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)), torch.rand(2, 1, 4, 4)
    assert classifier_layer(net, 3, x) is net[2] and classifier_layer(net, 4, x) is None
    two = TwoHeads()
    assert classifier_layer(two, 3, x) is two.head
    assert two.training and not two.head._forward_pre_hooks and all(p.requires_grad for p in two.parameters())
    assert classifier_layer(nn.Sequential(nn.Flatten(), nn.ModuleList([nn.Linear(9, 3)] * 2)[:0]), 3, x) is None


def test_features_are_what_enters_the_last_layer():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)), torch.rand(4, 1, 4, 4)
    with watched(classifier_layer(net, 3, x)) as tap, torch.no_grad():
        logits = net(x)
        assert torch.equal(tap.read(logits), net[1](net[0](x)))
        assert torch.equal(tap.read(logits), logits)  # the layer has not run since
    assert not net[2]._forward_pre_hooks
    with watched(None) as tap:
        assert torch.equal(tap.read(logits), logits)


def test_of_a_model_that_looks_twice_at_an_image_the_logits_are_the_features():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(4, 1, 4, 4)
    with watched(net[1]) as tap, torch.no_grad():
        logits = net(torch.cat([x, x.flip(3)])).view(2, 4, 3).mean(0)
        assert torch.equal(tap.read(logits), logits)
