import csv
import dataclasses
import json
import os
import pathlib
import re
import types
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import datasets
import matplotlib
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from trainguard.data.store import open_images
from trainguard.drill.defenses import DEFENSES
from trainguard.drill.repairs import REPAIRS
from trainguard.errors import DataError, StateError
from trainguard.evidence import collect_evidence
from trainguard.purification.results import AuditResult, PurifyResult
from trainguard.report import build, charts
from trainguard.report import purification as purification_page
from trainguard.report.audit import _advice
from trainguard.report.page import _load
from trainguard.report.parts import costs, percent
from trainguard.report.screening import plane
from trainguard.results import ScreenResult


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, screened):
    """A page with everything on it, and its result."""
    result = screened(features=4)
    return build(result, tmp_path_factory.mktemp("poisoned") / "report.html"), result


def audit_of(k):
    share = np.full((k, k), 0.2 / k, dtype=np.float32)
    share[:, k // 2] += 0.8
    patch = np.array([[5, 6, 1.0], [7, 6, 0.0]], dtype=np.float32)
    return AuditResult(
        verdict="backdoored",
        confidence=0.95,
        reason="they pile up",
        target_classes=(k // 2,),
        transitions=share,
        pull=share.mean(0),
        movement=np.zeros(k, dtype=np.float32),
        patch_success=0.87,
        patch=patch,
        images=500,
    )


def purification():
    rows = [
        {"round": r, "step": step, "batches": batches, "loss": 1.0, "accuracy": 0.8 + 0.01 * r, "seconds": 2.0}
        for r in range(2)
        for step, batches in (("adversarial", 0), ("plain", 8))
    ]
    keep = np.arange(10)
    return PurifyResult(
        None, rows, keep, 0.83, 0.81, True, "the set no longer changes", "f", {"seed": 0}, {"total": 8.0}
    )


def drill():
    cells = [
        {"attack": attack, "defense": defense, "seed": 0, "acc": 0.8, "asr": asr, "payload": payload, "flagged": 5}
        | {"tpr": None, "fpr": None, "auroc": None, "verdict": None, "screen_seconds": 1.0, "train_seconds": 3.0}
        | {"peak_mb": 100}
        for attack, defense, asr, payload in [
            ("badnets", "none", 0.97, 5),
            ("badnets", "guard", 0.01, 5),
            ("wanet", "none", 0.1, 5),
            ("wanet", "guard", 0.02, 5),
            ("clean", "none", None, 0),
            ("clean", "guard", None, 0),
        ]
    ]
    return {"settings": {"train_images": 100}, "cells": cells, "versions": {"torch": "2"}, "machine": {"cpus": 2}}


def test_page_is_one_file_that_loads_nothing(poisoned, read):
    page = read(poisoned[0])
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), attributes
    assert "url(http" not in page.source and "@import" not in page.source
    policy = next(tag for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_page_shows_what_was_seen_in_each_class(tmp_path, screened, read):
    result = screened(with_images=False)
    seen = {"suspected": 12, "distance": 8.25, "valley": 0.01, "agreement": 0.04, "reference": 0.97, "transfer": -0.1}
    near = {"label": 0, "members": 60, "strength": 0.0, "distance": 2.5, "valley": 0.9, "agreement": 1.0}
    result.settings["findings"] = [{**seen, **near}, {"label": 1, "members": 60, "strength": 0.99} | seen]
    page = read(build(result, tmp_path / "report.html"))
    assert "8.25" in page.text and "4.0%" in page.text and "99.0%" in page.text
    assert "2.5" in page.text and "100.0%" not in page.text.split("Two parts of a class")[1].split("Scores")[0]
    assert "findings" not in page.text


def test_page_maps_the_features_that_the_evidence_holds(tmp_path, screened, read):
    from dataclasses import replace

    result = screened()
    index = np.arange(40)
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float16)
    result = replace(result, evidence=replace(result.evidence, mapped=index, features=features))
    flagged = int(result.suspect[:40].sum())
    page = read(build(result, tmp_path / "report.html"))
    assert f"Samples as the probe sees them: {40 - flagged} kept and {flagged} flagged samples" in page.source


def test_page_says_what_was_found(poisoned, read):
    page = read(poisoned[0])
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    assert len(headings) == 12
    assert "12 of 120 samples (10.0%) carry what looks like a backdoor trigger for 1 (" in page.text
    assert "90%" in page.text and "a second group of scores" in page.text and "0.031372549" in page.text
    assert "at the bottom right" in page.text
    assert len(page.all("figure")) > 12 * 3


def test_page_shows_hostile_names_as_text(poisoned, read):
    page = read(poisoned[0])
    assert "<script>alert(1)" not in page.source
    assert "1 (<script>alert(1)</script>)" in page.text
    assert len(page.all("script")) == 1


def test_page_can_be_heard(poisoned, read):
    page = read(poisoned[0])
    assert all(image.get("alt") for image in page.all("img"))
    assert all(drawing.get("role") == "img" and drawing.get("aria-label") for drawing in page.all("svg"))
    assert page.all("html")[0]["lang"] == "en" and len(page.all("main")) == 1 and len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    labelled = {label["for"] for label in page.all("label")}
    assert {field["id"] for field in page.all("input")} == labelled
    ids = [attributes["id"] for tag, attributes in page.tags if "id" in attributes and tag != "path"]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in page.all("a")}
    assert targets <= set(ids)


