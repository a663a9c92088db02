import os
import pathlib
import shutil
import subprocess
import sys
import types

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from torchvision.datasets import ImageFolder

from trainguard import cli
from trainguard.data.store import open_images
from trainguard.errors import DataError
from trainguard.sources import Resize, open_data


class Outcome:
    """Stands for any result: it remembers what was asked of it."""

    def __init__(self, verdict="clean"):
        self.verdict = verdict
        self.changed = verdict != "undecided"
        self.saved = None

    def rows(self):
        return [("verdict", self.verdict), ("because", "[b]the scores[/b]")]

    def save(self, folder):
        self.saved = folder

    def report(self, path, dataset=None):
        return path


def stub(monkeypatch, module, **names):
    """Put functions in the place of a module's own, so that only the command line is under test."""
    fake = types.ModuleType(module)
    for name, value in names.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("poisoned", 3), ("undecided", 4)])
def test_screen_passes_its_flags_on_and_answers_with_the_verdict(monkeypatch, capsys, folder, tmp_path, verdict, code):
    calls = []
    outcome = Outcome(verdict)

    def screen(dataset, model, **options):
        calls.append((dataset, model, options))
        return outcome

    stub(monkeypatch, "trainguard.screening.screen", screen=screen)
    out = tmp_path / "out"
    argv = ["screen", str(folder), "--model", "resnet18", "--out", str(out), "--epochs", "30", "--seed", "7"]
    assert cli.main([*argv, "--no-progress"]) == code
    dataset, model, options = calls[0]
    assert (len(dataset), model, outcome.saved) == (6, "resnet18", out)
    assert options == {"epochs": 30, "budget": 0.5, "seed": 7, "state_dir": None, "progress": False} | {
        "preset": "default",
        "on_error": "raise",
    }
    shown = capsys.readouterr().out
    assert verdict in shown and "[b]the scores[/b]" in shown and "report" in shown


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("backdoored", 3), ("undecided", 4)])
def test_audit_answers_with_the_verdict(monkeypatch, folder, verdict, code):
    stub(monkeypatch, "trainguard.purification", audit_checkpoint=lambda *_, **__: Outcome(verdict))
    assert cli.main(["audit", "weights.safetensors", "--arch", "resnet18", "--data", str(folder)]) == code


def test_images_to_be_trusted_may_lie_in_a_folder_without_splits(monkeypatch, folder, tmp_path):
    given = {}
    stub(monkeypatch, "trainguard.purification", purify_checkpoint=lambda *_, **o: given.update(o) or Outcome("clean"))
    splits = tmp_path / "splits"
    for split in ("train", "test"):
        shutil.copytree(folder, splits / split)
    argv = ["purify", "w.pt", "--arch", "vit", "--data", str(splits), "--split", "test", "--out", str(tmp_path / "w")]
    cli.main([*argv, "--validation", str(folder), "--max-accuracy-loss", "0"])
    assert len(given["validation"]) == len(given["data"]) and given["max_accuracy_loss"] == 0


def test_purify_passes_its_flags_on(monkeypatch, folder, tmp_path):
    calls = []

    def purify_checkpoint(checkpoint, **options):
        calls.append((checkpoint, options.pop("data"), options))
        return Outcome()

    stub(monkeypatch, "trainguard.purification", purify_checkpoint=purify_checkpoint)
    out = tmp_path / "pure.safetensors"
    argv = ["purify", "w.safetensors", "--arch", "vit", "--data", str(folder), "--out", str(out), "--clean"]
    assert cli.main(argv) == 0
    checkpoint, data, options = calls[0]
    assert (checkpoint, len(data)) == ("w.safetensors", 6)
    assert options == {"arch": "vit", "out": out, "clean": True, "seed": 0, "state_dir": None, "progress": True} | {
        "on_error": "raise"
    }
    assert cli.main([*argv, "--mean", "0.5,0.4,0.3", "--std", "0.2", "--on-error", "skip"]) == 0
    assert calls[1][2] == options | {"mean": (0.5, 0.4, 0.3), "std": (0.2,), "on_error": "skip"}
    assert cli.main([*argv, "--bounds", "-1"]) == 2


