"""Make the pictures of reports that the documentation shows, from the folder of a finished drill.

    trainguard drill DATA --attacks badnets,blend,sig,clean --defenses guard,guard+purify,audit --out runs/drill
    python docs/pictures/make.py runs/drill

Needs Chromium.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from trainguard import ScreenResult
from trainguard.report import build

HERE = Path(__file__).parent
COLOURS = 96  # of each picture: they stay small


def photograph(page, name, *, part="", width=1000, height=900, dark=False):
    """One picture of a page, or of its section `part` alone, as large as a screen of that size."""
    if part:
        alone = f"<style>header, nav, footer, section:not(#{part}) {{ display: none !important }}</style>"
        copy = page.with_name(f"{part}.html")
        copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{alone}</head>"), encoding="utf-8")
        page = copy
    chromium = shutil.which("chromium") or "google-chrome"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    target = HERE / f"{name}.png"
    command = [chromium, *options, f"--screenshot={target}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(COLOURS)
    small.save(target, optimize=True)
    print(target)


def main():
    """Pages first, then the pictures of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", type=Path, help="folder of a finished drill")
    drill = parser.parse_args().drill
    with tempfile.TemporaryDirectory() as folder:
        for name in ("badnets", "blend", "sig", "clean"):
            found = drill / "cells" / f"{name}-guard-seed0" / "result"
            if not found.exists():
                continue
            result = ScreenResult.load(found)
            page = result.report(Path(folder) / f"{name}.html")
            photograph(page, f"{name}_top")
            if result.suspect.any():
                photograph(page, f"{name}_in_common", part="in-common", height=520)
            if name == "badnets":
                photograph(page, "badnets_samples", part="flagged-samples", height=1100)
                photograph(page, "badnets_phone", part="flagged-samples", width=390, height=800, dark=True)
                photograph(page, "badnets_scores", part="scores", height=700)
        audit, purified = (drill / "cells" / f"badnets-{name}-seed0" for name in ("audit", "guard+purify"))
        if audit.exists():
            photograph(build(audit, Path(folder) / "audit.html"), "audit", height=1300)
        if purified.exists():
            page = build(purified / "purified.safetensors", Path(folder) / "purification.html")
            photograph(page, "purification", height=1100)
        photograph(build(drill, Path(folder) / "drill.html"), "drill", height=1400)


if __name__ == "__main__":
    main()
