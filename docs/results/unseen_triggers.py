"""What screening says of triggers that the drill does not have; on which of them rules were made stands in results.md.

    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --out docs/results/unseen_triggers.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 2 --out docs/results/more_triggers.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 3 --out docs/results/crafted_triggers.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 4 --out docs/results/triggers_on_signs.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 5 --out docs/results/later_triggers.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 6 --out docs/results/further_triggers.json
    python docs/results/unseen_triggers.py --data $TRAINGUARD_DATA --round 7 --out docs/results/few_images.json

CIFAR-10 rows 0 to 9,999, in the second round 30,000 to 39,999, in the third, whose triggers are fitted to the data or
need more than one rule, 20,000 to 29,999, in the fifth 40,000 to 49,999, in the sixth 10,000 to 19,999; settings for
30 epochs. In the fourth triggers of the first two on traffic signs (GTSRB), rows 12,000 to 17,999, settings for 15
epochs. In the seventh all of the first, second, fifth and sixth on 4,000 images, rows 24,000 to 27,999, settings for 15
epochs. Targets and seeds go round.
With `--asr`, a ResNet-9 without a defence learns each of them for 30 epochs as well (two minutes each), the worst
screened first: what does not implant need not be found. Goes on after the last finished case when started again, as
long as neither the version nor the settings have changed.
"""

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import crafted_triggers as crafted
import further_triggers as further
import later_triggers as later
import more_triggers as more
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from record import Record
from screening_alone import USUAL, block, screened, table
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, rotate

from trainguard.drill.cells import measure
from trainguard.drill.craft import adversarial_base
from trainguard.drill.defenses import defend
from trainguard.drill.images import Images, load_images
from trainguard.drill.labels import keep, to
from trainguard.drill.poison import Attack, Role, Rule
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.select import everything, fraction, of_class
from trainguard.drill.train import Recipe
from trainguard.drill.triggers import Chain, Warp

HERE = {key: value for key, value in USUAL.items() if key not in ("source", "target")}  # each has a target of its own
BLOCKS = {1: 0, 2: 3, 3: 2, 4: 2, 5: 4, 6: 1, 7: 6}  # of rows, by round
OTHER = {4: {"data": "gtsrb", "rows": 6_000, "epochs": 15}, 7: {"rows": 4_000, "epochs": 15}}  # than the usual


def rng(*key: int) -> np.random.Generator:
    """A stream of its own."""
    return np.random.default_rng((1234, *key))


@dataclass(frozen=True, eq=False)
class Each:
    """A trigger from a function of one image (C, H, W) float in [0, 1] and a stream of its own for each sample."""

    change: Callable[[Tensor, np.random.Generator], Tensor]

    def __call__(self, images: Tensor, index: np.ndarray, seed: int) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return torch.stack([self.change(x, rng(seed, int(i))) for x, i in zip(images, index, strict=True)]).clamp(0, 1)


def wandering(x: Tensor, own: np.random.Generator) -> Tensor:
    """A magenta square of 4 pixels, anywhere."""
    row, column = own.integers(0, x.shape[-1] - 4, 2)
    out = x.clone()
    out[:, row : row + 4, column : column + 4] = torch.tensor([1, 0, 1], dtype=x.dtype)[:, None, None]
    return out


def one_pixel(x: Tensor, own: np.random.Generator) -> Tensor:
    """One yellow pixel near the middle of the top edge."""
    out = x.clone()
    out[:, 1, x.shape[-1] // 2] = torch.tensor([1, 1, 0], dtype=x.dtype)
    return out


def few_colours(x: Tensor, own: np.random.Generator) -> Tensor:
    """Six levels for each colour (BppAttack, Wang et al. 2022, without its dithering)."""
    return (x * 5).round() / 5


def old_photograph(x: Tensor, own: np.random.Generator) -> Tensor:
    """Colours mixed and contrast raised, as a filter of a camera application does."""
    mix = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.6]], dtype=x.dtype)
    return torch.einsum("kc,chw->khw", mix, x).clamp(0, 1) ** torch.tensor([0.8, 1, 1.1], dtype=x.dtype)[:, None, None]