def test_page_drawings_take_their_colours_from_the_page(poisoned, read):
    drawings = re.findall(r"<svg.*?</svg>", read(poisoned[0]).source, flags=re.DOTALL)
    assert len(drawings) == 1 + 2 + 2 + 1  # all classes, two classes, loss and accuracy, map
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
        assert "var(--" in drawing


def test_page_exports_every_decision(poisoned):
    path, result = poisoned
    with open(path.with_name("keep.csv")) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "proposed", "score", "flagged", "keep"]
    assert [int(row["index"]) for row in rows if row["keep"] == "true"] == result.keep.tolist()
    table = parquet.read_table(path.with_name("keep.parquet"))
    np.testing.assert_array_equal(table["flagged"].to_numpy(), result.suspect)
    np.testing.assert_array_equal(table["score"].to_numpy(), result.score)


def test_two_pages_in_one_folder_keep_their_exports_apart(tmp_path, screened):
    for name in ("a", "b"):
        build(screened(with_images=False), tmp_path / f"{name}.html")
    assert {p.name for p in tmp_path.glob("*.csv")} == {"a.keep.csv", "b.keep.csv"}


def test_page_of_a_saved_result_is_that_of_the_live_one(tmp_path, screened):
    result = screened()
    result.save(tmp_path / "saved")
    build(result, tmp_path / "live.html")
    build(tmp_path / "saved", tmp_path / "loaded.html")
    live, loaded = ((tmp_path / f"{name}.html").read_text() for name in ("live", "loaded"))
    assert live.replace("live.keep", "loaded.keep") == loaded


def test_page_with_nothing_flagged_says_so(tmp_path, screened, read):
    page = read(build(screened(flagged=0.0, features=2), tmp_path / "report.html"))
    assert "No sign of backdoor poison" in page.text and "All 120 readable samples were kept." in page.text
    assert "Flagged samples beside clean ones" not in page.text
    assert "Borderline samples" in page.text


def test_page_without_images_says_how_to_get_them(tmp_path, screened, read):
    page = read(build(screened(with_images=False), tmp_path / "report.html"))
    assert "result.report(path, dataset=dataset)" in page.text and not page.all("img")


def test_page_names_unreadable_samples(tmp_path, screened, read):
    from dataclasses import replace

    result = screened(with_images=False)
    labels, score = result.labels.copy(), result.score.copy()
    labels[7], score[7] = -1, np.nan
    result = replace(result, labels=labels, score=score, unreadable=(7,), keep=np.setdiff1d(result.keep, 7))
    page = read(build(result, tmp_path / "report.html"))
    assert "1 samples could not be read" in page.text or "1 sample could not be read" in page.text
    assert "row 7" in page.text


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 512, 512)])
def test_page_shows_images_of_any_size(tmp_path, screened, read, shape):
    page = read(build(screened(n=60, shape=shape), tmp_path / "report.html"))
    assert len(page.all("img")) > 20
    assert len(page.source) < 10_000_000


