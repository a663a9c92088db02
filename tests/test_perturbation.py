import copy

import pytest
import torch
from torch import nn

from trainguard.perturbation import ascend, frozen, patch_mask, project, untargeted


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(n: int) -> torch.Tensor:
    return torch.rand(n, 2, generator=seeded(1))


def images(n: int = 6, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=seeded(seed))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 5)
    )


@pytest.mark.parametrize("side", [1, 3, 8, 20])
def test_patch_mask_holds_one_whole_square_per_sample(side):
    mask = patch_mask(places(50), 8, 10, side)
    assert mask.shape == (50, 1, 8, 10) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask.amax(3).sum((1, 2)) == min(side, 8)).all()
    assert (mask.amax(2).sum((1, 2)) == min(side, 10)).all()
    assert (mask.sum((1, 2, 3)) == min(side, 8) * min(side, 10)).all()


def test_patch_mask_is_a_function_of_the_sample_and_reaches_every_position():
    some = places(9)
    assert torch.equal(patch_mask(some, 8, 8, 3)[4:], patch_mask(some[4:], 8, 8, 3))
    corner = patch_mask(torch.tensor([[0.0, 0.999]]), 6, 6, 3)[0, 0]
    assert corner.sum() == 9 and corner[:3, 3:].all()
    corners = {tuple(m[0].nonzero()[0].tolist()) for m in patch_mask(places(2000), 6, 6, 3)}
    assert corners == {(i, j) for i in range(4) for j in range(4)}


def test_patch_mask_refuses_an_empty_patch():
    with pytest.raises(ValueError, match="side=0"):
        patch_mask(places(1), 8, 8, 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_on_a_linear_loss_is_the_closed_form(norm):
    """For L = <w, x> the best step of length a is a sign(w) in linf and a w/|w| in l2."""
    x, weight = torch.full((4, 3, 8, 8), 0.5), torch.randn(4, 3, 8, 8, generator=seeded())
    delta = ascend(lambda image: (image * weight).flatten(1).sum(1), x, eps=0.1, steps=1, step_size=0.07, norm=norm)
    length = weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = 0.07 * (weight.sign() if norm == "linf" else weight / length)
    torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_many_steps_on_a_linear_loss_end_on_the_border(norm):
    x, weight = torch.full((4, 3, 8, 8), 0.5), torch.randn(4, 3, 8, 8, generator=seeded())
    delta = ascend(lambda image: (image * weight).flatten(1).sum(1), x, eps=0.1, steps=9, norm=norm)
    gain = (delta * weight).flatten(1).sum(1)
    best = 0.1 * (weight.flatten(1).abs().sum(1) if norm == "linf" else weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(gain, best, rtol=1e-4, atol=1e-5)


def test_step_direction_agrees_with_finite_differences():
    net, x, y = small_net().double().eval(), images(2).double(), torch.tensor([1, 3])

    def loss(image):
        return nn.functional.cross_entropy(net(image), y, reduction="none")

    delta = ascend(loss, x, eps=1e-3, steps=1, step_size=1e-3)
    for position in [(0, 0, 2, 2), (0, 2, 5, 1), (1, 1, 4, 4), (1, 0, 7, 0)]:
        nudge = torch.zeros_like(x)
        nudge[position] = 1e-6
        rise = (loss(x + nudge) - loss(x - nudge)).sum() / 2e-6
        assert delta[position].item() == pytest.approx(1e-3 * torch.sign(rise).item(), abs=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturbation_stays_in_ball_mask_and_valid_pixels(norm):
    x, net = images(), small_net().eval()
    x[0], x[1] = 0.0, 1.0
    mask = patch_mask(places(6), 8, 8, 5)
    y = torch.arange(6) % 5
    delta = ascend(
        lambda image: nn.functional.cross_entropy(net(image), y, reduction="none"),
        x, eps=0.2, steps=4, step_size=0.15, norm=norm, mask=mask,
    )  # fmt: skip
    size = delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert (size <= 0.2 + 1e-5).all() and (size > 0.01).all()
    assert (delta * (1 - mask)).abs().max() == 0
    assert (x + delta).min() >= 0 and (x + delta).max() <= 1
    assert not delta.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_idempotent_and_leaves_the_inside_alone(norm):
    x = images()
    delta = torch.randn(x.shape, generator=seeded(3))
    once = project(delta, x, 0.3, norm)
    torch.testing.assert_close(project(once, x, 0.3, norm), once, atol=1e-6, rtol=0)
    inside = torch.full_like(x, 1e-3)
    middle = torch.full_like(x, 0.5)
    torch.testing.assert_close(project(inside, middle, 0.3, norm), inside, atol=1e-7, rtol=0)


def test_zero_radius_and_zero_slope_give_zero():
    x = images()
    assert ascend(lambda image: image.sum(), x, eps=0.0, steps=3, norm="l2").abs().max() == 0
    assert ascend(lambda image: (image * 0).sum(), x, eps=0.1, steps=3, norm="l2").abs().max() == 0


def test_one_sample_does_not_depend_on_its_neighbours():
    net, x, y = small_net().eval(), images(), torch.arange(6) % 5
    whole = untargeted(net, x, y, norm="l2", eps=0.5)
    torch.testing.assert_close(untargeted(net, x[2:3], y[2:3], norm="l2", eps=0.5), whole[2:3], atol=1e-5, rtol=0)


def test_untargeted_raises_the_loss_of_every_sample():
    net, x, y = small_net().eval(), images(), torch.arange(6) % 5
    before = nn.functional.cross_entropy(net(x), y, reduction="none")
    after = nn.functional.cross_entropy(net(untargeted(net, x, y)), y, reduction="none")
    assert (after > before).all()


def test_frozen_restores_every_flag_and_changes_no_buffer():
    net = small_net().train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="inside"), frozen(net):
        assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
        untargeted(net, images(), torch.zeros(6, dtype=torch.long))
        raise RuntimeError("inside")
    assert modes == [m.training for m in net.modules()] and flags == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_steps_work_inside_no_grad_and_under_bf16_autocast():
    net, x, y = small_net(), images(), torch.arange(6) % 5
    with frozen(net):
        full = untargeted(net, x, y)
        with torch.no_grad():
            assert torch.equal(untargeted(net, x, y), full)
        with torch.autocast("cpu", torch.bfloat16):
            half = untargeted(net, x, y)
    assert half.dtype == torch.float32
    assert ((half - x).sign() == (full - x).sign()).float().mean() > 0.9


def test_ascend_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="eps=-1"):
        ascend(torch.sum, images(), eps=-1, steps=1)
    with pytest.raises(ValueError, match="'l1'"):
        ascend(torch.sum, images(), eps=1, steps=1, norm="l1")  # type: ignore[arg-type]
