"""The runner on tiny data: what is measured, shown and resumed. A stand-in that knows the truth plays the screening."""

import json
import mmap
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainguard.data.pixels import PixelRange
from trainguard.drill import cells, defenses, repairs, runner, tables
from trainguard.drill.images import Images, load_images
from trainguard.drill.machine import machine, peak_memory, reset_peak_memory, versions
from trainguard.drill.models import MODELS, Standardised, build
from trainguard.drill.poison import Attack
from trainguard.drill.recipes import Setting
from trainguard.drill.runner import _difference, run_drill
from trainguard.drill.scene import Scene, Victim
from trainguard.drill.train import Recipe, augment, predict, train_classifier, triangle
from trainguard.errors import DataError, ModelError, StateError
from trainguard.progress import Progress
from trainguard.report import drill as report_of_drill


def tiny(count=60, classes=3):
    """Classes that differ in brightness."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = (torch.rand(count, 1, 8, 8, generator=random) * 60 + 70 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    names = tuple(map(str, range(classes)))
    return Images(images, labels, images[:30].clone(), labels[:30].clone(), names, flip=False)


def drill(tmp_path, **options):
    settings = {
        "attacks": ["badnets", "clean"],
        "defenses": ["none", "oracle", "guard+relabel"],
        "epochs": 2,
        "rate": 0.1,
    }
    return run_drill(tiny(), out=tmp_path / "out", progress=False, table=False, **(settings | options))


def test_a_drill_measures_every_cell(screened, tmp_path):
    done = drill(tmp_path)
    found = {(c.attack, c.defense): c for c in done.cells}
    assert list(found) == [(a, d) for a in ("badnets", "clean") for d in ("none", "oracle", "guard", "guard+relabel")]
    guard = found["badnets", "guard"]
    assert (guard.payload, guard.cover, guard.flagged) == (6, 0, 6)
    assert guard.tpr == pytest.approx(5 / 6) and guard.fpr == pytest.approx(1 / 54)
    assert guard.auroc == pytest.approx((5 / 6) * (53 / 54) + 0.5 * (1 / 6 * 53 / 54 + 5 / 6 * 1 / 54), abs=1e-6)
    assert guard.worst_class_loss == pytest.approx(1 / 18, abs=0.02)
    assert guard.verdict == "poisoned" and guard.target_classes == guard.true_targets == (1,)
    assert guard.screening == {"probe": 0.1}
    again = found["badnets", "guard+relabel"]
    assert again.flagged == 6 and again.tpr == guard.tpr
    assert found["badnets", "oracle"].flagged == 6 and found["badnets", "oracle"].tpr is None
    clean = found["clean", "guard"]
    assert clean.asr is None and clean.flagged == 0 and clean.verdict == "clean" and clean.tpr is None
    assert clean.acc == found["clean", "none"].acc  # nothing flagged, nothing changed
    assert found["clean", "guard+relabel"].acc == clean.acc
    saved = json.loads((tmp_path / "out" / "drill.json").read_text())
    assert saved["settings"]["recipe"]["epochs"] == 2 and saved["versions"]["torch"] == torch.__version__
    assert saved["machine"]["threads"] == torch.get_num_threads() and len(saved["cells"]) == 8
    assert "| badnets | guard+relabel |" in (tmp_path / "out" / "table.md").read_text()


def test_a_killed_drill_goes_on_after_the_last_finished_cell(screened, tmp_path, monkeypatch):
    whole = drill(tmp_path / "whole")
    train, calls = train_classifier, []

    def dies(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append("before")
        return train(*arguments, **options)

    monkeypatch.setattr("trainguard.drill.scene.train_classifier", dies)
    with pytest.raises(KeyboardInterrupt):
        drill(tmp_path)
    assert len(list(tmp_path.glob("out/cells/*/cell.json"))) == 2
    assert not (tmp_path / "out" / "drill.json").exists()
    calls = ["counted"] * 3

    def counts(*arguments, **options):
        calls.append("after")
        return train(*arguments, **options)

    monkeypatch.setattr("trainguard.drill.scene.train_classifier", counts)
    resumed = drill(tmp_path)
    assert calls.count("after") == 5  # of 7 trainings; the clean set's relabelling trains nothing

    def figures(done):
        timeless = {"screen_seconds": 0, "train_seconds": 0, "peak_mb": 0}
        return [replace(cell, **timeless) for cell in done.cells]

    assert figures(resumed) == figures(whole)


def test_another_data_set_or_setting_is_refused(screened, tmp_path):
    drill(tmp_path, attacks=["clean"], defenses=["none"])
    with pytest.raises(StateError, match=r"rate 0\.1 against 0\.2"):
        drill(tmp_path, rate=0.2)
    with pytest.raises(StateError, match=r"data [0-9a-f]{16} against [0-9a-f]{16}"):
        run_drill(tiny(90), attacks=["clean"], defenses=["none"], epochs=2, rate=0.1, out=tmp_path / "out")


def test_a_drill_of_other_classes_is_refused_and_one_that_did_not_say_is_not(screened, tmp_path):
    data, options = tiny(), {"attacks": ["clean"], "defenses": ["none"], "epochs": 1, "progress": False, "table": False}
    run_drill(data, out=tmp_path, **options)
    with pytest.raises(StateError, match=r"classes \['0', '1', '2'\] against \['0', '1', '2', '3'\]"):
        run_drill(replace(data, class_names=("0", "1", "2", "3")), out=tmp_path, **options)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["classes"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert len(run_drill(data, out=tmp_path, **options).cells) == 1


def test_layers_that_draw_follow_the_seed_and_leave_the_users_numbers_alone():
    images, labels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 4

    def trained(before, seed=0):
        torch.manual_seed(0)
        model = build("cnn", 4, 3, 16)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        recipe = Recipe.for_model("cnn", 3, batch_norm=False)
        train_classifier(model, images, labels, recipe, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    once = trained(1)
    assert torch.equal(once, trained(2)) and not torch.equal(once, trained(1, seed=1))


def test_unknown_names_are_refused_before_anything_is_trained(tmp_path):
    for wrong in ({"attacks": "badnets"}, {"defenses": "guard"}):
        with pytest.raises(ValueError, match=r"expected (attacks|defenses)= as a list of names, got '"):
            drill(tmp_path, **wrong)
    for wrong in ({"epochs": 0}, {"budget": -1.0}, {"budget": float("nan")}):
        with pytest.raises(ValueError, match=r"expected (epochs= of at least 1 epoch|a budget above 0)"):
            drill(tmp_path, **wrong)
    with pytest.raises(ValueError, match="no defence gard: choose from none, oracle, guard"):
        drill(tmp_path, defenses=["gard"])
    with pytest.raises(ValueError, match="no attack 'badnet'"):
        drill(tmp_path, attacks=["badnet"])
    for name in ("sig", "label_consistent"):
        with pytest.raises(ValueError, match=r"rate=0.4 needs 24 images of class 1, the data set has 20"):
            drill(tmp_path, attacks=["clean", name], rate=0.4)
    assert not (tmp_path / "out").exists()


def cell(attack, defense, asr, acc=0.9, seed=0, **figures):
    base = dict.fromkeys(cells.Cell.__dataclass_fields__)
    guard = defense.startswith("guard")
    base |= {"attack": attack, "defense": defense, "seed": seed, "acc": acc, "asr": asr, "payload": 5, "cover": 0}
    base |= {
        "flagged": 5 if guard else 0,
        "target_classes": (1,),
        "true_targets": (1,),
        "peak_mb": 100,
        "screening": {},
    }
    base |= {"screen_seconds": 5.0 if guard else 0.0, "train_seconds": 10.0, "verdict": "poisoned" if guard else None}
    return cells.Cell(**(base | figures))


def test_an_attack_that_did_not_implant_is_shown_and_not_counted():
    weak = [cell("weak", "none", 0.49), cell("weak", "guard", 0.0)]
    strong = [cell("strong", "none", 0.5), cell("strong", "oracle", 0.02, acc=0.95), cell("strong", "guard", 0.04)]
    rows = {(r[0], r[1]): r for r in tables.cell_rows(weak + strong)}
    assert rows["weak", "guard"][3] == "did not implant (0.00)" and rows["weak", "none"][3] == "did not implant (49.00)"
    assert rows["strong", "guard"][3] == "4.00" and rows["strong", "guard"][12] == "1.50"
    summary = {r[0]: dict(zip(tables.SUMMARY_COLUMNS, r, strict=True)) for r in tables.summary_rows(weak + strong)}
    assert summary["guard"]["attacks"] == "1 of 2"
    assert summary["guard"]["ASR mean"] == "4.00" and summary["guard"]["ACC below oracle"] == "5.00"
    assert summary["guard"]["verdict right"] == "1/1" and summary["guard"]["cost"] == "1.50"
    text = tables.markdown(weak + strong)
    assert text.count("did not implant") == 3 and "| strong | guard | 90.00 | 4.00 |" in text


def test_the_summary_says_over_how_many_attacks_a_defence_was_measured():
    cells = [cell(attack, "none", 0.9) for attack in ("a", "b")] + [cell("a", "oracle", 0.01)]
    assert [(r[0], r[1]) for r in tables.summary_rows(cells)] == [("none", "2"), ("oracle", "1 of 2")]


def test_figures_are_means_over_seeds():
    several = [
        cell("a", "none", 0.9),
        cell("a", "none", 1.0, seed=1),
        cell("a", "guard", 0.0),
        cell("a", "guard", 0.1, seed=1),
    ]
    rows = tables.cell_rows([*several, cell("a", "guard", 0.2, seed=2, verdict="clean")])
    assert (
        rows[0][3] == "95.00" and rows[1][3] == "10.00" and rows[1][7] == "poisoned 2, clean 1" and rows[1][8] == "3/3"
    )


def test_tables_are_shown_on_the_terminal(capsys):
    tables.show([cell("adaptive_patch", "none", 0.49), cell("adaptive_patch", "guard+relabel", 0.01)])
    shown = capsys.readouterr().out
    assert shown.startswith("Fire drill") and "adaptive_patch" in shown and "implant" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_training_learns_and_leaves_global_random_numbers_alone():
    data, recipe, runs = tiny(), Recipe(epochs=12, lr=0.05, batch_size=20, flip=False), []
    for _ in range(2):
        torch.manual_seed(0)
        model = Standardised(build("resnet9", 3, 1, 8), torch.tensor([0.5]), torch.tensor([0.25]))
        state, history = torch.get_rng_state(), []
        train_classifier(model, data.train, data.train_labels, recipe, on_epoch=lambda *row, to=history: to.append(row))
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((history, predict(model, data.test)))
    (history, guessed), (again, _) = runs
    assert history == again and [epoch for epoch, _ in history] == list(range(12))
    assert history[-1][1] < history[0][1] and (guessed == data.test_labels).float().mean() > 0.9


def test_a_training_goes_on_from_where_it_was_before_its_last_epochs():
    data = tiny()
    recipe = Recipe(epochs=10, lr=0.05, batch_size=60, flip=False, pad=0)  # whole batches: no order to repeat
    assert recipe.late == 9 and Recipe(30).late == 27 and Recipe(2).late == Recipe(1).late == 1

    def model():
        torch.manual_seed(0)
        return Standardised(build("resnet9", 3, 1, 8), torch.tensor([0.5]), torch.tensor([0.25]))

    late = []
    whole = train_classifier(
        model(), data.train, data.train_labels, recipe, on_late=lambda so: late.append(deepcopy(so))
    )
    (begun,) = late
    assert begun["epochs"] == 9
    epochs = []
    rest = train_classifier(
        model(), data.train, data.train_labels, recipe, begun=begun, on_epoch=lambda epoch, _: epochs.append(epoch)
    )
    assert epochs == [9]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    first = "net.body.0.0.weight"
    assert not torch.allclose(begun["weights"][first], whole.state_dict()[first], rtol=1e-3, atol=1e-4)


def test_relabelling_comes_before_the_last_epochs_of_what_was_trained_without_the_flagged(
    screened, tmp_path, monkeypatch
):
    train, begun = train_classifier, []

    def watched(model, images, labels, recipe, **options):
        begun.append((len(images), labels.clone(), options["begun"]))
        return train(model, images, labels, recipe, **options)

    monkeypatch.setattr("trainguard.drill.scene.train_classifier", watched)
    drill(tmp_path, attacks=["badnets"], defenses=["guard+relabel"], epochs=20)
    counts = [count for count, _, _ in begun]
    assert counts == [60, 54, 60]  # undefended, what was kept, everything
    (_, given, _), (_, _, first), (_, labels, again) = begun
    assert first is None and again["epochs"] == 18
    cell = tmp_path / "out" / "cells" / "badnets-guard-seed0"
    for name, value in torch.load(cell / "late.pt", weights_only=True)["weights"].items():
        assert torch.equal(value, again["weights"][name])
    changed = (given != labels).nonzero()[:, 0]
    assert 3 <= len(changed) <= 6  # of six flagged; one of them is clean
    shutil.rmtree(tmp_path / "out" / "cells" / "badnets-guard+relabel-seed0")
    (cell / "late.pt").unlink()
    with pytest.raises(StateError, match=r"late\.pt is missing: .* remove the folder .*badnets-guard-seed0"):
        drill(tmp_path, attacks=["badnets"], defenses=["guard+relabel"], epochs=20)


def test_augmentation_crops_out_of_a_zero_margin():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
    out = augment(images, Recipe(flip=False), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    windows = {tuple(padded[i : i + 8, j : j + 8].flatten().tolist()) for i in range(3) for j in range(3)}
    seen = {tuple(x.flatten().tolist()) for x in out}
    assert seen <= windows and len(seen) > 5
    same = augment(images, Recipe(flip=False, pad=0), torch.Generator())
    assert torch.equal(same, images)
    mirrored = augment(images, Recipe(pad=0), torch.Generator().manual_seed(0))
    sides = {tuple(x.flatten().tolist()) for x in mirrored}
    assert sides == {tuple(images[0].flatten().tolist()), tuple(images[0].flip(2).flatten().tolist())}


def test_the_learning_rate_is_a_triangle():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = triangle(optimizer, 8, 0.5), []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_small_and_grey_images(name):
    torch.manual_seed(0)
    for channels, size in ((3, 32), (1, 8)):
        model = build(name, 7, channels, size).eval()
        with torch.no_grad():
            assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "preact_resnet18"])
def test_cifar_forms_end_in_four_by_four(name):
    model, sides = build(name, 10).eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 1:
            module.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert max(sides) == 32 and min(sides) == 4


@pytest.mark.parametrize(("side", "patches"), [(32, 8), (28, 7), (12, 6), (20, 10)])
def test_the_patches_of_a_transformer_leave_no_border_unseen(side, patches):
    embedding = build("vit", 3, 1, side).patch_embed
    assert embedding.grid_size == (patches, patches) and embedding.patch_size[0] * patches == side


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model 'resnet10000' is neither one of cnn, mobilenetv2"):
        build("resnet10000", 10)


def test_digits_are_split_without_overlap():
    data = load_images("digits")
    assert data.train.shape == (1438, 1, 16, 16) and data.test.shape == (359, 1, 16, 16)
    assert data.num_classes == 10 and not data.flip and data.train.max() == 255
    assert data.fingerprint() == load_images("digits").fingerprint() != load_images("digits", rows=100).fingerprint()


def test_pictures_in_a_folder_are_read_with_their_split_and_one_size(tmp_path):
    from PIL import Image

    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (10 + i, 9), (40 * number, 10 * i, 200)).save(folder / f"{i}.png")
    data = load_images(str(tmp_path), size=8)
    assert data.train.shape == (8, 3, 8, 8) and data.test.shape == (4, 3, 8, 8) and data.class_names == ("cat", "dog")
    assert data.train[5, :, 0, 0].tolist() == [40, 10, 200] and data.train_labels.tolist() == [0] * 4 + [1] * 4
    alone = load_images(str(tmp_path / "train"), size=8)
    assert len(alone.train) == 7 and len(alone.test) == 1 and torch.equal(alone.test[0], data.train[4])
    with pytest.raises(DataError, match="one of the two is empty"):
        load_images(str(tmp_path), rows=0)


def test_peak_memory_sees_a_large_array():
    reset_peak_memory()
    before = peak_memory()
    with mmap.mmap(-1, 64 << 20) as large:  # fresh pages: a heap may have that much to give again
        for start in range(0, len(large), 1 << 20):
            large[start : start + (1 << 20)] = b"\1" * (1 << 20)
        assert peak_memory() >= before + 50
    reset_peak_memory()
    assert peak_memory() < before + 50
    assert machine()["cores"] >= 1 and versions()["numpy"] == np.__version__


def test_all_means_all():
    assert runner._defenses(["all"]) == defenses.DEFENSES
    assert runner._defenses(["paper+relabel"]) == ("none", "paper", "paper+relabel")


@pytest.mark.filterwarnings("ignore:the model gets")  # two epochs teach it nothing
def test_finished_models_are_mended_and_audited(screened, tmp_path, monkeypatch):
    few = {"adversarial_batches": (2,), "plain_batches": (2,), "screening": False, "max_accuracy_loss": 1.0}
    monkeypatch.setattr(repairs, "purify", partial(repairs.purify, **few))
    monkeypatch.setattr(repairs, "audit", partial(repairs.audit, images=20, attack_steps=1))
    monkeypatch.setattr(repairs, "STEPS", 3)
    done = drill(tmp_path, attacks=["badnets"], defenses=["repairs"])
    found = {c.defense: c for c in done.cells}
    assert list(found) == ["none", "guard", *repairs.REPAIRS]
    for name in repairs.REPAIRS:
        cell = found[name]
        assert cell.train_seconds == found["none"].train_seconds and cell.screen_seconds > 0
        assert 0 <= cell.acc <= 1 and 0 <= cell.asr <= 1 and cell.flagged == 0 and cell.tpr is None
    assert found["audit"].verdict in ("clean", "backdoored", "undecided")
    assert (found["audit"].acc, found["audit"].asr) == (found["none"].acc, found["none"].asr)
    assert found["purify"].verdict is None
    assert found["guard+purify"].screen_seconds > found["guard"].screen_seconds > 0  # which it was given
    cells = tmp_path / "out" / "cells"
    assert (cells / "badnets-audit-seed0" / "audit.json").is_file()
    for name in ("purify", "purify-clean", "guard+purify"):
        assert (cells / f"badnets-{name}-seed0" / "purified.json").is_file()


@pytest.mark.parametrize("flip", [True, False])
def test_the_baseline_mirrors_where_training_may_and_draws_from_a_stream_of_its_own(flip, screened, monkeypatch):
    seen = []
    monkeypatch.setattr(repairs, "fine_tune", lambda *_, how, **__: seen.append((how.flip, torch.rand(1).item())))
    monkeypatch.setattr(repairs, "STEPS", 1)
    scene = Scene.make(replace(tiny(), flip=flip), Attack("clean"), Victim("cnn", Recipe(1), "cpu", 0.5), 0)
    unit, model = PixelRange.from_mean_std((0.0,), (1.0,)), nn.Linear(1, 1)
    before = torch.get_rng_state()
    for _ in range(2):
        repairs._fine_tune(model, repairs._clean_part(scene), unit, scene)
    assert [mirrors for mirrors, _ in seen] == [flip, flip] and seen[0] == seen[1]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("other", ["guard+relabel", "purify", "gaurd"])
def test_what_is_no_training_from_the_start_is_refused_and_not_left_undefended(other, tmp_path):
    with pytest.raises(ValueError, match="does not train from the start"):
        defenses.defend(None, other, tmp_path, lambda count: None)


def test_columns_are_told_apart_by_name():
    names = {"fine": datasets.ClassLabel(names=list("abc")), "coarse": datasets.ClassLabel(names=list("xy"))}
    pictures = [Image.fromarray(np.full((8, 8, 3), 9 * row, dtype=np.uint8)) for row in range(10)]
    columns = {"image": pictures, "fine": [row % 3 for row in range(10)], "coarse": [row % 2 for row in range(10)]}
    table = datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), **names))
    assert load_images(table, test=table, label_column="coarse").class_names == ("x", "y")
    assert load_images(table, test=table, label_column="fine").class_names == ("a", "b", "c")
    with pytest.raises(DataError, match="pass label_column="):
        load_images(table, test=table)


def pictured(labels, names, mode="RGB"):
    """A Hugging Face data set whose images tell their class."""
    pictures = [
        Image.new("RGB", (8, 8), (20 * ord(names[k][0]) % 256, row, 0)).convert(mode) for row, k in enumerate(labels)
    ]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict({"image": pictures, "label": list(labels)}, features)


def test_a_test_set_has_the_classes_of_the_training_set_whatever_their_order():
    train = pictured([0, 1, 2] * 4, "abc")
    data = load_images(train, test=pictured([0, 1, 2], "cab"))
    assert data.test_labels.tolist() == [2, 0, 1] and data.class_names == ("a", "b", "c")
    for k in range(3):  # the same colour, the same class
        assert data.test[data.test_labels == k][0, 0, 0, 0] == data.train[data.train_labels == k][0, 0, 0, 0]
    assert load_images(train, test=pictured([0, 1], "bc")).test_labels.tolist() == [1, 2]  # where one is missing
    with pytest.raises(DataError, match="images of 'd', which is no class of the training set"):
        load_images(train, test=pictured([0, 1], "bd"))


def test_images_are_read_as_screening_reads_them(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                mode = "L" if name == "a" else "RGB"
                Image.new(mode, (8, 8), 40 * i if mode == "L" else (40 * i, 0, 9)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    data = load_images(str(tmp_path))
    assert data.train.shape == (6, 3, 8, 8)  # colour, though the first image is grey
    assert data.train[4, :, 0, 0].tolist() == [40, 0, 9]
    Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)).save(tmp_path / "train" / "b" / "1.png")
    with pytest.raises(DataError, match=r"row 4 \(.*1\.png\).* 8 bits per value"):
        load_images(str(tmp_path))
    (tmp_path / "train" / "b" / "1.png").write_bytes((tmp_path / "train" / "b" / "2.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"row 4 \(.*1\.png\) cannot be read"):
        load_images(str(tmp_path))


def test_what_cannot_be_had_shows_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="resnet99"):
        drill(tmp_path, model="resnet99")
    with pytest.raises(ValueError, match="attack 'tact' would change the label of none of the 30 test images"):
        few = replace(tiny(), test_labels=torch.full((30,), 2))
        run_drill(few, attacks=["tact"], defenses=["none"], out=tmp_path / "out", progress=False, source=1, target=0)
    assert not (tmp_path / "out").exists()


def test_a_later_drill_in_a_folder_keeps_the_cells_of_an_earlier_one(screened, tmp_path):
    drill(tmp_path, attacks=["badnets", "clean"], defenses=["oracle"])
    later = drill(tmp_path, attacks=["badnets"], defenses=["none"])
    assert [(c.attack, c.defense) for c in later.cells] == [("badnets", "none")]
    saved = json.loads((tmp_path / "out" / "drill.json").read_text())
    found = [(c["attack"], c["defense"]) for c in saved["cells"]]
    assert found == [("badnets", "none"), ("badnets", "oracle"), ("clean", "none"), ("clean", "oracle")]
    cell = tmp_path / "out" / "cells" / "badnets-none-seed0" / "cell.json"
    for damage, message in (
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ("{}", "no finished cell of this version"),
    ):
        cell.write_text(damage)
        with pytest.raises(StateError, match=rf"badnets-none-seed0/cell\.json {message}|cell\.json is {message}"):
            drill(tmp_path, attacks=["badnets"], defenses=["none"])


def test_all_leaves_out_what_two_classes_cannot_give_and_says_so(screened, tmp_path):
    two = tiny(classes=2)
    options = {"rate": 0.1, "epochs": 1, "defenses": ["none"], "progress": False, "table": False}
    with pytest.warns(UserWarning, match="tact is left out: "):
        chosen = runner._attacks(["all"], Setting(2, 0.1))
        left = list(runner._possible(two, chosen, (0,), ["all"]))
    assert "tact" not in left and {"badnets", "sig", "clean"} <= set(left)
    with pytest.raises(ValueError):
        run_drill(two, attacks=["all", "tact"], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_cells_of_another_commit_are_told_and_cells_of_nobody_knows_what_are_refused(screened, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "commit", lambda: "older")
    drill(tmp_path, attacks=["clean"], defenses=["none"])
    with pytest.warns(UserWarning, match=r"another commit \(older\)"):
        drill(tmp_path, attacks=["clean"], defenses=["none"])
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(StateError, match=r"without the settings\.json"):
        drill(tmp_path, attacks=["clean"], defenses=["none"])


@pytest.mark.parametrize(("share", "text"), [(1.0, "100.0"), (0.9996, "99.9"), (0.9994, "99.9"), (0.0, "0.0")])
def test_a_share_that_is_not_all_does_not_pass_for_it(share, text):
    assert tables._percent([share], 1) == text


def test_a_seed_that_is_given_twice_counts_once(screened, tmp_path):
    done = drill(tmp_path, attacks=["clean"], defenses=["none"], seeds=np.zeros(2, np.int64), target=np.int64(2))
    assert len(done.cells) == 1 and done.settings["target"] == 2
    with pytest.raises(ValueError, match="expected seeds from 0, got -1"):
        drill(tmp_path, seeds=(0, -1))


def test_a_model_with_one_answer_for_everything_has_no_backdoor():
    fallen = [cell("fallen", "none", 1.0, untriggered=1.0), cell("fallen", "guard", 0.0)]
    sound = [cell("sound", "none", 0.9, untriggered=0.02), cell("older", "none", 0.9)]
    two = [cell("of two classes", "none", 1.0, untriggered=0.51)]
    cells = fallen + sound + two
    names = ("fallen", "sound", "older", "of two classes")
    assert [tables.implanted(cells, name) for name in names] == [False, True, True, True]
    record = {"cells": [c.to_dict() for c in cells], "settings": {}, "versions": {}, "machine": {}}
    assert report_of_drill.context(record)["unsuccessful"] == ["fallen"]


def test_the_page_and_the_table_agree_on_what_a_defence_costs():
    cells = [
        cell("a", "none", 0.9, train_seconds=10.0),
        cell("a", "guard", 0.0, screen_seconds=5.0, train_seconds=10.0),
    ]
    cells += [cell("b", "none", 0.9, train_seconds=100.0), cell("weak", "none", 0.1), cell("weak", "guard", 0.0)]
    record = {"cells": [c.to_dict() for c in cells], "settings": {}, "versions": {}, "machine": {}}
    shown = report_of_drill.context(record)
    costs = {row[0]: row[4] for row in shown["cost"].rows}
    in_table = {row[0]: row[-1] for row in tables.summary_rows(cells)}
    assert costs["guard"] == 1.5 and in_table["guard"] == "1.50" and shown["headline"] == "3 attacks against 1 defence"


def test_the_page_says_where_a_mean_is_of_fewer_attacks():
    cells = [cell("a", "none", 0.9), cell("a", "guard", 0.02), cell("b", "none", 0.5)]
    record = {"cells": [c.to_dict() for c in cells], "settings": {}, "versions": {}, "machine": {}}
    shown = report_of_drill.context(record)
    assert shown["facts"] == [("ASR, none", "70.0%"), ("ASR, guard", "2.0% (1 of 2 attacks)")]
    assert [row[:2] for row in shown["cost"].rows] == [("none", "2"), ("guard", "1 of 2")]


def test_how_data_are_read_is_not_asked_of_images(tmp_path):
    with pytest.raises(ValueError, match="rows, flip say how data are read"):
        drill(tmp_path, rows=10, flip=False)


def test_what_differs_within_a_setting_is_shown(screened, tmp_path):
    drill(tmp_path, attacks=["clean"], defenses=["none"])
    with pytest.raises(StateError, match=r"recipe\.epochs 2 against 3"):
        drill(tmp_path, epochs=3)
    assert _difference("classes", ["a", "b"], ["a", "c"]) == "classes[1] b against c"


def test_a_drill_that_goes_on_counts_what_is_left(screened, tmp_path, monkeypatch):
    """What was finished before says nothing of how fast this machine is, nor of how long the rest takes."""
    totals = []

    class Watched(Progress):
        def stage(self, name, total=None):
            totals.append(total)
            return super().stage(name, total)

    monkeypatch.setattr("trainguard.drill.runner.Progress", Watched)
    drill(tmp_path, attacks=["clean"], defenses=["none"])
    drill(tmp_path, attacks=["clean"], defenses=["none", "oracle"])
    assert totals == [120, 120]


def test_what_stands_in_the_way_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(ModelError, match=r"resnet18\.foo cannot take images"):
        drill(tmp_path, model="resnet18.foo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    with pytest.raises(StateError, match=r"holds another result \(result\.json\) already"):
        drill(tmp_path)


def test_labels_that_are_no_numbers_are_said_as_such():
    soft = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8))] * 10, "label": [[0.0, 1.0]] * 10})
    with pytest.raises(DataError, match="row 0 has a soft label of 2 values"):
        load_images(soft.cast_column("image", datasets.Image()), label_column="label")


def test_all_leaves_out_an_attack_that_the_target_rules_out():
    with pytest.warns(UserWarning, match="tact is left out: tact moves one class to another"):
        assert "tact" not in runner._attacks(["all"], Setting(10, target=0))
    with pytest.raises(ValueError, match="tact moves one class"):
        runner._attacks(["tact"], Setting(10, target=0))
