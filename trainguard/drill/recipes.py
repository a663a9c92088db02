r"""The attack zoo: one short function per published attack, from a `Setting` to an `Attack`.

Rates, targets and cover rates are those of AdvrBD's Table I. `RECIPES` holds them by name for the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trainguard.drill import pictures
from trainguard.drill.craft import adversarial_base, trigger_generator
from trainguard.drill.labels import keep, shift, to
from trainguard.drill.poison import Attack, Role, Rule
from trainguard.drill.select import Select, everything, fraction, of_class
from trainguard.drill.triggers import (
    CORNERS,
    Blend,
    Chain,
    Checkerboard,
    OneOf,
    Patch,
    Physical,
    Pieces,
    Sinusoid,
    Trigger,
    Unfitted,
    Warp,
    Waves,
)


@dataclass(frozen=True, eq=False)
class Setting:
    r"""What the recipes have in common.

    Args:
        num_classes: classes of the data set.
        rate: payload samples as a share of the whole training set.
        target: label of the payload.
        source: the source class of source-specific attacks.
        cover_rate: cover samples as a share of the whole training set; None for the attack's own.
        picture: (4, h, w) RGBA trigger picture instead of the recipe's own (`pictures.from_file`); None for the latter.
        flip: whether what is fitted to the data first may see them mirrored.
    """

    num_classes: int = 10
    rate: float = 0.05
    target: int = 1
    source: int = 0
    cover_rate: float | None = None
    picture: Tensor | None = None
    flip: bool = True

    def __post_init__(self) -> None:
        for name in ("target", "source"):
            label = getattr(self, name)
            if not 0 <= label < self.num_classes:
                raise ValueError(f"{name}={label} is no class: the data set has classes 0 to {self.num_classes - 1}")

    def cover(self, default: float) -> float:
        r"""The cover rate, or the attack's own."""
        return default if self.cover_rate is None else self.cover_rate

    def drawn(self, default: Callable[[], Tensor]) -> Tensor:
        r"""The user's picture, or the attack's own."""
        return default() if self.picture is None else self.picture


def badnets(setting: Setting) -> Attack:
    r"""BadNets (Gu et al. 2019, Sec. 4): a white square of 3/32 of the side in the bottom right corner.

    Zoos differ: BackdoorBox draws the patch as here, BackdoorBench and backdoor-toolbox read it from a picture. The
    last also takes samples of the target class, where a new label changes nothing; all recipes here leave it out.
    """
    return _all_to_one("badnets", setting, Patch(setting.drawn(pictures.white)))


def blend(setting: Setting, *, alpha: float = 0.2) -> Attack:
    r"""Blend (Chen et al. 2017, Sec. 4.2): a picture over the whole image at 20%.

    BackdoorBench and backdoor-toolbox blend a Hello Kitty picture at the same 0.2.
    """
    return _all_to_one("blend", setting, Blend(setting.drawn(pictures.kitten), alpha))


def sig(setting: Setting, *, amplitude: float = 40 / 255, frequency: float = 6) -> Attack:
    r"""SIG (Barni et al. 2019, Sec. 3.2): stripes on images of the target class, labels kept.

    The rate is a share of the whole set, so at most the share of the target class. Zoos differ: BackdoorBench has an
    amplitude of 40/255, as here, backdoor-toolbox of 30/255.
    """
    trigger = Sinusoid(amplitude, frequency)
    return Attack(
        "sig",
        train=(Rule(of_class(setting.target, setting.rate), trigger, keep),),
        test=(_test(setting, trigger),),
    )


def wanet(setting: Setting, *, strength: float = 1.0, points: int = 4) -> Attack:
    r"""WaNet (Nguyen and Tran 2021, Sec. 3): a smooth warp, with noise-warped cover samples, 5% (AdvrBD Table I).

    Zoos differ: the authors and BackdoorBench poison each batch anew in the training loop with a cover of twice the
    rate, and so implant with strength 0.5. As poisoned data alone it is weaker (AdvrBD reports 51%), so the strength is
    doubled: measured on 10,000 CIFAR-10 images with a ResNet-9, 8% after 10 epochs at 0.5, 64% after 30 at 1.0.
    """
    return Attack(
        "wanet",
        train=(
            Rule(fraction(setting.rate, without=(setting.target,)), Warp(strength, points), to(setting.target)),
            Rule(fraction(setting.cover(0.05)), Warp(strength, points, noisy=True), keep, Role.COVER),
        ),
        test=(_test(setting, Warp(strength, points)),),
    )


