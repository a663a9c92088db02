import difflib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from flagged import SCREENING, result_for
from PIL import Image

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
OPTIONAL = {"hf_trainer": "transformers", "lightning": "lightning"}
HOSTS = {  # lines that a guarded script has more than its base, and what it is started with
    "accelerate": (4, ["--cpu", "--rows", "96", "--attack", "badnets"]),
    "timm": (3, ["--size", "32", "--model", "resnet10t"]),
    "datasets": (3, []),
    "hf_trainer": (2, []),
    "lightning": (2, []),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small images of 3 classes that a colour tells apart: parquet files, and a folder beside them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "parquet").mkdir()
    names = ["red", "green", "blue"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, count, there in (("train", 96, "train"), ("test", 30, "validation")):
        pixels = np.random.default_rng(count).integers(0, 128, (count, 16, 16, 3), dtype=np.uint8)
        for index in range(count):
            pixels[index, :, :, index % 3] += 100
            path = folder / "folder" / there / names[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet" / f"{split}.parquet")
    return folder


@pytest.fixture
def screened(monkeypatch):
    """How many images were screened, each time; the first eight are flagged."""
    sizes = []

    def screen_images(images, model=None, **options):
        sizes.append(len(images))
        return result_for(images, range(8))

    monkeypatch.setattr(SCREENING, screen_images)
    return sizes


@pytest.mark.parametrize("host", HOSTS)
def test_guarded_scripts_differ_in_marked_lines_only(host):
    base, guarded = ((EXAMPLES / f"{host}_{form}.py").read_text().splitlines() for form in ("base", "guarded"))
    changes = [line for line in difflib.ndiff(base, guarded) if line[0] in "+-" and line.strip() != "+"]
    assert all(line.startswith("+ ") and line.endswith("  # trainguard") for line in changes)
    assert len(changes) == HOSTS[host][0] and sum("import" in line for line in changes) == 1
    assert f"`{host}_base.py` and `{host}_guarded.py` differ" in "\n".join(base)


@pytest.mark.parametrize("form", ["base", "guarded"])
@pytest.mark.parametrize("host", HOSTS)
def test_scripts_train_on_small_data(host, form, data, screened, monkeypatch, tmp_path, capsys):
    if host in OPTIONAL:
        pytest.importorskip(OPTIONAL[host], reason=f"needs {OPTIONAL[host]}: pip install 'trainguard[hosts]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(f"{host}_{form}", EXAMPLES / f"{host}_{form}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = data / ("folder" if host == "timm" else "parquet")
    script.main(["--data", str(folder), "--epochs", "2", "--batch-size", "16", *HOSTS[host][1]])
    printed = capsys.readouterr().out
    assert 0 <= float(re.search(r"^ACC ([\d.]+)$", printed, re.MULTILINE)[1]) <= 1
    assert screened == ([96] if form == "guarded" else [])
    assert ("poisoned 0" in printed) == ((host, form) == ("accelerate", "guarded"))


def test_the_guard_imports_no_host():
    code = "import sys, trainguard.guard, trainguard.integrations; print([m for m in {} if m in sys.modules])"
    hosts = ("accelerate", "timm", "datasets", "transformers", "lightning")
    run = subprocess.run([sys.executable, "-c", code.format(hosts)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