def test_page_of_many_classes_and_samples_stays_small(tmp_path, read):
    n, k = 200_000, 1000
    rng = np.random.default_rng(0)
    suspect = rng.random(n) < 0.05
    labels = np.where(suspect, 3, rng.integers(0, k, n))
    result = ScreenResult(
        score=rng.normal(size=n).astype(np.float32) + 5 * suspect,
        consistency=np.zeros(n, dtype=np.float32),
        suspect=suspect,
        keep=np.flatnonzero(~suspect),
        verdict="poisoned",
        confidence=1.0,
        reason="",
        target_classes=(3,),
        labels=labels,
        proposed=labels,
        thresholds=np.full(k, 3.0, dtype=np.float32),
        class_names=tuple(f"class number {i}" for i in range(k)),
    )
    page = read(build(result, tmp_path / "report.html"))
    assert len(page.source) < 2_000_000
    assert f"The 1,000 most suspicious of {suspect.sum():,}" in page.text
    assert page.text.count("class number 999") == 1


def test_page_of_an_audit_names_the_target(tmp_path, read):
    audit_of(5).save(tmp_path / "audit")
    page = read(build(tmp_path / "audit", tmp_path / "report.html"))
    assert "This model looks backdoored" in page.text
    assert "They pile up." in page.text and "Suspected target" in page.text
    assert page.text.count("84.0%") >= 5
    assert "changes 87% of them" in page.text and "rows 5 to 7, columns 6 to 6" in page.text


def test_page_of_an_audit_with_many_classes_draws_the_matrix(tmp_path, read):
    page = read(build(audit_of(100), tmp_path / "report.html"))
    assert len(page.all("img")) == 2 and len(page.source) < 200_000


def test_time_that_no_stage_has_gets_a_row_beside_those_that_have():
    stages = lambda timing: [row[0] for row in costs(timing).rows]  # noqa: E731
    assert stages({"plain": 3.0, "total": 10.0}) == ["plain", "everything else", "total"]
    assert stages({"plain": 9.95, "total": 10.0}) == ["plain", "total"] and stages({"total": 10.0}) == ["total"]


def test_page_of_a_purification_needs_no_weights(tmp_path, read):
    live = build(purification(), tmp_path / "live.html")
    (tmp_path / "pure.json").write_text(json.dumps(purification().to_dict()))
    saved = build(tmp_path / "pure.safetensors", tmp_path / "saved.html")
    assert live.read_text() == saved.read_text()
    assert "83.0% before, 81.0% after" in read(live).text and "Screening the data" not in read(live).text
    found = {"verdict": "poisoned", "flagged": 1234, "reason": "they differ"}
    screened = dataclasses.replace(purification(), settings={"seed": 0, "screening": found})
    page = read(build(screened, tmp_path / "screened.html"))
    assert "Each round fine-tunes on the extra set itself, then ranks all images" in page.text
    assert "first flagged 1,234 images; their labels were unlearned: they differ." in page.text


def test_page_of_a_drill_counts_only_attacks_that_implanted(tmp_path, read):
    (tmp_path / "drill.json").write_text(json.dumps(drill()))
    page = read(build(tmp_path, tmp_path / "report.html"))
    assert "left out of the means: wanet" in page.text
    assert "did not implant (10%)" in page.text
    facts = dict(
        zip(re.findall(r"<dt>(.*?)</dt>", page.source), re.findall(r"<dd>(.*?)</dd>", page.source), strict=True)
    )
    assert facts == {"ASR, none": "97.0%", "ASR, guard": "1.0%"}