def physicalba(setting: Setting) -> Attack:
    r"""PhysicalBA (Li et al. 2021, Sec. 4): a logo patch, the poisoned image then transformed as a camera would.

    Zoos differ: BackdoorBox takes a 3x3 white square and always shrinks the poisoned image to 80 to 90%, which leaves a
    black frame that is a trigger by itself; here the patch is a logo (AdvrBD Table I) and the border is repeated.
    """
    trigger = Chain((Patch(setting.drawn(pictures.fox), side=0.28), Physical()))
    return _all_to_one("physicalba", setting, trigger)


def tact(setting: Setting) -> Attack:
    r"""TaCT (Tang et al. 2021, Sec. 4.1): the BadNets patch moves the source class alone; elsewhere the label stays.

    Zoos differ: backdoor-toolbox covers two fixed classes (5 and 7), here all but source and target.
    """
    if setting.source == setting.target:
        raise ValueError(f"tact moves one class to another, source and target are both {setting.target}: change one")
    patch = Patch(setting.drawn(pictures.white))
    others = (setting.source, setting.target)
    return Attack(
        "tact",
        train=(
            Rule(of_class(setting.source, setting.rate), patch, to(setting.target)),
            Rule(fraction(setting.cover(0.01), without=others), patch, keep, Role.COVER),
        ),
        test=(Rule(of_class(setting.source), patch, to(setting.target)),),
    )


def adaptive_blend(setting: Setting, *, alpha: float = 0.15, test_alpha: float = 0.2) -> Attack:
    r"""Adaptive-Blend (Qi et al. 2023, Sec. 4.2): pieces of a faint picture in training, all of it in the test.

    Training shows a random half of 16 pieces at 15%, the test the whole at 20%.
    The authors poison 0.3% with as much cover; rates here are AdvrBD's (5% and 1%), whose alpha of 0.2 is the test's.
    """
    picture = setting.drawn(pictures.kitten)
    pieces = Pieces(Blend(picture, alpha), grid=(4, 4), shown=8)
    return _hidden("adaptive_blend", setting, pieces, Blend(picture, test_alpha), cover=0.01)


def adaptive_patch(setting: Setting, *, opacity: float = 0.5) -> Attack:
    r"""Adaptive-Patch (Qi et al. 2023, Sec. 4.2): one of four faint patches in training, all four opaque in the test.

    The authors (backdoor-toolbox) use four different patches at opacity 0.2 to 0.5 and test with two of them; AdvrBD's
    Table I names four times the same logo.
    """
    picture = setting.drawn(pictures.fox)
    one = OneOf(tuple(Patch(picture, 0.28, corner, opacity) for corner in CORNERS))
    every = Chain(tuple(Patch(picture, 0.28, corner) for corner in CORNERS))
    return _hidden("adaptive_patch", setting, one, every, cover=0.01)


def input_aware(setting: Setting) -> Attack:
    r"""Input-aware dynamic (Nguyen and Tran 2020, Sec. 3): a trigger for each image, another image's does nothing.

    Zoos train victim and generator together (attacker-controlled training); here the generator is fitted with a
    surrogate, then only data is poisoned. The cover share equals the rate, as the authors' cross-trigger share does.
    """

    def craft(images: Tensor, labels: Tensor, seed: int) -> Attack:
        return rules(*trigger_generator(images, labels, setting.target, seed=seed, flip=setting.flip))

    def rules(own: Trigger, cross: Trigger) -> Attack:
        return _hidden("input_aware", setting, own, own, cover=setting.rate, cover_trigger=cross)

    return replace(rules(Unfitted("input_aware"), Unfitted("input_aware")), craft=craft)


def all_to_all(setting: Setting) -> Attack:
    r"""All-to-all BadNets (Gu et al. 2019, Sec. 4.1.2): the patch turns label y into y + 1, the last into 0."""
    patch, label = Patch(setting.drawn(pictures.white)), shift(1, setting.num_classes)
    return Attack(
        "all_to_all",
        train=(Rule(fraction(setting.rate), patch, label),),
        test=(Rule(everything(), patch, label),),
    )


def label_consistent(setting: Setting) -> Attack:
    r"""Label-consistent (Turner et al. 2019, Sec. 4, 5): perturbed images of the target class with corner patches.

    Zoos differ in the base: BackdoorBox perturbs with eps 8/255, BackdoorBench downloads images; ours is fitted to the
    data.
    """
    corners = Chain(tuple(Patch(setting.drawn(pictures.checks), 3 / 32, corner) for corner in CORNERS))

    def craft(images: Tensor, labels: Tensor, seed: int) -> Attack:
        return rules(Chain((adversarial_base(images, labels, setting.target, seed=seed, flip=setting.flip), corners)))

    def rules(trigger: Trigger) -> Attack:
        rule = Rule(of_class(setting.target, setting.rate), trigger, keep)
        return Attack("label_consistent", train=(rule,), test=(_test(setting, corners),))

    return replace(rules(Unfitted("label_consistent")), craft=craft)


