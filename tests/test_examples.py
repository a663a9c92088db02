import difflib
import importlib.util
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Parquet files as CIFAR-10's, of 3 classes that a colour tells apart."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )
    for split, count in (("train", 240), ("test", 60)):
        rng = np.random.default_rng(count)
        pixels = rng.integers(0, 128, (count, 16, 16, 3), dtype=np.uint8)
        for index in range(count):
            pixels[index, :, :, index % 3] += 100
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def run(name, folder, capsys, *more):
    """What a script prints as ACC and ASR."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--data", str(folder), "--epochs", "6", "--batch-size", "24", *more])
    return {
        what: float(share) for what, share in re.findall(r"^(ACC|ASR) ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    }


def test_the_guarded_script_differs_in_one_import_and_two_lines():
    plain, guarded = ((EXAMPLES / f"plain_pytorch{form}.py").read_text().splitlines() for form in ("", "_guarded"))
    changes = [line for line in difflib.ndiff(plain, guarded) if line[0] in "+-"]
    assert all(line.startswith("+ ") and line.endswith("  # trainguard") for line in changes)
    assert sum("import" in line for line in changes) == 1 and len(changes) == 3


@pytest.mark.parametrize("name", ["plain_pytorch", "plain_pytorch_guarded"])
def test_the_scripts_train_and_print_both_rates(name, tiny_data, short, capsys):
    shares = run(name, tiny_data, capsys, "--attack", "badnets")
    assert set(shares) == {"ACC", "ASR"} and all(0 <= share <= 1 for share in shares.values())
    assert shares["ACC"] > 0.5


def test_without_an_attack_there_is_no_success_rate(tiny_data, capsys):
    assert set(run("plain_pytorch", tiny_data, capsys, "--attack", "none", "--rows", "64")) == {"ACC"}


def test_the_oracle_trains_on_what_the_attack_left_alone(tiny_data, capsys):
    shares = run("plain_pytorch", tiny_data, capsys, "--attack", "badnets", "--oracle")
    assert shares["ASR"] <= 0.5 < shares["ACC"]