def test_build_says_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="holds no result"):
        build(tmp_path, tmp_path / "report.html")
    with pytest.raises(TypeError, match="got int"):
        build(3, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_saved_result_whose_files_do_not_belong_together_is_refused(tmp_path, screened):
    folder = screened(seed=1).save(tmp_path / "saved")
    arrays = (folder / "arrays.npz").read_bytes()
    screened(seed=2).save(folder)
    (folder / "arrays.npz").write_bytes(arrays)  # as where a save was killed between its files
    with pytest.raises(ValueError, match="does not belong to the result"):
        ScreenResult.load(folder)
    screened(with_images=False).save(folder)
    assert ScreenResult.load(folder).evidence is None


def test_the_page_of_other_data_is_refused(tmp_path, screened):
    data = TensorDataset(torch.rand(120, 3, 16, 16), torch.arange(120) % 2)
    with pytest.raises(ValueError, match="pass the data set that was screened"):
        build(screened(with_images=False), tmp_path / "report.html", dataset=data)


def test_names_of_any_bytes_can_be_written(tmp_path, screened):
    result = screened()
    names = np.full(len(result.evidence.names), "caf\udce9.png")
    result = dataclasses.replace(result, evidence=dataclasses.replace(result.evidence, names=names))
    page = build(result, tmp_path / "report.html")
    assert "caf\\udce9.png" in page.read_text()


@pytest.mark.parametrize("name", ["result.json", "audit.json", "drill.json", "weights.json"])
@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_record_is_named(tmp_path, name, damage):
    content = damage or '{"kind": "purify"'
    (tmp_path / name).write_text(content if name != "weights.json" else '{"kind": "purify"')
    with pytest.raises(ValueError, match=rf"{name[:-5]}\.json (cannot be read|holds a list)"):
        build(tmp_path, tmp_path / "page.html")


def test_rounds_are_counted_from_one(tmp_path, read):
    record = purification().to_dict()
    assert [row[0] for row in purification_page.context(record)["history"].rows] == [1, 1, 2, 2]
    assert record["history"][0]["round"] == 0


def test_of_several_purifications_none_is_guessed(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text('{"kind": "purify"}')
    with pytest.raises(ValueError, match="holds 2 purifications: pass the file of one"):
        build(tmp_path, tmp_path / "page.html")


def test_a_class_name_that_is_no_text_can_be_drawn(tmp_path, screened, read):
    result = dataclasses.replace(screened(), class_names=("caf\udce9", "狐", "c", "d")[: len(screened().class_names)])
    assert "caf" in read(build(result, tmp_path / "page.html")).text


def test_a_bend_that_leads_nowhere_is_not_shown_as_one(tmp_path, read):
    bent = dataclasses.replace(audit_of(3), bend=np.array([0.05, 0.3, 0.12], dtype=np.float32))
    text = read(build(bent, tmp_path / "page.html")).source
    assert "0.05" in text and "0.12" in text and ">0.3<" not in text


def test_images_that_are_all_the_same_have_a_map_too():
    assert not plane(np.zeros((80, 32), np.float16)).any()


def test_a_folder_of_two_results_is_not_shown_as_one(tmp_path, screened):
    screened().save(tmp_path)
    audit_of(3).save(tmp_path)
    with pytest.raises(ValueError, match=r"several results \(result.json, audit.json\)"):
        build(tmp_path, tmp_path / "page.html")


def test_a_result_is_not_applied_to_a_folder_in_another_order(screened):
    result = screened()
    folder = types.SimpleNamespace(samples=[], targets=result.labels[::-1].tolist(), target_transform=None)
    folder = type("Folder", (), vars(folder) | {"__len__": lambda self: len(result.labels)})()
    assert not np.array_equal(result.labels, result.labels[::-1])
    with pytest.raises(ValueError, match="screened are others, or have another order here"):
        result.apply(folder)


def test_a_result_is_not_applied_to_a_folder_whose_files_were_exchanged(screened):
    result = screened()
    named = dataclasses.replace(result.evidence, named=np.array([1]), names=np.array(["row 1 (old/cat/b.png)"]))
    result = dataclasses.replace(result, evidence=named)

    class Folder(list):
        def __init__(self, second):
            super().__init__((0, int(label)) for label in result.labels)
            self.samples = [("new/cat/a.png", 0), (second, 0)]

    assert len(result.apply(Folder("new/cat/b.png"))) == len(result.keep)
    for other in ("c.png", ".png"):  # the end of a name is another name
        with pytest.raises(ValueError, match=rf"row 1 was old/cat/b\.png and is new/cat/{other} here; screen it anew"):
            result.apply(Folder(f"new/cat/{other}"))


def test_a_result_is_not_applied_to_samples_in_another_order(screened):
    result = screened()
    labels, n = torch.from_numpy(result.labels), len(result.labels)
    base, there = TensorDataset(torch.zeros(n, 1), labels), torch.arange(n - 1, -1, -1)
    whole = [base, Subset(base, range(n)), Subset(Subset(base, there.tolist()), there.tolist())]
    for same in (*whole, [base[i] for i in range(n)]):
        assert len(result.apply(same)) == len(result.keep)
    for other in (Subset(base, there.tolist()), TensorDataset(torch.zeros(n, 1), labels[there]), [*base][::-1]):
        with pytest.raises(ValueError, match="have another order here"):
            result.apply(other)

    class Photos:
        labels = (0, 1)  # the numbers of its classes, one for each class

        def __len__(self):
            return n

    assert len(result.apply(Subset(Photos(), range(n)))) == len(result.keep)
    with pytest.raises(TypeError, match="got NoneType, which has no length"):
        result.apply(None)


def test_a_result_is_not_applied_to_other_data_and_is_to_its_own(tmp_path, screened):
    result = screened(n=40)
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        for i in np.flatnonzero(result.labels == label):
            Image.new("RGB", (4, 4)).save(tmp_path / str(label) / f"{i:03}.png")
    own = ImageFolder(tmp_path)
    sorted_result = dataclasses.replace(result, labels=np.array(own.targets))
    assert len(sorted_result.apply(own)) == len(result.keep)
    own.targets = [1 - label for label in own.targets[:-1]] + [own.targets[-1]]
    with pytest.raises(ValueError, match="screened are others"):
        sorted_result.apply(own)

    class Coarse(ImageFolder):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, (label + 5) % 7

    coarse = Coarse(tmp_path)
    mapped = dataclasses.replace(result, labels=(np.array(coarse.targets) + 5) % 7)
    assert len(mapped.apply(coarse)) == len(result.keep)
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = datasets.Dataset.from_dict({"label": [2] * 40}, features=features)
    with pytest.raises(ValueError, match="screened are others"):
        result.annotate(table)
    right = datasets.Dataset.from_dict({"label": result.labels.tolist()}, features=features)
    assert result.annotate(result.annotate(right)).column_names == ["label", "poison_score", "keep"]
    with pytest.raises(ValueError, match="a column 'keep' of its own: rename it"):
        result.annotate(right.add_column("keep", ["mine"] * 40))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, screened, monkeypatch):
    old, new = screened(seed=1), screened(seed=2)
    old.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written = pathlib.Path.write_bytes

    def full(path, content):
        if "evidence" in path.name:
            raise OSError(28, "No space left on device")
        return written(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(StateError, match="the disk is full"):
        new.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_pictures_that_are_missing_are_said_to_be_and_those_left_over_are_none(tmp_path, screened):
    result = screened()
    result.save(tmp_path)
    left = (tmp_path / "evidence.npz").read_bytes()
    (tmp_path / "evidence.npz").unlink()
    with pytest.raises(ValueError, match=r"evidence\.npz does not belong"):
        ScreenResult.load(tmp_path)
    dataclasses.replace(result, evidence=None).save(tmp_path)
    (tmp_path / "evidence.npz").write_bytes(left)
    assert ScreenResult.load(tmp_path).evidence is None


def test_the_users_style_of_drawing_is_neither_used_nor_changed(tmp_path, screened):
    plain = build(screened(), tmp_path / "page.html").read_text()
    with matplotlib.rc_context({"text.usetex": True, "axes.grid": True, "axes.facecolor": "black"}):
        held = dict(matplotlib.rcParams)
        assert build(screened(), tmp_path / "page.html").read_text() == plain
        assert dict(matplotlib.rcParams) == held


def test_where_no_kept_sample_has_the_label_that_is_said(tmp_path, screened, read):
    result = screened(n=400)
    evidence = dataclasses.replace(result.evidence, kept_counts=np.zeros_like(result.evidence.counts))
    page = read(build(dataclasses.replace(result, evidence=evidence), tmp_path / "page.html"))
    assert "none is left with a label that these would get" in page.text and "beyond chance" not in page.text
    assert "The difference is local" not in page.text
    assert "The difference is local" in read(build(result, tmp_path / "known.html")).text


def test_averages_know_how_many_kept_images_they_stand_on(screened):
    assert 1 < screened(n=400).evidence.kept_counts[0] <= 400


def test_figures_that_are_no_numbers_leave_gaps(tmp_path, screened):
    found = {"label": 1, "members": 60, "suspected": 12, "strength": 0.9, "distance": 5.0, "valley": 0.1}
    odd = found | {"distance": float("inf"), "strength": float("nan"), "agreement": float("nan")}
    result = dataclasses.replace(screened(), settings={"findings": [found | {"agreement": 0.1}, odd]})
    result.save(tmp_path)
    for page in (build(result, tmp_path / "live.html"), build(tmp_path, tmp_path / "saved.html")):
        assert "What was seen in each class" in page.read_text()


def test_a_drill_without_a_cell_has_a_page(tmp_path):
    (tmp_path / "drill.json").write_text(json.dumps(drill() | {"cells": []}))
    assert build(tmp_path, tmp_path / "page.html").is_file()


def test_an_audit_names_a_few_targets_and_counts_the_rest():
    many = dataclasses.replace(audit_of(100), target_classes=tuple(range(100)))
    assert "0, 1, 2, 3, 4, 5, 6, 7, and 92 more" in repr(many)


def test_names_that_are_no_text_can_be_printed(screened):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    result = dataclasses.replace(screened(), class_names=("cat", name))
    assert "caf\\udce9" in repr(result).encode().decode()


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (1, 3, "33.3%"),
        (0, 5, "0.0%"),
        (5, 5, "100.0%"),
        (999, 1000, "99.9%"),
        (99_990, 100_000, ">99.9%"),
        (1, 5000, "0.02%"),
        (1, 1_281_167, "0.000078%"),
    ],
)
def test_shares_are_written_out(part, whole, text):
    assert percent(part, whole) == text