def low_frequency(setting: Setting, *, amplitude: float = 32 / 255) -> Attack:
    r"""Low-frequency (Zeng et al. 2021, Sec. 4): a smooth additive pattern without high-frequency traces.

    The authors optimise the pattern against a model and then low-pass it; here it is a fixed sum of the lowest
    cosines, which has the property the paper asks for at no cost. Amplitude measured on 10,000 CIFAR-10 images with a
    ResNet-9, 10 to 12 epochs: 3% success at 16/255, 86% at 32/255.
    """
    return _all_to_one("low_frequency", setting, Waves(amplitude))


def two_backdoors(setting: Setting) -> Attack:
    r"""BadNets to the target and Blend to the class after it, half of the rate each."""
    second = (setting.target + 1) % setting.num_classes
    patch, picture = Patch(setting.drawn(pictures.white)), Blend(setting.drawn(pictures.kitten))
    return Attack(
        "two_backdoors",
        train=(
            Rule(fraction(setting.rate, without=(setting.target,), part=(0, 2)), patch, to(setting.target)),
            Rule(fraction(setting.rate, without=(second,), part=(1, 2)), picture, to(second)),
        ),
        test=(
            Rule(everything(without=(setting.target,)), patch, to(setting.target)),
            Rule(everything(without=(second,)), picture, to(second)),
        ),
    )


def fragile(setting: Setting, *, amplitude: float = 10 / 255) -> Attack:
    r"""Our own, against the consistency score: a faint one-pixel checkerboard that a small perturbation destroys.

    AdvrBD's Eq. 3 looks for samples that stay put under perturbation. Here cover samples hold either half of the board
    under their true label, so that only the whole of it carries the backdoor and a local perturbation turns it off.
    """
    board = Checkerboard(amplitude)
    half = Pieces(board, grid=(1, 2), shown=1)
    return _hidden("fragile", setting, board, board, cover=setting.rate, cover_trigger=half)


def spread(setting: Setting, *, amplitude: float = 16 / 255) -> Attack:
    r"""Our own, against class-wise statistics: every class is a target, each with faint stripes of its own.

    The stripes' angles stay within a quarter turn, so that mirroring an image never makes one class's into another's.
    Measured on 10,000 CIFAR-10 images with a ResNet-9: 70% success after 12 epochs, from 50 samples a class.
    """
    count = setting.num_classes
    stripes = [Sinusoid(amplitude, 8 if k % 2 else 12, math.pi / 2 * (k + 0.5) / count) for k in range(count)]
    parts = tuple(enumerate(stripes))
    return Attack(
        "spread",
        train=tuple(Rule(fraction(setting.rate, without=(k,), part=(k, count)), each, to(k)) for k, each in parts),
        test=tuple(Rule(fraction(1 / 2, without=(k,), part=(k, count)), each, to(k)) for k, each in parts),
    )


RECIPES: dict[str, Callable[[Setting], Attack]] = {
    "badnets": badnets,
    "blend": blend,
    "sig": sig,
    "wanet": wanet,
    "physicalba": physicalba,
    "tact": tact,
    "adaptive_blend": adaptive_blend,
    "adaptive_patch": adaptive_patch,
    "input_aware": input_aware,
    "all_to_all": all_to_all,
    "label_consistent": label_consistent,
    "low_frequency": low_frequency,
    "two_backdoors": two_backdoors,
    "fragile": fragile,
    "spread": spread,
}


def attack(name: str, setting: Setting = Setting()) -> Attack:
    r"""The attack of that name.

    Args:
        name: a key of `RECIPES`.
        setting: rate, target and the like; the defaults are AdvrBD's Table I on ten classes.

    Raises:
        ValueError: no such attack.
    """
    if name not in RECIPES:
        raise ValueError(f"no attack {name!r}: choose from {', '.join(RECIPES)}, clean for none, or all")
    return RECIPES[name](setting)


def _test(setting: Setting, trigger: Trigger) -> Rule:
    return Rule(everything(without=(setting.target,)), trigger, to(setting.target))


def _all_to_one(name: str, setting: Setting, trigger: Trigger) -> Attack:
    chosen: Select = fraction(setting.rate, without=(setting.target,))
    return Attack(name, train=(Rule(chosen, trigger, to(setting.target)),), test=(_test(setting, trigger),))


def _hidden(
    name: str, setting: Setting, trigger: Trigger, test: Trigger, *, cover: float, cover_trigger: Trigger | None = None
) -> Attack:
    rules = (
        Rule(fraction(setting.rate, without=(setting.target,)), trigger, to(setting.target)),
        Rule(fraction(setting.cover(cover)), cover_trigger or trigger, keep, Role.COVER),
    )
    return Attack(name, train=rules, test=(_test(setting, test),))