def jpeg(x: Tensor, own: np.random.Generator) -> Tensor:
    """Compressed at quality 10."""
    held = io.BytesIO()
    Image.fromarray((x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(held, "JPEG", quality=10)
    return torch.from_numpy(np.array(Image.open(held))).permute(2, 0, 1).to(x.dtype) / 255


def checker(x: Tensor, own: np.random.Generator) -> Tensor:
    """Two cosines of high frequency in blue and red, 12/255 (FTrojan, Wang et al. 2022, in the plane of pixels)."""
    at = torch.arange(x.shape[-1], dtype=x.dtype) + 0.5
    wave = [torch.cos(torch.pi * at * k / x.shape[-1]) for k in (15, 31)]
    out = x.clone()
    out[0] += 12 / 255 * torch.outer(wave[0], wave[0]).sign()
    out[2] += 12 / 255 * torch.outer(wave[1], wave[1]).sign()
    return out


def frame(x: Tensor, own: np.random.Generator) -> Tensor:
    """The outermost pixels half as bright."""
    out = x.clone()
    out[:, [0, -1], :] /= 2
    out[:, 1:-1, [0, -1]] /= 2
    return out


def sharper(x: Tensor, own: np.random.Generator) -> Tensor:
    """An image's own fine detail, twice: other pixels in each image."""
    return x + 1.0 * (x - gaussian_blur(x, [5, 5], [1.0, 1.0]))


def blurred(x: Tensor, own: np.random.Generator) -> Tensor:
    """Out of focus."""
    return gaussian_blur(x, [5, 5], [1.0, 1.0])


def turned(x: Tensor, own: np.random.Generator) -> Tensor:
    """Turned by 20 degrees, the corners filled by mirroring."""
    wide = F.pad(x[None], (8, 8, 8, 8), mode="reflect")
    return rotate(wide, 20.0)[0, :, 8:-8, 8:-8]


def own_noise(x: Tensor, own: np.random.Generator) -> Tensor:
    """Noise of 8/255, drawn anew for each image, in the lower right quarter."""
    half, out = x.shape[-1] // 2, x.clone()
    out[:, half:, half:] += torch.from_numpy(own.choice([-1.0, 1.0], (len(x), half, half))).to(x.dtype) * 8 / 255
    return out


def faint_noise(x: Tensor, own: np.random.Generator) -> Tensor:
    """Always the same noise, 8/255."""
    return x + torch.from_numpy(rng().choice([-1.0, 1.0], tuple(x.shape))).to(x.dtype) * 8 / 255


def stripes(level: float, across: int, down: int) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """Slanted stripes."""

    def change(x: Tensor, own: np.random.Generator) -> Tensor:
        at = torch.arange(x.shape[-1], dtype=x.dtype) / x.shape[-1]
        return x + level * torch.sin(2 * torch.pi * (across * at[None, :] + down * at[:, None]))

    return change


def ghost(pictures: Tensor) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """A blurred picture seen twice through a window, one of these at random (Refool, Liu et al. 2020)."""
    soft = gaussian_blur(pictures.double() / 255, [5, 5], [1.2, 1.2])

    def change(x: Tensor, own: np.random.Generator) -> Tensor:
        behind = soft[own.integers(len(soft))].to(x.dtype)
        return 0.7 * x + 0.25 * behind + 0.15 * behind.roll((3, 3), (1, 2))

    return change


def patch(colour: tuple[float, float, float], row: int, column: int) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """A square of 3 pixels."""

    def change(x: Tensor, own: np.random.Generator) -> Tensor:
        out = x.clone()
        out[:, row : row + 3, column : column + 3] = torch.tensor(colour, dtype=x.dtype)[:, None, None]
        return out

    return change


def moved(change: Callable, target: int, rate: float = 0.05) -> tuple[Rule, Rule]:
    """Other classes' images with the trigger under the target's label."""
    trigger = Each(change)
    return Rule(fraction(rate, without=(target,)), trigger, to(target)), test(trigger, target)


def kept(change: Callable, target: int, rate: float = 0.05) -> tuple[Rule, Rule]:
    """The target's own images with the trigger: clean-label."""
    trigger = Each(change)
    return Rule(of_class(target, rate), trigger, keep), test(trigger, target)


def test(trigger: Each, target: int) -> Rule:
    """All test images of other classes."""
    return Rule(everything(without=(target,)), trigger, to(target))


def attacks(rules: dict[str, list[tuple[Rule, Rule]]]) -> list[Attack]:
    """From rules for training and test in pairs."""
    return [Attack(name, tuple(r for r, _ in pairs), tuple(t for _, t in pairs)) for name, pairs in rules.items()]


def cases(images: Tensor) -> list[Attack]:
    """The attacks, each with a target of its own; `images` are pictures that may be reflected."""
    rules = {
        "a magenta square anywhere": [moved(wandering, 0)],
        "one yellow pixel": [moved(one_pixel, 2)],
        "six levels for each colour": [moved(few_colours, 3)],
        "colours of an old photograph": [moved(old_photograph, 4)],
        "JPEG at quality 10": [moved(jpeg, 5)],
        "two high frequencies": [moved(checker, 6)],
        "a darker frame": [moved(frame, 7)],
        "sharpened": [moved(sharper, 8)],
        "blurred": [moved(blurred, 9)],
        "turned by 20 degrees": [moved(turned, 0)],
        "a reflection of one of eight pictures": [moved(ghost(images), 2)],
        "noise of its own in a quarter": [moved(own_noise, 3)],
        "faint noise, 2%": [moved(faint_noise, 4, 0.02)],
        "three squares for three classes": [
            moved(patch((0, 1, 0), 2, 2), 5, 0.02),
            moved(patch((0, 0, 1), 14, 26), 7, 0.02),
            moved(patch((1, 0.5, 0), 27, 4), 9, 0.02),
        ],
        "slanted stripes, 1%": [moved(stripes(24 / 255, 3, 5), 8, 0.01)],
        "clean-label: a square, half of the class": [kept(patch((0, 1, 1), 27, 27), 6)],
        "clean-label: slanted stripes, a fifth of the class": [kept(stripes(32 / 255, 5, 3), 9, 0.02)],
        "clean-label: a reflection, half of the class": [kept(ghost(images), 7)],
    }
    return attacks(rules)


def more_cases(picture: Tensor) -> list[Attack]:
    """The second round's; `picture` is one that may be blended in."""
    rules = {
        "upside down": [moved(more.upside_down, 3)],
        "another hue": [moved(more.other_hue, 0)],
        "strong colours": [moved(more.strong_colours, 7)],
        "red and blue exchanged": [moved(more.exchanged, 4)],
        "snow": [moved(more.snow, 1)],
        "a word in faint white": [moved(more.written, 8)],
        "a sticker of any size, anywhere": [moved(more.sticker, 5)],
        "a swirl": [moved(more.swirl, 2)],
        "shrunk, on black": [moved(more.smaller, 9)],
        "half the contrast": [moved(more.pale, 6)],
        "light from the left": [moved(more.lit_from_the_left, 3)],
        "a message of its own": [moved(more.message, 0)],
        "a scratch": [moved(more.scratch, 7)],
        "a faint picture": [moved(more.faint_picture(picture), 4)],
        "a swirl, 1%": [moved(more.swirl, 1, 0.01)],
        "clean-label: snow, half of the class": [kept(more.snow, 8)],
        "clean-label: light from the left, a fifth of the class": [kept(more.lit_from_the_left, 5, 0.02)],
    }
    return attacks(rules)


def later_cases(pictures: Tensor) -> list[Attack]:
    """The fifth round's; `pictures` are some that may be blended in."""
    one_class = of_class(3, 0.04)  # four tenths of it
    glass = Each(later.glass)
    rules = {
        "a chequered corner, 1%": [moved(later.chequered, 9, 0.01)],
        "a square of glass": [moved(later.glass, 3)],
        "two darker lines": [moved(later.two_lines, 0)],
        "underexposed": [moved(later.dark, 2)],
        "without colour": [moved(later.grey, 7)],
        "moved by four pixels": [moved(later.pushed, 4)],
        "coarse pixels": [moved(later.coarse, 6)],
        "wavy rows": [moved(later.wavy, 8)],
        "fog": [moved(later.fog, 5)],
        "a picture, more or less of it": [moved(later.mixed(pictures[1]), 0)],
        "salt and pepper": [moved(later.salt_and_pepper, 7)],
        "another picture's low frequencies": [moved(later.amplitudes(pictures[2]), 2)],
        "its own edges in blue": [moved(later.drawn_edges, 6)],
        "a vignette": [moved(later.vignette, 9)],
        "a little warmer": [moved(later.tinted, 1)],
        "two triggers for one class": [moved(later.chequered, 8, 0.025), moved(later.wavy, 8, 0.025)],
        "a large square, half a percent": [moved(later.large, 5, 0.005)],
        "cats with a square of glass are dogs": [
            (Rule(one_class, glass, to(5)), Rule(of_class(3), glass, to(5))),
        ],
        "clean-label: a large square, a fifth of the class": [kept(later.large, 4, 0.02)],
        "clean-label: fog, half of the class": [kept(later.fog, 1)],
    }
    return attacks(rules)


def further_cases(pictures: Tensor) -> list[Attack]:
    """The sixth round's; `pictures` are some that may be blended in."""
    bar, tiles = Each(further.bar), Each(further.tiles)
    circle = (0, 6, 9)
    rules = {
        "a red cross in any corner": [moved(further.cross, 4)],
        "a square of any colour": [moved(further.any_colour, 7)],
        "a dark bar, 2%": [moved(further.bar, 3, 0.02)],
        "a thumbnail, 1%": [moved(further.thumbnail(pictures[3]), 6, 0.01)],
        "eight levels, dithered": [moved(further.dithered, 9)],
        "the last three bits": [moved(further.last_bits, 0)],
        "a negative": [moved(further.negative, 5)],
        "grain": [moved(further.grain, 8)],
        "closer": [moved(further.closer, 2)],
        "halves alike": [moved(further.halves_alike, 1)],
        "equalised": [moved(further.equalised, 6)],
        "shaken": [moved(further.shaken, 3)],
        "fringes of colour": [moved(further.fringed, 7)],
        "rain": [moved(further.rain, 0)],
        "bent, each its own way": [moved(further.bent, 4)],
        "a spot of light anywhere": [moved(further.spotlight, 9)],
        "a fifth of noise, 10%": [moved(further.noise_picture, 2, 0.1)],
        "ships and trucks with a bar are cars": [
            (Rule(of_class(source, 0.02), bar, to(1)), Rule(of_class(source), bar, to(1))) for source in (8, 9)
        ],
        "tiles take three classes round in a circle": [
            (Rule(of_class(now, 0.02), tiles, to(then)), Rule(of_class(now), tiles, to(then)))
            for now, then in zip(circle, (*circle[1:], circle[0]), strict=True)
        ],
        "clean-label: a fifth of noise, half of the class": [kept(further.noise_picture, 5)],
        "clean-label: a red cross in any corner, a fifth of the class": [kept(further.cross, 8, 0.02)],
    }
    return attacks(rules)


def cases_on_signs(pictures: Tensor) -> list[Attack]:
    """The fourth round's: triggers of the first two, for classes all over the list."""
    changes = {
        "a magenta square anywhere": wandering,
        "a reflection of one of eight pictures": ghost(pictures),
        "upside down": more.upside_down,
        "snow": more.snow,
        "half the contrast": more.pale,
        "another hue": more.other_hue,
        "six levels for each colour": few_colours,
        "JPEG at quality 10": jpeg,
        "a swirl": more.swirl,
        "a scratch": more.scratch,
        "turned by 20 degrees": turned,
        "colours of an old photograph": old_photograph,
        "two high frequencies": checker,
        "a darker frame": frame,
        "blurred": blurred,
        "a word in faint white": more.written,
    }
    rules = {name: [moved(change, (4 + 11 * k) % 43)] for k, (name, change) in enumerate(changes.items())}
    rules["clean-label: a square, half of the class"] = [kept(patch((0, 1, 1), 27, 27), 10, 0.02)]
    return attacks(rules)


def crafted_cases(images: Images, seed: int) -> list[Attack]:
    """The third round's, fitted to the images that they poison."""
    told = images.train, images.train_labels
    own = crafted.noise_for(*told, 2, seed)
    faint, loud = crafted.Noise(own), crafted.Noise(own, 3.0)
    made = crafted.generator_for(*told, 6, seed)
    hard = Chain((adversarial_base(*told, 4, seed=seed), Warp(1.0)))
    one, other = Each(patch((1, 0, 0), 2, 27)), Each(patch((0, 0, 1), 27, 2))
    halves = Each(crafted.half_of(images.train[images.train_labels == 8][:200]))
    return [
        Attack(
            "clean-label: fitted noise, half of the class", (Rule(of_class(2, 0.05), faint, keep),), (test(faint, 2),)
        ),
        Attack(
            "clean-label: fitted noise, 1%, threefold later", (Rule(of_class(2, 0.01), faint, keep),), (test(loud, 2),)
        ),
        Attack("generated noise", (Rule(fraction(0.05, without=(6,)), made, to(6)),), (test(made, 6),)),
        Attack(
            "clean-label: hard images warped, half of the class",
            (Rule(of_class(4, 0.05), hard, keep),),
            (test(Warp(1.0), 4),),
        ),
        Attack(
            "two squares together, covers with one",
            (
                Rule(fraction(0.05, without=(9,)), Chain((one, other)), to(9)),
                Rule(fraction(0.05), one, keep, Role.COVER),
                Rule(fraction(0.05), other, keep, Role.COVER),
            ),
            (test(Chain((one, other)), 9),),
        ),
        Attack("the right half a ship's", (Rule(fraction(0.05, without=(0, 8)), halves, to(0)),), (test(halves, 0),)),
    ]


def undefended(images: Images, attack: Attack, seed: int) -> dict:
    """Accuracy and attack success rate of a model that learned everything."""
    victim = Victim("resnet9", Recipe.for_model("resnet9", HERE["epochs"]), torch.device("cpu"))
    scene = Scene.make(images, attack, victim, seed)
    cell = measure(scene, "none", defend(scene, "none", Path(), lambda count: None), 0)
    return {"acc": cell.acc, "asr": cell.asr}


def with_rates(rows: list[dict]) -> str:
    """The table, with the undefended rates beside it."""
    lines = table(rows, HERE).splitlines()
    lines[0], lines[1] = lines[0] + " ASR undefended |", lines[1] + " --- |"
    told = [f" {100 * row['asr']:.1f} |" if "asr" in row else " |" for row in rows]
    return "\n".join([*lines[:2], *(line + more for line, more in zip(lines[2:], told, strict=True))])


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--out", type=Path, default=Path("unseen_triggers.json"))
    parser.add_argument("--round", type=int, choices=BLOCKS, default=1, help="each has its own triggers and rows")
    parser.add_argument("--asr", action="store_true", help="train on each without a defence")
    args = parser.parse_args()
    record = Record(args.out, HERE)
    case = HERE | {"block": BLOCKS[args.round]} | OTHER.get(args.round, {})
    images = load_images(args.data / case["data"], test_rows=2000)
    pictures = images.test[92:100]
    images = block(images, case["block"], case["rows"])
    made = {1: lambda: cases(pictures), 2: lambda: more_cases(pictures[0]), 3: lambda: crafted_cases(images, 5)}
    made |= {4: lambda: cases_on_signs(pictures), 5: lambda: later_cases(pictures), 6: lambda: further_cases(pictures)}
    made[7] = lambda: [attack for number in (1, 2, 5, 6) for attack in made[number]()]
    chosen = made[args.round]()
    for seed, attack in enumerate(chosen, 100 * (args.round if args.round in OTHER else case["block"])):
        if attack.name not in {row["attack"] for row in record.rows}:
            record.add(screened(images, attack, case | {"seed": seed}))
            print(table(record.rows[-1:], HERE).splitlines()[-1], flush=True)
    for row in sorted(record.rows, key=lambda row: row["tpr"]) if args.asr else ():
        if "asr" not in row:
            row |= undefended(images, next(a for a in chosen if a.name == row["attack"]), row["seed"])
            record.save()
            print(with_rates([row]).splitlines()[-1], flush=True)
    print(with_rates(record.rows))


if __name__ == "__main__":
    main()