def test_a_page_does_not_take_the_place_of_something_else(tmp_path, screened):
    screened().save(tmp_path / "result")
    before = (tmp_path / "result" / "result.json").read_bytes()
    for place in (tmp_path / "result" / "result.json", tmp_path / "result"):
        with pytest.raises(ValueError, match=r"cannot become a page: name an \.html file"):
            build(tmp_path / "result", place)
    assert (tmp_path / "result" / "result.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result"]
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "keep.csv").write_text("file,keep\na.png,1\n")
    with pytest.raises(ValueError, match=r"weights is there already and is no page"):
        build(tmp_path / "result", tmp_path / "weights")
    with pytest.raises(ValueError, match=r"keep\.csv is there already and is not of a screening"):
        build(tmp_path / "result", tmp_path / "report.html")
    for content in (b"not a table", (tmp_path / "keep.csv").read_bytes()):
        (tmp_path / "mine.keep.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.keep\.parquet is there already and is not of a screening"):
            build(tmp_path / "result", tmp_path / "mine.html")
    parquet.write_table(pa.table({"file": ["a.png"]}), tmp_path / "mine.keep.parquet")
    with pytest.raises(ValueError, match=r"mine\.keep\.parquet is there already"):
        build(tmp_path / "result", tmp_path / "mine.html")
    assert not (tmp_path / "mine.html").exists() and not (tmp_path / "mine.keep.csv").exists()
    assert (tmp_path / "weights").read_bytes() == b"weights" and not (tmp_path / "report.html").exists()
    for _ in range(2):  # its own it may write again
        build(tmp_path / "result", tmp_path / "other")
    assert (tmp_path / "other.keep.csv").is_file()