@pytest.mark.parametrize("option", ["--out", "--state-dir"])
def test_what_is_kept_must_not_lie_in_the_data(option, folder, tmp_path, capsys):
    places = {"--out": str(tmp_path / "pure"), "--state-dir": str(tmp_path / "state")} | {
        option: str(folder / "x" / "y")
    }
    given = [word for pair in places.items() for word in pair]
    assert cli.main(["purify", "w.safetensors", "--arch", "vit", "--data", str(folder), *given]) == 2
    assert f"{option} {folder / 'x' / 'y'} lies in {folder}" in capsys.readouterr().err
    assert cli.main(["screen", str(folder), *given]) == 2
    assert f"{option} {folder / 'x' / 'y'} lies in {folder}" in capsys.readouterr().err
    assert not (folder / "x").exists() and not (tmp_path / "state").exists()


def test_report_builds_the_page(monkeypatch, capsys, tmp_path):
    stub(monkeypatch, "trainguard.report", build=lambda folder, path: f"{folder} -> {path.name}")
    assert cli.main(["report", "runs/one", "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == "runs/one -> page.html\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["screen"],
        ["screen", "data", "--model", "resnet18", "--out", "o", "--epochs", "0"],
        ["screen", "data", "--model", "resnet18", "--out", "o", "--budget", "-1"],
        ["screen", "/nowhere/at/all", "--model", "resnet18", "--out", "o"],
        ["drill", "data", "--attacks", ",", "--defenses", "none", "--model", "resnet9", "--out", "o"],
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(capsys, argv):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trainguard") and captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--bounds", "-1,1"], ["--bounds=-1,1"], ["--mean", "-.5", "--std", "1"]])
def test_numbers_may_begin_with_a_minus(words, monkeypatch, folder, tmp_path):
    said = {}
    stub(monkeypatch, "trainguard.screening.screen", screen=lambda *_, **options: said.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["screen", str(folder), "--out", str(tmp_path), *words])
    assert said.get("bounds") == (-1.0, 1.0) or said.get("mean") == (-0.5,)


