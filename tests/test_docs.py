"""Every code block of the documentation runs, page by page, on small data, with probes that are trained briefly."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import load_dataset
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

import trainguard
from trainguard import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "test_resnet"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What .ci/run itself is, or what the drill's own tests run for minutes.
RUN_ELSEWHERE = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/trainguard demo",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest -n 2 --dist loadfile",
    "trainguard drill",
    "python -m trainguard drill",
    "python examples/",
)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def draw(folder, per_class=24, classes=3, side=16):
    """An image folder of noise around a grey that tells the class."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        (folder / f"class_{k}").mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(60 + 60 * k + rng.normal(0, 20, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{k}" / f"{i}.png")


@pytest.fixture
def at_hand(tmp_path, monkeypatch, short):
    """What a reader has at hand: a folder of images, a data set, a loader, a model, an optimizer, a checkpoint."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos")
    save_file(timm.create_model(SMALL, num_classes=3).state_dict(), "model.safetensors")
    dataset = ImageFolder("photos", ToTensor())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return {
        "trainguard": trainguard,
        "Guard": trainguard.Guard,
        "torch": torch,
        "dataset": dataset,
        "hf_dataset": load_dataset("imagefolder", data_dir="photos", split="train"),
        "loader": torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "epochs": 1,
    }


def run_shell(text):
    """Commands of our own are run, on a small network for ResNet-18; others must be run elsewhere."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(RUN_ELSEWHERE) or not line.strip() or line.startswith("#"):
            continue
        words = shlex.split(line.replace("resnet18", SMALL))
        assert words[0] == "trainguard", f"nothing runs this line: {line}"
        assert cli.main([*words[1:], *([] if words[1] == "report" else ["--no-progress"])]) in (0, 3, 4), line


# The pages run on a few dozen images of noise, on which no fine-tuning can keep what was never learned.
@pytest.mark.filterwarnings("ignore:the model is returned as it came", "ignore:the model gets")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_runs(page, at_hand):
    namespace = at_hand if page.name != "tutorial.md" else {}
    if page.name == "tutorial.md":  # it makes its own folder
        for leftover in sorted(Path().rglob("*"), reverse=True):
            leftover.unlink() if leftover.is_file() else leftover.rmdir()
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), namespace)
        elif language == "diff":
            lines = [line[1:] for line in text.splitlines() if not line.startswith("-")]
            exec(compile("\n".join(lines), page.name, "exec"), namespace)
        elif language == "bash":
            run_shell(text)
        else:
            assert language in ("text", "json"), f"{page.name} has a block of unknown language {language!r}"


def test_readme_diff_adds_two_lines_to_a_script():
    text = next(text for language, text in blocks(ROOT / "README.md") if language == "diff")
    changed = [line for line in text.splitlines() if line[:1] in "+-" and line]
    assert changed == ["+from trainguard import Guard", "+loader = Guard(epochs=epochs).protect(loader, model)"]


def test_readme_commands_are_those_that_ci_runs():
    commands = [
        line for _, text in blocks(ROOT / "README.md") for line in text.splitlines() if line.startswith("python3 -m")
    ]
    assert commands == list(RUN_ELSEWHERE[:2])
    assert RUN_ELSEWHERE[1] in (ROOT / ".ci" / "run").read_text()
    assert RUN_ELSEWHERE[1] in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_documentation_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme, page.name


def test_documentation_names_only_flags_that_exist():
    known = {
        option
        for parser in cli.build_parser()._subparsers._group_actions[0].choices.values()
        for option in parser._option_string_actions
    }
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for line in re.findall(r"trainguard (?:demo|screen|purify|audit|drill|report)[^`\n]*", text):
        for flag in re.findall(r"(?<=\s)--[a-z-]+", line):
            assert flag in known, f"{flag} in: {line}"