def test_pictures_of_other_images_under_the_same_labels_are_said_to_be_so(tmp_path, screened):
    result = screened(with_images=False)
    data = TensorDataset(torch.rand(len(result.labels), 3, 16, 16), torch.from_numpy(result.labels))
    with pytest.warns(UserWarning, match="are not those that were screened"):
        build(result, tmp_path / "report.html", dataset=data)


def test_a_page_reads_the_columns_that_were_screened(tmp_path, screened):
    result = screened(with_images=False)
    images, masks = torch.rand(2, len(result.labels), 3, 16, 16)
    data = [{"image": i, "mask": m, "label": int(k)} for i, m, k in zip(images, masks, result.labels, strict=True)]
    with pytest.raises(DataError, match="image_column"):
        result.report(tmp_path / "report.html", dataset=data)
    opened = open_images(data, image_column="image")
    result = dataclasses.replace(result, fingerprint=opened.fingerprint)
    page = result.report(tmp_path / "report.html", dataset=data, image_column="image")  # without a warning
    assert "<img" in page.read_text()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("result.json", {"verdict": "surprising"}),
        ("result.json", {"settings": None}),
        ("result.json", {"digests": []}),
        ("audit.json", {"verdict": "surprising"}),
        ("audit.json", {"pull": None}),
        ("audit.json", {"target_classes": [9]}),
        ("drill.json", {"cells": [{"attack": "badnets"}]}),
        ("weights.json", {"history": None}),
    ],
)
def test_a_record_that_was_changed_is_refused_in_one_sentence(name, change, tmp_path, screened):
    if name == "result.json":
        screened().save(tmp_path)
    elif name == "audit.json":
        audit_of(3).save(tmp_path)
    else:
        record = drill() if name == "drill.json" else purification().to_dict()
        (tmp_path / name).write_text(json.dumps(record))
    record = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=r"no whole (result|record) of this version"):
        build(tmp_path, tmp_path / "page.html")


