import dataclasses
import html.parser
import json
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from trainguard.data.store import open_images
from trainguard.evidence import collect_evidence, samples_for_map
from trainguard.results import ScreenResult

HOSTILE = "<script>alert(1)</script>"


class Images:
    """A plain data set of uint8 images (N, H, W, C) with class names."""

    def __init__(self, pixels, labels, classes):
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return np.ascontiguousarray(self.pixels[i]), int(self.labels[i])


def make(n=120, shape=(3, 16, 16), classes=("cat", HOSTILE), flagged=0.1, with_images=True, features=0, seed=0):
    """A data set whose flagged samples carry a white square, and a screening that found them."""
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    k = len(classes)
    labels = np.arange(n) % k
    pixels = rng.integers(60, 200, (n, height, width, channels), dtype=np.uint8)
    suspect = np.zeros(n, dtype=bool)
    suspect[rng.choice(n, int(n * flagged), replace=False)] = True
    proposed = labels.copy()
    labels[suspect] = 1
    pixels[suspect, -4:-1, -4:-1] = 255
    score = rng.normal(0, 1, n).astype(np.float32)
    score[suspect] = 6 + rng.random(int(suspect.sum()))
    thresholds = np.full(k, np.inf, dtype=np.float32)
    if suspect.any():
        thresholds[1] = 5.0
    result = ScreenResult(
        score=score,
        consistency=rng.random(n, dtype=np.float32),
        suspect=suspect,
        keep=np.flatnonzero(~suspect),
        verdict="poisoned" if suspect.any() else "clean",
        confidence=0.9,
        reason=f"class {HOSTILE} has a second group of scores",
        target_classes=(1,) if suspect.any() else (),
        labels=labels,
        proposed=np.where(suspect, proposed, labels),
        thresholds=thresholds,
        class_names=tuple(classes),
        fingerprint="f1",
        settings={"seed": 0, "eps": 0.031372549, "versions": {"torch": "2"}},
        timing={"probe": 1.0, "scoring": 3.0, "total": 4.0},
        history=[{"stage": "probe", "epoch": i, "loss": 2.0, "accuracy": 0.5 + 0.1 * i} for i in range(4)],
    )
    if with_images:
        store = open_images(Images(pixels, labels, classes))
        mapped = samples_for_map(suspect, labels) if features else None
        seen = rng.normal(size=(len(mapped), features)) if features else None
        evidence = collect_evidence(store, score, suspect, labels, result.proposed, thresholds, mapped, seen)
        result = dataclasses.replace(result, evidence=evidence)
    return result


class Page(html.parser.HTMLParser):
    """What a test asks of a page: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.text = ""
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def screened():
    """The function that makes a screening."""
    return make


@pytest.fixture(scope="session")
def read():
    """The function that reads a page."""
    return Page


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Open a page in Chromium, run a script in it, and give back what the script writes with `say(...)`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the path: .ci/run installs it where it may")
    folder = tmp_path_factory.mktemp("browser")

    def run(page, script="say('opened')", size="1200,900", dark=False):
        copy = folder / f"{abs(hash((str(page), script)))}.html"
        talk = "const say = (x) => { document.documentElement.dataset.said = encodeURIComponent(JSON.stringify(x)); };"
        source = Path(page).read_text(encoding="utf-8")
        copy.write_text(f"{source}<script>{talk}{script}</script>", encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", "--virtual-time-budget=2000"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        opening = done.stdout[: done.stdout.index(">", done.stdout.index("<html"))]
        said = opening.split('data-said="')[1].split('"')[0]
        return json.loads(urllib.parse.unquote(said)), console

    return run
