"""What one fitted judgement in place of the bars of `screening/bars.py` would make of the parts on record.

    python docs/results/fitted.py

Learns from all parts whose records hold every figure, but those of one fold, and judges that fold: CIFAR-10 and traffic
signs are five folds each, every other set is one. Parts of a target class that did not count as poison are left out,
for no record says what they hold.
"""

import json
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

FIGURES = {  # what speaks for poison (1) or against it (-1) as it grows
    "distance": 1,
    "valley": -1,
    "trigger": 1,
    "relative": -1,
    "company": -1,
    "diversity": 1,
    "scatter": 1,
    "firmness": 0,
    "disbelief": 0,
    "likeness": -1,
    "at_source": 1,
    "kinship": 1,
    "resemblance": -1,
    "skill": 0,
    "told": 1,
    "elsewhere": -1,
    "suspected": 1,
    "share": -1,
}
FOLDS = 5  # of CIFAR-10 and of the signs
BOOSTED = {"max_iter": 150, "max_leaf_nodes": 6, "learning_rate": 0.08, "min_samples_leaf": 8}


def figures(part: dict) -> list[float]:
    """Of a part on record, those without an end on a logarithmic scale or cut off."""
    known = part["agreement"] / part["reference"] if part["reference"] >= 0.2 else 1.0
    changed = {
        "distance": np.log(max(1.0, part["distance"])),
        "relative": min(1.5, known),
        "company": min(2.0, part["company"]),
        "firmness": min(1.5, part["firmness"]),
        "disbelief": min(3.0, part["disbelief"]),
        "likeness": np.log(max(0.003, part["likeness"])),
        "suspected": np.log(part["suspected"]),
        "share": part["suspected"] / part["members"],
    }
    return [float((part | changed)[name]) for name in FIGURES]


def models() -> dict:
    """The two judgements."""
    squares = PolynomialFeatures(2, include_bias=False)
    logistic = LogisticRegression(C=0.05, max_iter=3000)
    return {
        "boosted trees": HistGradientBoostingClassifier(monotonic_cst=list(FIGURES.values()), **BOOSTED),
        "quadratic logistic": make_pipeline(StandardScaler(), squares, StandardScaler(), logistic),
    }


def main() -> None:
    """Judge every fold by the others, and print what is right."""
    parts, poison, fold, screening = [], [], [], []
    for path in sorted(Path(__file__).parent.glob("*.json")):
        record = json.loads(path.read_text())
        rows = record.get("rows", []) if isinstance(record, dict) else []
        for number, row in enumerate(rows if isinstance(rows, list) else []):
            usual = row.get("data") in ("cifar10", "gtsrb")
            for part in row.get("findings", []):
                target = part["label"] in row["true_targets"]
                if {"told", "resemblance"} <= part.keys() and (part["strength"] > 0.5 or not target):
                    parts.append(figures(part))
                    poison.append(target)
                    fold.append(f"{row['data']} {number % FOLDS}" if usual else row["data"])
                    screening.append(f"{path.name} {number}")
    given, truth, folds, names = np.array(parts), np.array(poison), np.array(fold), np.array(screening)
    print(f"{(~truth).sum()} natural parts, {truth.sum()} poisoned ones, {len(set(screening))} screenings")
    for name, model in models().items():
        believed = np.zeros(len(truth), dtype=bool)
        for one in sorted(set(fold)):
            model.fit(given[folds != one], truth[folds != one])
            believed[folds == one] = model.predict(given[folds == one])
        false, found = set(names[believed & ~truth]), set(names[believed & truth])
        attacks = len(set(names[truth]))
        print(f"{name}: {len(found)} of {attacks} attacks found, {len(false)} screenings with a false alarm")


if __name__ == "__main__":
    main()