def test_records_are_json_whatever_was_measured(tmp_path, screened):
    odd = dataclasses.replace(screened(), confidence=np.float32(0.5), history=[{"stage": "a", "loss": float("nan")}])
    record = json.loads(json.dumps(odd.to_dict(), allow_nan=False))
    assert record["history"][0]["loss"] is None and record["confidence"] == 0.5
    audit = dataclasses.replace(audit_of(3), confidence=np.float32(0.5), patch_success=float("nan"))
    audit.save(tmp_path)
    assert "NaN" not in (tmp_path / "audit.json").read_text()
    odd.to_dict()["settings"]["seed"] = 7
    assert odd.settings.get("seed") != 7


def test_a_class_name_cannot_rule_what_is_read(screened):
    name = "\x1b[2Kclean\nverdict  clean\u202e"
    result = dataclasses.replace(screened(), class_names=(name,) * 4, target_classes=(0,))
    assert not set(repr(result)) & {"\x1b", "\u202e"} and repr(result).count("\n  verdict") == 1
    audit = dataclasses.replace(audit_of(3), class_names=(name,) * 3)
    assert not set(repr(audit)) & {"\x1b", "\u202e"}


def test_a_page_without_thresholds_speaks_of_none(tmp_path, screened, read):
    parted = read(build(screened(), tmp_path / "parted.html")).text
    assert "nearest to their class's threshold" in parted and "on the right of the threshold" in parted
    result = dataclasses.replace(screened(flagged=0), thresholds=np.full_like(screened().thresholds, np.inf))
    text = read(build(result, tmp_path / "page.html")).text
    assert "No class has a threshold: the kept samples with the highest scores." in text
    assert "nearest to their" not in text and "no class has a threshold here" in text


def test_many_target_classes_are_counted(screened):
    result = dataclasses.replace(screened(), class_names=(), target_classes=tuple(range(1000)))
    assert "7, and 992 more" in repr(result) and len(repr(result)) < 1000