def test_unusable_input_is_one_line_and_exit_code_2(monkeypatch, capsys, folder, tmp_path):
    def screen(*_, **__):
        raise DataError("images outside [0, 1]:\n  row 3 has 7.5")

    stub(monkeypatch, "trainguard.screening.screen", screen=screen)
    assert cli.main(["screen", str(folder), "--model", "resnet18", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "trainguard screen: images outside [0, 1]: row 3 has 7.5\n"


def test_interruption_is_said_in_one_line(monkeypatch, capsys, folder, tmp_path):
    def screen(*_, **__):
        raise KeyboardInterrupt

    stub(monkeypatch, "trainguard.screening.screen", screen=screen)
    assert cli.main(["screen", str(folder), "--model", "resnet18", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "trainguard screen: interrupted\n"


def test_python_dash_m_is_the_command_and_help_imports_nothing_heavy():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['trainguard', '--help']\n"
        "try: runpy.run_module('trainguard', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'datasets', 'timm', 'accelerate', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "screen", "purify", "audit", "drill", "report"):
        assert command in done.stdout


def test_open_data_reads_an_image_folder_with_its_class_names(folder):
    dataset = open_data(folder)
    assert len(dataset) == 6
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset[5]["image"].size == (8, 8)


def test_open_data_reads_parquet_and_saved_data_sets_alike(folder, tmp_path):
    dataset = open_data(folder)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "tables").mkdir()
    dataset.to_parquet(str(tmp_path / "tables" / "train.parquet"))
    dataset.select(range(2)).to_parquet(str(tmp_path / "tables" / "test.parquet"))
    for name in ("saved", "tables", "tables/train.parquet"):
        opened = open_data(tmp_path / name)
        assert opened["label"][:] == dataset["label"][:]
        assert opened[4]["image"].tobytes() == dataset[4]["image"].tobytes()
    assert len(open_data(tmp_path / "tables", split="test")) == 2
    for split, part in (("train", dataset), ("test", dataset.select(range(2)))):  # as the hub lays out its own copies
        (tmp_path / "hub" / split).mkdir(parents=True)
        part.to_parquet(str(tmp_path / "hub" / split / "0000.parquet"))
    assert len(open_data(tmp_path / "hub")) == 6 and len(open_data(tmp_path / "hub", split="test")) == 2


def test_open_data_keeps_only_the_columns_that_were_named(folder, tmp_path):
    dataset = open_data(folder)
    masks = dataset.rename_column("image", "mask").remove_columns("label")
    datasets.concatenate_datasets([dataset, masks], axis=1).save_to_disk(str(tmp_path / "two"))
    assert open_data(tmp_path / "two", image_column="image").column_names == ["image", "label"]
    with pytest.raises(DataError, match="no column 'picture': it has image, label, mask"):
        open_data(tmp_path / "two", image_column="picture")


def test_open_data_scales_images_of_several_sizes(folder):
    Image.new("RGB", (20, 9)).save(folder / "cat" / "wide.png")
    assert {image.size for image in open_data(folder, size=16)["image"]} == {(16, 16)}
    assert open_images(open_data(folder, size=16)).shape == (3, 16, 16)
    with pytest.raises(DataError, match="images must have one size"):
        open_images(open_data(folder))


def test_drill_passes_its_flags_on_and_makes_the_page(monkeypatch, capsys, tmp_path):
    calls = []
    stub(monkeypatch, "trainguard.drill.runner", run_drill=lambda data, **options: calls.append((data, options)))
    stub(monkeypatch, "trainguard.report", build=lambda folder, path: path)
    argv = ["drill", "digits", "--attacks", "badnets,blend", "--defenses", "none,guard", "--out", str(tmp_path)]
    assert cli.main([*argv, "--seeds", "0,1", "--rows", "500"]) == 0
    data, options = calls[0]
    assert data == "digits"
    assert options["attacks"] == ("badnets", "blend") and options["defenses"] == ("none", "guard")
    assert options["seeds"] == (0, 1) and options["rows"] == 500 and options["model"] == "resnet9"
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"


def test_open_data_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(DataError, match="no folder per class"):
        open_data(tmp_path / "empty")
    with pytest.raises(DataError, match="not a parquet file"):
        open_data(tmp_path / "list.txt")
    with pytest.raises(DataError, match="does not exist"):
        open_data(tmp_path / "absent")


def test_a_model_that_came_back_as_it_was_is_undecided(monkeypatch, capsys, folder, tmp_path):
    stub(monkeypatch, "trainguard.purification", purify_checkpoint=lambda *_, **__: Outcome("undecided"))
    argv = ["purify", "w.pt", "--arch", "vit", "--data", str(folder), "--out", str(tmp_path / "pure.pt")]
    assert cli.main(argv) == 4
    shown = "".join(capsys.readouterr().out.split()).replace("│", "")  # the table folds long paths
    assert "pure.pt.safetensors" in shown


def test_the_verdict_outlives_the_reader_of_the_output(folder):
    script = (
        "import sys, types; from trainguard import cli; sys.path.insert(0, sys.argv[1]); import test_cli;"
        "fake = types.ModuleType('x'); fake.audit_checkpoint = lambda *_, **__: test_cli.Outcome('backdoored');"
        "sys.modules['trainguard.purification'] = fake; sys.stdin.read();"
        "sys.exit(cli.main(['audit', 'w', '--arch', 'vit', '--data', sys.argv[2]]))"
    )
    words = [sys.executable, "-c", script, str(pathlib.Path(__file__).parent), str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(120) == 3, process.stderr.read()[-2000:]


def test_a_damaged_table_is_named_in_one_line(capsys, tmp_path):
    table = pyarrow.table({"image": [b"x" * 1000] * 50, "label": list(range(50))})
    parquet.write_table(table, tmp_path / "train.parquet", compression="none")
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[4:400] = b"\xff" * 396
    (tmp_path / "train.parquet").write_bytes(bytes(content))
    argv = ["screen", str(tmp_path / "train.parquet"), "--model", "resnet18", "--out", str(tmp_path / "o")]
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert "train.parquet cannot be read as parquet" in shown and len(shown.strip().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_found_before_the_work(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for module, name in (("trainguard.screening.screen", "screen"), ("trainguard.purification", "audit_checkpoint")):
        stub(monkeypatch, module, **{name: lambda *_, **__: pytest.fail("worked before it looked")})
    words = ["--model", "resnet18"], ["--arch", "vit", "--data", str(folder)]
    for argv in (["screen", str(folder), *words[0]], ["audit", "w.pt", *words[1]]):
        assert cli.main([*argv, "--out", str(tmp_path / "taken")]) == 2
        assert "expected a folder" in capsys.readouterr().err


def fill(folder, names, side=8):
    """Grey images, lighter with each."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (10 * i,) * 3).save(path)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["cat/0.png", "cat/train_1.png", "cat/test.png", "dog/0.png", "dog/my-val.png"],
        ["cat/2021/0.png", "cat/2022/0.png", "dog/2021/1.png", "dog/0.png"],
        ["test/0.png", "train/0.png", "valid/1.png"],
        ["cat/0.png", "cat-big/0.png", "cat/1.png", "dog (old)/1.png", "dog/0.png", "a::b/2.PNG"],
        ["br [v2]/0.png", "cat/[1].png"],
    ],
)
def test_open_data_reads_a_folder_as_torchvision_does(names, tmp_path):
    """Names of splits, years and brackets mean nothing."""
    folder = fill(tmp_path / "set [1]", names)
    (folder / names[0]).with_name("metadata.csv").write_text("file_name,caption\n0.png,x\n")
    (folder / names[0]).with_name(".hidden.png").write_bytes(b"")
    seen = lambda path: not pathlib.Path(path).name.startswith(".") and path.lower().endswith("png")  # noqa: E731
    dataset, expected = open_data(folder), ImageFolder(folder, is_valid_file=seen)
    assert dataset.features["label"].names == expected.classes
    assert dataset["label"][:] == expected.targets
    assert [image.getpixel((0, 0)) for image in dataset["image"]] == [x.getpixel((0, 0)) for x, _ in expected]


def test_a_table_that_was_replaced_is_read_anew_though_its_time_is_the_same(tmp_path):
    for value, rows in ((10, 6), (200, 10)):
        images = pyarrow.array([[[value] * 4] * 4] * rows, pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
        table = pyarrow.table({"image": images, "label": [0, 1] * (rows // 2)})
        parquet.write_table(table, tmp_path / "new.parquet")
        os.replace(tmp_path / "new.parquet", tmp_path / "t.parquet")
        os.utime(tmp_path / "t.parquet", (1, 1))
        opened = open_data(tmp_path / "t.parquet")
        assert len(opened) == rows and opened[0]["image"][0][0] == value


@pytest.mark.parametrize("several", [False, True])
def test_data_that_name_an_address_are_not_read(several, tmp_path):
    image = {"bytes": None, "path": "http://localhost/x.png"}
    table = pyarrow.table({"image": [[image] if several else image] * 4, "label": [0, 1] * 2})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"names 'http://localhost/x\.png', which is not on this disk"):
        open_data(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["photos.csv", "photos.parquet", "a/b.zip"])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(DataError, match="does not exist: pass an image folder"):
        open_data(name)


def test_open_data_follows_links_and_names_what_it_leaves_out(tmp_path):
    fill(tmp_path / "elsewhere", ["0.png", "1.png"])
    folder = fill(tmp_path / "set", ["cat/0.png"])
    (folder / "bird").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert open_data(folder)["label"][:] == [0, 0, 1, 1, 1]
    fill(folder, ["loose.png"])
    with pytest.warns(UserWarning, match="1 images in .* lie in no class folder"):
        assert len(open_data(folder)) == 5


def test_open_data_refuses_a_split_that_is_not_there(tmp_path):
    folder = fill(tmp_path / "set", ["train/cat/0.png", "train/dog/0.png", "val/cat/0.png"])
    assert len(open_data(folder)) == 2 and len(open_data(folder, split="val")) == 1
    with pytest.raises(DataError, match="no split 'validation': it has train, val"):
        open_data(folder, split="validation")
    tables = tmp_path / "tables"
    for name in ("train-0", "train-1", "test-0", "full/train-0", "mini/train-0"):
        (tables / name).parent.mkdir(parents=True, exist_ok=True)
        open_data(folder).to_parquet(str(tables / f"{name}.parquet"))
    assert len(open_data(tables)) == 4 and len(open_data(tables, split="test")) == 2
    with pytest.raises(DataError, match=r"no split 'validation': it has test-0\.parquet, train-0\.parquet"):
        open_data(tables, split="validation")
    for name in ("train-0", "train-1", "test-0"):
        (tables / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match=r"several data sets, in .*/full, .*/mini: pass one"):
        open_data(tables)


def test_a_class_named_like_a_split_is_not_taken_for_one(tmp_path):
    folder = fill(tmp_path / "set", ["car/0.png", "plane/0.png", "train/steam/0.png", "train/diesel/0.png"])
    with pytest.raises(DataError, match=r"holds train, which looks like a split, beside car, which holds images: pass"):
        open_data(folder)
    kaggle = fill(tmp_path / "kaggle", ["train/cat/0.png", "train/dog/0.png", "test/1.png"])
    (kaggle / "notes" / "old").mkdir(parents=True)
    (kaggle / "notes" / "old" / "labels.csv").write_text("a,b")
    assert open_data(kaggle).features["label"].names == ["cat", "dog"]


def test_a_split_is_not_asked_of_one_set(folder, tmp_path):
    with pytest.raises(DataError, match="has no split 'test': it is one set, without splits"):
        open_data(folder, split="test")
    (tmp_path / "tables").mkdir()
    open_data(folder).to_parquet(str(tmp_path / "tables" / "part-0.parquet"))
    assert len(open_data(tmp_path / "tables")) == 6
    with pytest.raises(DataError, match="has no split 'test': it is one set, without splits"):
        open_data(tmp_path / "tables", split="test")


def test_tables_of_a_split_are_known_by_their_whole_name(folder, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in ("train-0.parquet", "trainval-0.parquet", "LAST.PARQUET", "._train-1.parquet"):
        open_data(folder).to_parquet(str(tables / name))
    assert len(open_data(tables)) == 6 and len(open_data(tables / "LAST.PARQUET")) == 6


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    folder = fill(tmp_path / "set", ["cat/0.png", "cat/1.png", "dog/0.png"])
    (folder / "cat" / "self").symlink_to(folder / "cat")
    (folder / "dog" / "all").symlink_to(folder)
    assert open_data(folder)["label"][:] == [0, 0, 1]


def test_pictures_in_a_column_without_a_kind_are_scaled_too(tmp_path):
    for name, side in (("0.png", 8), ("1.png", 10)):
        fill(tmp_path, [name], side)
    held = [(tmp_path / f"{i % 2}.png") for i in range(8)]
    labels = [i % 2 for i in range(8)]
    for values in ([place.read_bytes() for place in held], [str(place) for place in held]):
        parquet.write_table(pyarrow.table({"image": values, "label": labels}), tmp_path / "t.parquet")
        opened = open_data(tmp_path / "t.parquet", image_column="image", label_column="label", size=6)
        store = open_images(opened, image_column="image", label_column="label")
        assert store.shape == (3, 6, 6) and len(store) == 8
    numbers = pyarrow.table({"image": [[[0, 1], [2, 3]]] * 8, "label": labels})
    parquet.write_table(numbers, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="stored as numbers cannot be scaled to 6 pixels"):
        open_data(tmp_path / "t.parquet", image_column="image", size=6)
    with pytest.raises(DataError, match="no column holds pictures among image, label: pass image_column="):
        open_data(tmp_path / "t.parquet", size=6)


def test_pictures_with_a_palette_are_scaled_as_others_are():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    plain = np.asarray(Resize(16)({"image": [board]})["image"][0])
    assert 100 < plain.mean() < 155 and plain.std() < 10
    for few in (board.quantize(4), board.convert("1")):
        scaled = Resize(16)({"image": [few]})["image"][0]
        assert np.abs(np.asarray(scaled.convert("RGB")).astype(int) - plain).max() <= 2


def test_what_is_damaged_is_named(folder, tmp_path):
    dataset = open_data(folder)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="saved cannot be read as a saved data set: KeyError"):
        open_data(tmp_path / "saved")
    deep = Image.fromarray(np.zeros((8, 8), dtype=np.uint16))
    deep.save(folder / "cat" / "0.png")
    with pytest.raises(DataError, match=r"row 0 \(.*cat/0\.png\): expected an image of 8 bits"):
        open_images(open_data(folder))


def test_a_name_that_is_no_text_is_shown(folder):
    name = os.fsencode(folder / "cat") + b"/\xff.png"
    with open(name, "wb") as damaged:
        damaged.write((folder / "cat" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"\\xff\.png' is no name in UTF-8: rename the file"):
        open_data(folder)


def test_what_drill_makes_does_not_go_among_the_images(folder, capsys):
    words = ["drill", str(folder), "--attacks", "badnets", "--defenses", "none", "--out", str(folder / "cells")]
    assert cli.main(words) == 2
    assert "lies in" in capsys.readouterr().err and not (folder / "cells").exists()


def test_a_device_that_is_not_there_is_said_in_one_line(capsys, tmp_path):
    for device in ("foo", "meta"):
        words = ["drill", "digits", "--attacks", "badnets", "--defenses", "none", "--device", device]
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
        assert f"device '{device}' cannot be used here" in capsys.readouterr().err


def test_a_screening_that_broke_off_is_not_clean(monkeypatch, capsys, folder, tmp_path):
    def screen(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("trainguard.screen", screen)
    monkeypatch.setattr(cli, "_write_nowhere", lambda: None)
    assert cli.main(["screen", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "stopped before its end" in capsys.readouterr().err


def test_columns_that_are_named_reach_the_screening(monkeypatch, folder, tmp_path):
    dataset = open_data(folder).cast_column("label", datasets.Value("int64"))
    dataset.to_parquet(str(tmp_path / "plain [1].parquet"))
    seen = []
    stub(
        monkeypatch,
        "trainguard.screening.screen",
        screen=lambda data, *_, **options: seen.append((data, options)) or 1 / 0,
    )
    words = ["--out", str(tmp_path / "out"), "--image-column", "image", "--label-column", "label"]
    with pytest.raises(ZeroDivisionError):
        cli.main(["screen", str(tmp_path / "plain [1].parquet"), *words])
    data, options = seen[0]
    store = open_images(data, image_column=options["image_column"], label_column=options["label_column"])
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_name_that_the_terminal_cannot_show_does_not_hide_the_verdict():
    code = (
        "import trainguard.cli as cli\n"
        "cli._add_demo = lambda commands: commands.add_parser('demo').set_defaults("
        "run=lambda _: cli._show('Found', [('target', '\u732b')]) or 3)\n"
        "raise SystemExit(cli.main(['demo']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 3 and b"\\u732b" in done.stdout


@pytest.mark.parametrize("command", ["screen", "audit"])
def test_a_result_is_not_put_among_the_images(command, monkeypatch, capsys, folder, tmp_path):
    stub(monkeypatch, "trainguard.screening.screen", screen=lambda *_, **__: 1 / 0)
    stub(monkeypatch, "trainguard.purification", audit_checkpoint=lambda *_, **__: 1 / 0)
    monkeypatch.chdir(folder)
    words = ["screen", "."] if command == "screen" else ["audit", "w.pt", "--arch", "vit", "--data", "."]
    assert cli.main([*words, "--out", "result"]) == 2
    assert "lies in ., and would be read as data the next time" in capsys.readouterr().err
    assert not (folder / "result").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ("audit.json" if command == "screen" else "result.json")).write_text("{}")
    assert cli.main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "holds another result already" in capsys.readouterr().err


def test_a_folder_of_other_files_is_no_class_and_an_empty_one_is(folder):
    (folder / "empty").mkdir()
    assert open_data(folder).features["label"].names == ["cat", "dog", "empty"]
    (folder / "result").mkdir()
    (folder / "result" / "result.json").write_text("{}")
    with pytest.raises(DataError, match="result holds files but no image, so it is no class: move it out of"):
        open_data(folder)


def test_a_file_name_cannot_rule_the_terminal(monkeypatch, capsys, folder, tmp_path):
    def screen(*_, **__):
        raise DataError("row 0 (\x1b[2K\x1b[1;32mtrainguard: clean\x1b[0m.png) cannot be read")

    stub(monkeypatch, "trainguard.screening.screen", screen=screen)
    assert cli.main(["screen", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["screen", "d", "--out", ""], "expected a path, got nothing"),
        (["screen", "d", "--out", "o", "--seed", "-1"], "expected a whole number from 0 to"),
        (["screen", "d", "--out", "o", "--seed", str(2**32)], "expected a whole number from 0 to"),
        (["screen", "d", "--out", "o", "--mean", "a,b"], "expected numbers with commas between them, got a"),
        (["screen", "d", "--out", "o", "--epochs", "x"], "expected a whole number of at least 1, got x"),
        (
            ["drill", "d", "--attacks", "all", "--defenses", "all", "--out", "o", "--seeds", "1,a"],
            "a whole number from",
        ),
    ],
)
def test_what_an_option_wants_is_said_in_words(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_home_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    arguments = cli.build_parser().parse_args(["report", "r", "--out=~/page.html"])
    assert arguments.out == pathlib.Path("/home/somebody/page.html")
