"""What screening says of rows, seeds and targets that no rule had seen: every attack of the drill, and clean sets.

    python docs/results/other_rows.py --data $TRAINGUARD_DATA --out docs/results/other_rows.json
    python docs/results/other_rows.py --data $TRAINGUARD_DATA --round 2 --out docs/results/other_rows_second.json
    python docs/results/other_rows.py --data $TRAINGUARD_DATA --round small --out docs/results/small_sets.json
    python docs/results/other_rows.py --data $TRAINGUARD_DATA --round small2 --out docs/results/small_sets_second.json
    python docs/results/other_rows.py --data $TRAINGUARD_DATA --round much --out docs/results/much_poison.json

Rules were made on what the first round showed, so there is a second one, with other blocks, seeds and targets. Each
case takes a block of 10,000 rows of its own data set (block 1 begins at row 10,000; that of block 0 is what all
other tables use), a seed and a target of its own, settings for 30 epochs. Small sets have 1,000 to 4,000 rows,
settings for 10 epochs, and blocks of that size; their second round was written when no rule was to be made any more,
with 3% of poison in 5,000 rows (settings for 20 epochs) and 10% in 3,000 (for 5). Much poison is 15% of 6,000 rows, 5%
where it can only be of one class (for 15 epochs). Goes on after the last finished case when started again, as long as
neither the version nor the settings have changed.
"""

import argparse
from pathlib import Path

from screening_alone import go_through

ATTACKS = (
    "badnets",
    "blend",
    "sig",
    "wanet",
    "adaptive_blend",
    "tact",
    "two_backdoors",
    "low_frequency",
    "adaptive_patch",
    "input_aware",
    "label_consistent",
    "physicalba",
    "fragile",
    "spread",
    "all_to_all",
)
SIGNS = ("badnets", "blend", "wanet", "adaptive_blend")
OF_ONE_CLASS = ("sig", "label_consistent", "tact")  # of which there is a tenth of the images
MORE_SIGNS = (
    "badnets",
    "tact",
    "input_aware",
    "low_frequency",
    "physicalba",
    "two_backdoors",
    "adaptive_patch",
    "wanet",
)
FEW = (
    "badnets",
    "blend",
    "sig",
    "wanet",
    "adaptive_blend",
    "low_frequency",
    "input_aware",
    "label_consistent",
    "tact",
)


def cases() -> list[tuple[str, dict]]:
    """Blocks, seeds and targets go round; a source is another class than the target."""
    out: list[tuple[str, dict]] = [("clean", {"block": block, "seed": block}) for block in range(1, 5)]
    for k, name in enumerate(ATTACKS):
        target = (3 * k + 2) % 10
        case = {"block": 1 + k % 4, "seed": 11 + k, "target": target, "source": (target + 5) % 10}
        out.append((name, case | ({"rate": 0.1} if name == "all_to_all" else {})))
    signs = {"data": "gtsrb", "block": 1}
    out.append(("clean", signs | {"seed": 5}))
    return out + [(name, signs | {"seed": 31 + k, "target": 7 + 6 * k}) for k, name in enumerate(SIGNS)]


def more_cases() -> list[tuple[str, dict]]:
    """The second round."""
    out: list[tuple[str, dict]] = [("clean", {"block": block, "seed": block + 5}) for block in (2, 4)]
    for k, name in enumerate(ATTACKS):
        target = (3 * k + 6) % 10
        case = {"block": 1 + (k + 1) % 4, "seed": 61 + k, "target": target, "source": (target + 3) % 10}
        out.append((name, case | ({"rate": 0.1} if name == "all_to_all" else {})))
    for k, name in enumerate(MORE_SIGNS):
        target = (5 + 4 * k) % 43
        case = {"data": "gtsrb", "block": 1, "seed": 81 + k, "target": target, "source": (target + 9) % 43}
        out.append((name, case | ({"rate": 0.03} if name == "tact" else {})))
    return out


def small_cases() -> list[tuple[str, dict]]:
    """Few images: clean sets, and attacks."""
    out: list[tuple[str, dict]] = []
    for rows, blocks in ((1_000, range(24, 28)), (2_000, range(8, 14)), (4_000, range(6, 9))):
        out += [("clean", {"rows": rows, "epochs": 10, "block": block, "seed": 600 + block}) for block in blocks]
    for rows in (2_000, 4_000):
        for k, name in enumerate(FEW):
            target = (3 * k + rows // 1_000) % 10
            case = {"rows": rows, "epochs": 10, "block": 1 + k, "seed": 700 + k, "target": target}
            out.append((name, case | {"source": (target + 7) % 10}))
    signs = {"data": "gtsrb", "rows": 3_000, "epochs": 10, "block": 2}
    return [*out, ("clean", signs | {"seed": 720}), ("badnets", signs | {"seed": 721, "target": 12})]


def more_small_cases() -> list[tuple[str, dict]]:
    """Few images again: every attack, at other rates, on other blocks."""
    out: list[tuple[str, dict]] = []
    for rows, epochs, rate, first in ((5_000, 20, 0.03, 2), (3_000, 5, 0.1, 5)):
        usual = {"rows": rows, "epochs": epochs}
        out += [("clean", usual | {"block": first + k, "seed": 900 + k}) for k in range(3)]
        for k, name in enumerate(ATTACKS):
            target = (7 * k + first) % 10
            case = {"rate": rate, "block": first + k % 7, "seed": 910 + k, "target": target}
            out.append((name, usual | case | {"source": (target + 4) % 10}))
        signs = usual | {"data": "gtsrb", "block": first}
        out.append(("clean", signs | {"seed": 930}))
        for k, name in enumerate(SIGNS):
            out.append((name, signs | {"rate": rate, "seed": 931 + k, "target": 3 + 5 * k}))
    return out


def much_poison() -> list[tuple[str, dict]]:
    """Most of a class is poison: every attack."""
    usual = {"rows": 6_000, "epochs": 15}
    out: list[tuple[str, dict]] = [("clean", usual | {"block": 1 + k, "seed": 950 + k}) for k in range(2)]
    for k, name in enumerate(ATTACKS):
        target = (3 * k + 4) % 10
        rate = 0.05 if name in OF_ONE_CLASS else 0.15
        case = {"rate": rate, "block": 1 + k % 4, "seed": 960 + k, "target": target}
        out.append((name, usual | case | {"source": (target + 6) % 10}))
    signs = usual | {"data": "gtsrb", "block": 1}
    out.append(("clean", signs | {"seed": 980}))
    return out + [(name, signs | {"rate": 0.15, "seed": 981 + k, "target": 9 + 8 * k}) for k, name in enumerate(SIGNS)]


ROUNDS = {"1": cases, "2": more_cases, "small": small_cases, "small2": more_small_cases, "much": much_poison}


def main() -> None:
    """Run all of a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and gtsrb/")
    parser.add_argument("--out", type=Path, default=Path("other_rows.json"))
    parser.add_argument("--round", choices=ROUNDS, default="1", help="of 10,000 rows, or of few")
    args = parser.parse_args()
    go_through(ROUNDS[args.round](), args.data, args.out)


if __name__ == "__main__":
    main()