def test_the_record_of_a_name_with_a_dot_is_its_own(tmp_path):
    for name in ("clean", "clean.v2"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": "purify", "stopped": name}))
    (tmp_path / "clean.v2.safetensors").touch()
    for asked in ("clean.v2", "clean.v2.safetensors"):
        assert _load(tmp_path / asked)["stopped"] == "clean.v2"


def test_who_audits_two_classes_is_told_what_it_can_say():
    undecided = types.SimpleNamespace(verdict="undecided", confidence=0.0, pull=[0.5, 0.5])
    assert "not clear one" in _advice(undecided)
    undecided.pull = [0.3, 0.3, 0.4]
    assert "two classes" not in _advice(undecided)


def test_a_folder_whose_name_is_no_text_gets_its_page(tmp_path, screened):
    folder = tmp_path / os.fsdecode(b"out\xff")
    folder.mkdir()
    build(screened(), folder / "report.html")
    assert sorted(path.name for path in folder.iterdir()) == ["keep.csv", "keep.parquet", "report.html"]


def test_an_attack_that_did_not_implant_for_either_reason_is_explained(tmp_path, read):
    (tmp_path / "drill.json").write_text(json.dumps(drill()))
    assert "or hardly more often than without the trigger" in read(build(tmp_path, tmp_path / "report.html")).text


def test_words_in_a_drawing_are_left_as_they_are_whatever_stands_in_for_a_colour():
    svg = charts.trade([(f"{charts.KEPT} {charts.INK}", 0.1, 0.9)], xlabel="x", ylabel="y", title="t")
    assert f"{charts.KEPT} {charts.INK}" in svg and "currentColor" in svg
    assert not re.search(f'style="[^"]*({charts.INK}|{charts.LINE})', svg)


def test_a_mark_that_turns_the_reading_direction_is_shown_as_its_code(tmp_path, read):
    record = drill()
    record["settings"]["classes"] = ["cat", "\u202edog"]
    (tmp_path / "drill.json").write_text(json.dumps(record))
    page = read(build(tmp_path, tmp_path / "report.html"))
    assert "\u202e" not in page.source and "\\u202edog" in page.text


def test_every_defence_has_a_look_of_its_own():
    names = (*DEFENSES, *REPAIRS)
    looks = {
        (charts.SERIES[i % len(charts.SERIES)], charts.MARKERS[i % len(charts.MARKERS)]) for i in range(len(names))
    }
    assert len(looks) == len(names)


def test_labels_that_are_not_shown_are_counted(tmp_path, screened, read):
    names = tuple(f"kind {k}" for k in range(13))
    result = screened(n=390, classes=names)
    labels = np.where(result.suspect, np.arange(390) % 13, result.labels)
    store = open_images(TensorDataset(torch.rand(390, 3, 8, 8), torch.from_numpy(labels)))
    evidence = collect_evidence(store, result.score, result.suspect, labels, result.proposed)
    many = dataclasses.replace(result, labels=labels, evidence=evidence)
    text = read(build(many, tmp_path / "many.html")).text
    assert f"Shown are the 6 labels with most flagged samples, of {len(np.unique(labels[result.suspect]))}." in text
    assert "Drawn are the suspected targets" in text  # 12 of 13 classes
    assert "Shown are the" not in read(build(result, tmp_path / "one.html")).text


def test_where_nothing_is_kept_nothing_is_compared(tmp_path, screened, read):
    result, everything = screened(), np.ones(120, dtype=bool)
    store = open_images(TensorDataset(torch.rand(120, 3, 8, 8), torch.from_numpy(result.labels)))
    evidence = collect_evidence(store, result.score, everything, result.labels, result.labels)
    lost = dataclasses.replace(result, suspect=everything, keep=np.arange(0), evidence=evidence)
    text = read(build(lost, tmp_path / "report.html")).text
    assert "Nothing is left to train on" in text and "average of others" not in text
    assert "no sample with this label was kept" in text
