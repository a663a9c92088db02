"""The demo with a screening that knows the truth: what it prints, keeps and draws."""

import json

import numpy as np
import pytest
from PIL import Image

from trainguard.drill.demo import run_demo
from trainguard.errors import StateError


@pytest.mark.filterwarnings("ignore:the model")  # two epochs teach it little
def test_the_demo_prints_its_table_and_keeps_a_picture(screened, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run_demo(epochs=2, progress=False)
    shown = capsys.readouterr().out
    assert "115 of 1438 training images" in shown and "verdict on the set: poisoned, target class 1" in shown
    row = next(
        line for line in shown.splitlines() if line.startswith("guarded, relabelled") or " guarded, relabelled" in line
    )
    assert row.split()[-4:-1] == ["115", "114", "1"]  # flagged, poison among them, missed
    assert [cell.defense for cell in done.cells] == ["none", "guard", "guard+relabel", "guard+purify"]
    folder = tmp_path / "trainguard-demo"
    assert json.loads((folder / "drill.json").read_text())["cells"][1]["flagged"] == 115
    with Image.open(folder / "flagged.png") as picture:
        red = np.asarray(picture.convert("RGB"))[..., 0].astype(int) - np.asarray(picture.convert("RGB"))[..., 2]
    assert (red > 100).sum() > 2000 and (red < -80).sum() > 100  # frames of poison, and of the one mistake


def test_the_demo_does_not_write_over_another_result(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(StateError, match="holds another result, which would be overwritten"):
        run_demo(out=tmp_path)
    (tmp_path / "drill" / "cells").mkdir(parents=True)
    with pytest.raises(StateError, match="holds another result, which would be overwritten"):
        run_demo(out=tmp_path / "drill")


@pytest.mark.slow
def test_the_demo_implants_and_defends(tmp_path):
    done = run_demo(out=tmp_path, progress=False)
    found = {cell.defense: cell for cell in done.cells}
    assert found["none"].asr > 0.9
    assert found["guard"].asr < 0.05 and found["guard+relabel"].asr < 0.05
    assert found["guard+purify"].asr < 0.05
    assert found["guard"].verdict == "poisoned" and found["guard"].target_classes == (1,)
