"""One table of invariants for every attack of the zoo, and the rules that make it up."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainguard.draws import draws
from trainguard.drill import craft, pictures, triggers
from trainguard.drill.labels import keep, shift, to
from trainguard.drill.poison import Attack, Poisoned, Role, Rule, fitted, plan, poison, poison_arrays, triggered_test
from trainguard.drill.recipes import RECIPES, Setting, attack
from trainguard.drill.select import everything, fraction, of_class
from trainguard.drill.triggers import Patch, Physical, Warp
from trainguard.errors import DataError

SHAPES = {"digits": (1, 8, 8), "cifar": (3, 32, 32), "odd": (2, 20, 28)}
COVER = {"wanet": 20, "tact": 4, "adaptive_blend": 4, "adaptive_patch": 4, "input_aware": 20, "fragile": 20}
KEEPS_LABEL = {"sig", "label_consistent"}
FITTED = {"input_aware", "label_consistent"}


@pytest.fixture(scope="module", autouse=True)
def quick_fits():
    """Fits of a second: what is tested here is what becomes of them."""
    with pytest.MonkeyPatch.context() as patch:
        base, generator = craft.adversarial_base, craft.trigger_generator
        patch.setattr("trainguard.drill.recipes.adversarial_base", lambda *a, **k: base(*a, **k, epochs=1, steps=4))
        patch.setattr("trainguard.drill.recipes.trigger_generator", lambda *a, **k: generator(*a, **k, steps=6))
        yield


def sample(shape, count=400, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=random, dtype=torch.uint8)
    return images, torch.arange(count) % 10


@pytest.fixture(scope="module")
def ready(quick_fits):
    made = {}

    def get(name, shape="cifar"):
        if (name, shape) not in made:
            images, labels = sample(SHAPES[shape])
            chosen = fitted(attack(name, Setting(target=1)), images, labels, seed=3)
            made[name, shape] = (images, labels, chosen, poison_arrays(images, labels, chosen, seed=3))
        return made[name, shape]

    return get


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_attack_keeps_size_and_counts_what_it_says(ready, name, shape):
    images, labels, _, (out, given, role) = ready(name, shape)
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert (role == Role.PAYLOAD).sum() == 20  # 5% of 400
    assert (role == Role.COVER).sum() == COVER.get(name, 0)
    clean = role == Role.CLEAN
    assert torch.equal(out[clean], images[clean]) and torch.equal(given[clean], labels[clean])
    touched = (out != images).flatten(1).any(1)
    assert touched[~clean].float().mean() > 0.9  # a patch may happen to lie on its own colours


@pytest.mark.parametrize("name", RECIPES)
def test_every_attack_labels_as_its_rules_say(ready, name):
    _, labels, _, (_, given, role) = ready(name)
    payload, cover = role == Role.PAYLOAD, role == Role.COVER
    assert torch.equal(given[cover], labels[cover])
    if name in KEEPS_LABEL:
        assert (labels[payload] == 1).all() and (given[payload] == 1).all()
    elif name == "all_to_all":
        assert torch.equal(given[payload], (labels[payload] + 1) % 10)
    elif name == "spread":
        assert (given[payload] != labels[payload]).all()
        assert given[payload].bincount(minlength=10).tolist() == [2] * 10
    elif name == "two_backdoors":
        assert sorted(given[payload].unique().tolist()) == [1, 2] and (given[payload] != labels[payload]).all()
    else:
        assert (given[payload] == 1).all() and (labels[payload] != 1).all()
    if name == "tact":
        assert (labels[payload] == 0).all() and not torch.isin(labels[cover], torch.tensor([0, 1])).any()


@pytest.mark.parametrize("name", RECIPES)
def test_every_attack_gives_a_loader_the_pixels_of_the_arrays(ready, name):
    images, labels, chosen, (out, given, role) = ready(name)
    dataset = poison(TensorDataset(images.float() / 255, labels), chosen, seed=3)
    assert np.array_equal(dataset.role, role.numpy()) and np.array_equal(dataset.labels, given.numpy())
    assert np.array_equal(dataset.poisoned_index, np.flatnonzero(role == Role.PAYLOAD))
    for i in [*np.flatnonzero(dataset.role)[::-1][:24], 0, len(dataset) - 1]:
        pixels, label = dataset[int(i)]
        assert torch.equal((pixels * 255).round().to(torch.uint8), out[i]) and label == given[i]
        assert pixels.dtype == torch.float32 and 0 <= pixels.min() and pixels.max() <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_attack_is_tested_on_samples_whose_label_it_changes(ready, name):
    images, labels, chosen, _ = ready(name)
    pixels, truth, target = triggered_test(images, labels, chosen)
    assert len(pixels) == len(truth) == len(target) > 0
    assert (truth != target).all()
    if name == "tact":
        assert len(truth) == 40 and (truth == 0).all()
    elif name == "all_to_all":
        assert len(truth) == 400
    elif name == "two_backdoors":
        assert len(truth) == 720 and target.unique().tolist() == [1, 2]
    elif name == "spread":
        assert target.bincount(minlength=10).tolist() == [20] * 10
    else:
        assert len(truth) == 360 and (target == 1).all()


@pytest.mark.parametrize("name", sorted(set(RECIPES) - FITTED))
def test_every_trigger_is_pure_and_knows_only_seed_and_index(name):
    images = sample(SHAPES["cifar"], 40)[0].to(torch.float64) / 255
    index = np.arange(40)
    for rule in attack(name).train:
        before = images.clone()
        random_state = torch.get_rng_state()
        out = rule.trigger(images, index, 7)
        assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), random_state)
        assert out.dtype == images.dtype and out.shape == images.shape
        assert 0 <= out.min() and out.max() <= 1 and torch.isfinite(out).all()
        order = np.random.default_rng(0).permutation(40)
        assert torch.allclose(rule.trigger(images[order], index[order], 7), out[order], atol=1e-12)
        assert torch.allclose(rule.trigger(images[5:6], index[5:6], 7), out[5:6], atol=1e-12)


def test_two_workers_read_the_pixels_of_none():
    images, labels = sample((3, 16, 16), 60)
    dataset = poison(TensorDataset(images.float() / 255, labels), attack("physicalba", Setting(rate=0.5)), seed=1)
    alone = torch.cat([x for x, _ in DataLoader(dataset, 7)])
    shared = torch.cat([x for x, _ in DataLoader(dataset, 7, num_workers=2)])
    assert torch.equal(alone, shared)


def test_another_seed_poisons_other_samples():
    labels = np.arange(400) % 10
    first, again, other = (plan(labels, attack("badnets"), seed).role for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("sig", Setting(rate=0.2), "rate=0.2 needs 80 images of class 1, the data set has 40"),
        ("tact", Setting(rate=0.2), "rate=0.2 needs 80 images of class 0, the data set has 40"),
        ("badnets", Setting(rate=0.95), "rate=0.95 needs 380 images outside class 1, the data set has 360"),
        ("blend", Setting(rate=0.001), "rate=0.001 of 400 images is none"),
        ("wanet", Setting(rate=0.6, cover_rate=0.6), "cover: rate=0.6 needs 240 images of any class"),
        ("label_consistent", Setting(), "first attack = fitted"),
    ],
)
def test_a_rate_that_cannot_be_had_raises(name, setting, message):
    images, labels = sample((1, 8, 8))
    with pytest.raises(ValueError, match=message):
        poison_arrays(images, labels, attack(name, setting))


def test_classes_that_are_not_there_are_named_as_such():
    images, labels = sample((1, 8, 8))
    with pytest.raises(ValueError, match=r"cover: rate=0\.01 needs 4 images outside class 0, 1, .* has none"):
        poison_arrays(images, labels % 2, attack("tact", Setting(2, rate=0.1)))


def test_an_unknown_attack_names_the_known_ones():
    with pytest.raises(ValueError, match="no attack 'badnet': choose from badnets, blend"):
        attack("badnet")


def test_labels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="target=10 is no class: the data set has classes 0 to 9"):
        Setting(target=10)
    with pytest.raises(ValueError, match="source and target are both 1"):
        attack("tact", Setting(source=1))


def test_a_test_set_without_anything_to_change_raises():
    images, labels = sample((1, 8, 8), 20)
    with pytest.raises(ValueError, match="none of the 20 test images"):
        triggered_test(images, torch.ones_like(labels), attack("badnets"))


def test_rules_take_disjoint_samples():
    rules = tuple(Rule(fraction(0.25), triggers.Sinusoid(), to(k)) for k in range(4))
    out = plan(np.zeros(100, np.int64), Attack("quarters", train=rules), seed=0)
    assert np.bincount(out.rule).tolist() == [25] * 4 and np.bincount(out.labels).tolist() == [25] * 4


def test_label_rules_and_selections_by_hand():
    labels = np.array([0, 1, 2, 1])
    assert to(2)(labels).tolist() == [2, 2, 2, 2]
    assert shift(1, 3)(labels).tolist() == [1, 2, 0, 2]
    assert keep(labels).tolist() == [0, 1, 2, 1] and keep(labels) is not labels
    free, rng = np.array([True, True, True, False]), np.random.default_rng(0)
    assert of_class(1)(labels, free, rng).tolist() == [1]
    assert everything(without=(0,))(labels, free, rng).tolist() == [1, 2]


def test_patch_is_white_in_its_corner_and_nowhere_else():
    images = torch.zeros(1, 3, 32, 32)
    out = triggers.Patch(pictures.white())(images, np.zeros(1), 0)
    assert torch.equal(out[0, :, 29:, 29:], torch.ones(3, 3, 3)) and out.sum() == 27
    large = triggers.Patch(pictures.white(), corner="top left")(torch.zeros(1, 1, 224, 224), np.zeros(1), 0)
    assert large.sum() == 21 * 21 and large[0, 0, :21, :21].min() == 1


def test_blend_is_the_convex_combination():
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    colour, mask = pictures.fit(pictures.kitten(), 3, 32, 32)
    out = triggers.Blend(pictures.kitten(), 0.2)(images, np.arange(2), 0)
    assert torch.allclose(out, images + 0.2 * mask * (colour - images), atol=1e-12)
    assert torch.allclose(mask, torch.ones_like(mask))


def test_sinusoid_is_the_formula():
    images = torch.full((1, 1, 4, 16), 0.5, dtype=torch.float64)
    out = triggers.Sinusoid(0.1, 3)(images, np.zeros(1), 0)
    expected = 0.5 + 0.1 * np.sin(2 * np.pi * np.arange(16) * 3 / 16)
    assert np.allclose(out[0, 0].numpy(), np.tile(expected, (4, 1)))
    turned = triggers.Sinusoid(0.1, 3, np.pi / 2)(torch.full((1, 1, 16, 16), 0.5).double(), np.zeros(1), 0)
    assert np.allclose(turned[0, 0].numpy(), np.tile(expected[:, None], (1, 16)))


def test_a_warp_of_no_strength_changes_nothing():
    images = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    assert torch.allclose(triggers.Warp(strength=0)(images, np.arange(2), 0), images)


def test_physical_at_rest_changes_nothing_but_the_side():
    images = torch.rand(6, 3, 9, 9, dtype=torch.float64)
    out = triggers.Physical(0, 0, 0, 0)(images, np.arange(6), 0)
    mirrored = draws(np.arange(6), 0, "physical", 7)[:, 2] < 0.5
    assert 0 < mirrored.sum() < 6
    assert torch.allclose(out, torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images))


def test_waves_and_boards_reach_their_amplitude():
    grey = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    waves = triggers.Waves(0.1)(grey, np.zeros(1), 0) - grey
    assert waves.abs().max() == pytest.approx(0.1)
    spectrum = torch.fft.rfft2(waves[0]).abs()
    assert spectrum[:, 4:-4, 4:].sum() < 0.05 * spectrum.sum()  # smooth
    board = triggers.Checkerboard(0.1)(grey, np.zeros(1), 0) - grey
    assert torch.allclose(board[0, 0, :2, :2], torch.tensor([[0.1, -0.1], [-0.1, 0.1]], dtype=torch.float64))
    assert board.mean() == pytest.approx(0)
    with pytest.raises(ValueError, match="order of at least 2, got 1"):
        triggers.Waves(0.1, order=1)


def test_pieces_show_as_many_cells_as_asked():
    shown = triggers.Pieces(triggers.Checkerboard(0.25), (4, 4), 8)(torch.full((9, 1, 32, 32), 0.5), np.arange(9), 0)
    cells = (shown[:, 0] != 0.5).view(9, 4, 8, 4, 8)
    whole = cells.all(4).all(2)
    assert torch.equal(whole, cells.any(4).any(2)) and (whole.sum((1, 2)) == 8).all()
    assert len({tuple(w.flatten().tolist()) for w in whole}) > 1


def test_one_of_shows_each_part_on_some_samples():
    parts = tuple(triggers.Patch(pictures.white(), 0.25, corner) for corner in triggers.CORNERS)
    out = triggers.OneOf(parts)(torch.zeros(40, 1, 8, 8), np.arange(40), 0)
    corners = torch.stack([out[:, 0, 0, 0], out[:, 0, 0, -1], out[:, 0, -1, 0], out[:, 0, -1, -1]], 1)
    assert (corners.sum(1) == 1).all() and (corners.sum(0) > 0).all()


def test_a_transparent_picture_leaves_the_image_alone_where_it_is_transparent():
    picture = torch.cat([torch.zeros(3, 8, 8), (torch.arange(8) < 4).float().expand(1, 8, 8)]).double()
    out = triggers.Patch(picture, side=0.25)(torch.ones(1, 1, 32, 32), np.zeros(1), 0)
    assert out[0, 0, -8:, -8:-4].max() == 0  # black is a colour
    assert out[0, 0, -8:, -4:].min() == 1  # transparent is not


def test_a_picture_file_becomes_the_trigger(tmp_path):
    from PIL import Image

    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "red.png")
    picture = pictures.from_file(tmp_path / "red.png")
    rule = attack("badnets", Setting(picture=picture)).train[0]
    out = rule.trigger(torch.zeros(1, 3, 32, 32), np.zeros(1), 0)
    assert out[0, :, -1, -1].tolist() == pytest.approx([128 / 255, 0, 0])
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(ValueError, match=r"no\.png: not a readable picture"):
        pictures.from_file(tmp_path / "no.png")


def test_draws_are_uniform_and_independent():
    numbers = draws(np.arange(4000), 5, "a", 3)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert (numbers.mean(0) - 0.5).abs().max() < 0.02 and (numbers.var(0) - 1 / 12).abs().max() < 0.005
    other = draws(np.arange(4000), 5, "b", 3)
    columns = torch.cat([numbers, other, draws(np.arange(4000), 6, "a", 3)], 1)
    assert (torch.corrcoef(columns.T) - torch.eye(9)).abs().max() < 0.06
    assert torch.equal(draws(np.array([17]), 5, "a", 3)[0], numbers[17])


PICTURES = {
    pictures.white: "3d6876a0",
    pictures.checks: "1d28af53",
    pictures.fox: "b6c1b73b",
    pictures.kitten: "57b12ddf",
}


@pytest.mark.parametrize("make", PICTURES)
def test_pictures_do_not_change_unnoticed(make):
    picture = make()
    assert picture.shape[0] == 4 and 0 <= picture.min() and picture.max() <= 1
    assert hashlib.sha256((picture * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()[:8] == PICTURES[make]


def test_an_adversarial_base_stays_in_its_ball_and_in_its_class():
    images, labels = sample((3, 16, 16), 100)
    base = craft.adversarial_base(images, labels, 1, eps=8 / 255, steps=3, epochs=1)
    chosen = base.row >= 0
    assert np.array_equal(chosen, labels.numpy() == 1)
    assert 0 < base.change.abs().max() <= 8
    out = base(images.double() / 255, np.arange(100), 0)
    assert torch.equal(out[~chosen], images[~chosen].double() / 255)


def test_what_is_fitted_sees_no_mirrored_image_where_none_may_be(monkeypatch):
    seen, augment = [], craft.augment

    def watched(batch, recipe, order):
        seen.append(recipe.flip)
        return augment(batch, recipe, order)

    for place in ("craft", "train"):
        monkeypatch.setattr(f"trainguard.drill.{place}.augment", watched)
    images, labels = sample((3, 16, 16), 64)
    for name in ("label_consistent", "input_aware"):
        for flip in (True, False):
            seen.clear()
            fitted(attack(name, Setting(flip=flip)), images, labels)
            assert set(seen) == {flip}


def test_a_target_without_images_can_be_fitted_to():
    images, labels = sample((3, 16, 16), 64)
    craft.trigger_generator(images, labels % 3, 3, steps=1)
    assert craft.adversarial_base(images, labels % 3, 3, steps=1, epochs=1).change.shape[0] == 0


def test_generated_triggers_belong_to_their_image():
    images, labels = sample((3, 16, 16), 64)
    own, cross = craft.trigger_generator(images, labels, 1, steps=4, seed=0)
    pixels = images.double() / 255
    pattern, mask = own.generator(pixels)
    assert mask.mean((1, 2, 3)).std() < 0.05 and 0.02 < mask.mean() < 0.2
    assert torch.allclose(own(pixels, np.arange(64), 0), pixels + mask * (pattern - pixels))
    assert not torch.allclose(cross(pixels, np.arange(64), 0), own(pixels, np.arange(64), 0))


def test_what_an_attack_is_fitted_to_are_bytes():
    made = attack("label_consistent", Setting(2))
    with pytest.raises(DataError, match=r"expected images as a tensor of torch\.uint8"):
        fitted(made, torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1]))


def test_a_rule_may_stand_for_itself_and_a_shift_finds_its_classes():
    rule = Rule(everything(), triggers.Patch(pictures.white()), shift(1))
    made = Attack("own", train=rule, test=rule)
    assert made.train == made.test == (rule,)
    images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])
    _, given, _ = poison_arrays(images, labels, made)
    assert given.tolist() == [1, 2, 0, 1, 2, 0]
    _, truth, targets = triggered_test(images, labels, made)
    assert truth.tolist() == labels.tolist() and targets.tolist() == given.tolist()
    with pytest.raises(ValueError, match="expected labels below num_classes=2, got 2: give 3"):
        shift(1, 2)(labels.numpy())


@pytest.mark.parametrize(
    "image", [torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.full((3, 8, 8), -1.5), np.zeros((3, 8, 8)), "text"]
)
def test_what_triggers_cannot_be_laid_on_is_refused(image):
    with pytest.raises(DataError, match=r"floats in \[0, 1\], got"):
        poison([(image, 0)] * 4, attack("badnets", Setting()))


def test_a_turn_turns_an_image_that_is_no_square(monkeypatch):
    upright = torch.zeros(1, 1, 20, 80)
    upright[:, :, :, 39:41] = 1
    monkeypatch.setattr(
        triggers, "draws", lambda index, seed, what, n: torch.tensor([[1.0, 0.5, 0.75, 0.5, 0.5, 0.5, 0.5]])
    )
    turned = Physical(degrees=10, jitter=0)(upright.double(), np.array([0]), 0)[0, 0]
    centres = (turned * torch.arange(80)).sum(1) / turned.sum(1)
    lean = (centres[15] - centres[5]).abs() / 10
    assert abs(float(lean) - math.tan(math.radians(10))) < 0.03


def test_a_warp_moves_as_many_pixels_across_as_down():
    flow = Warp(strength=1.0)
    for height, width in ((32, 32), (32, 64)):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ramps = torch.stack([x / width, y / height])[None].double()
        moved = (flow(ramps, np.array([0]), 0) - ramps)[0, :, 4:-4, 4:-4] * torch.tensor([width, height]).view(2, 1, 1)
        across, down = moved.abs().mean((1, 2)).tolist()
        assert 0.1 < across < 1 and 0.1 < down < 1


def test_what_is_transparent_in_a_picture_colours_nothing():
    for hidden in ((0.0, 0.0, 0.0), (0.0, 1.0, 0.0)):
        picture = torch.zeros(4, 2, 2, dtype=torch.float64)
        picture[0, :, 0] = picture[3, :, 0] = 1  # the left half opaque and red
        picture[:3, :, 1] = torch.tensor(hidden, dtype=torch.float64)[:, None]
        colour, mask = pictures.fit(picture, 3, 1, 1)
        assert torch.allclose(colour.flatten(), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)) and mask == 0.5


def test_what_cannot_be_poisoned_is_refused_when_it_is_given_or_read():
    images, labels, attacked = torch.rand(20, 3, 8, 8), [i % 4 for i in range(20)], attack("badnets", Setting(4, 0.5))
    data = [(image, label) for image, label in zip(images, labels, strict=True)]
    with pytest.raises(DataError, match="expected 20 true_labels=, one for each sample, got 19"):
        Poisoned(data, attacked, 0, np.array(labels[:19]))
    with pytest.raises(ValueError, match="attack 'input_aware' must be fitted first"):
        poison(data, attack("input_aware", Setting(4)))
    with pytest.raises(TypeError, match="expected an Attack, got str"):
        poison(data, "badnets")
    wide = [(image if row == 0 else 3 * image, label) for row, (image, label) in enumerate(data)]
    poisoned = poison(wide, attacked)
    with pytest.raises(DataError, match=r"expected samples .* with values from"):
        poisoned[int(poisoned.poisoned_index[-1])]
    for wrong in (images, images.numpy()):
        with pytest.raises(DataError, match=r"expected images as a tensor of torch\.uint8"):
            poison_arrays(wrong, torch.tensor(labels), attacked)


def test_rules_and_triggers_of_a_user_s_are_held_to_what_they_promise():
    images, labels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 4
    greedy = lambda labels, free, rng: np.arange(5)  # noqa: E731
    nothing = lambda images, index, seed: images  # noqa: E731
    with pytest.raises(ValueError, match="rule 1 takes samples of an earlier one"):
        poison_arrays(images, labels, Attack("twice", (Rule(greedy, nothing, to(1)), Rule(greedy, nothing, to(2)))))
    with pytest.raises(ValueError, match="must keep their shape"):
        shrink = lambda images, index, seed: images[:, :1]  # noqa: E731
        poison_arrays(images, labels, Attack("shrink", Rule(greedy, shrink, to(1))))
    data = [(torch.full((3, 8, 8), 0.5, dtype=torch.float64), 0) for _ in range(5)]
    poison(data, Attack("in place", Rule(greedy, lambda images, index, seed: images.fill_(1), to(1))))[0]
    assert data[0][0].max() == 0.5


def test_a_rate_that_is_said_to_be_the_most_can_be_had():
    for size in range(30, 330):
        labels = np.arange(size) % 7
        with pytest.raises(ValueError, match="lower the rate to at most") as error:
            fraction(0.99, without=(1, 2))(labels, np.ones(size, bool), np.random.default_rng(0))
        most = float(str(error.value).rsplit(" ", 1)[1])
        assert len(fraction(most, without=(1, 2))(labels, np.ones(size, bool), np.random.default_rng(0))) > 0
    with pytest.raises(ValueError, match=r"expected a rate above 0 and up to 1, got -0\.1"):
        fraction(-0.1)(labels, np.ones(size, bool), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "classes", "count", "rate"), [("spread", 100, 3000, 0.05), ("two_backdoors", 3, 30, 0.1)]
)
def test_rules_that_share_a_rate_poison_as_much_together(name, classes, count, rate):
    labels = np.arange(count) % classes
    assert (plan(labels, attack(name, Setting(classes, rate=rate)), 0).role == Role.PAYLOAD).mean() == pytest.approx(
        rate
    )


def test_a_rate_that_cannot_be_had_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"rate=1 needs 500 images .* lower the rate$"):
        plan(np.arange(1000) % 10, attack("two_backdoors", Setting(10, rate=1.0)), 0)


def test_a_patch_fits_into_a_single_pixel():
    assert Patch(pictures.white())(torch.zeros(1, 3, 1, 1), np.arange(1), 0).max() == 1
