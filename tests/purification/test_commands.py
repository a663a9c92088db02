import hashlib
import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.checkpoints import UnsafeCheckpoint, load_weights, read_checkpoint
from trainguard.errors import ModelError
from trainguard.models import build
from trainguard.purification import audit_checkpoint, commands, purify_checkpoint
from trainguard.purification.commands import model_of
from trainguard.purification.results import PurifyResult
from trainguard.sources import open_data

# The delivered model never learned anything, so that purifying it may find nothing worth keeping.
pytestmark = pytest.mark.filterwarnings("ignore:the model is returned as it came", "ignore:the model gets")
ARCH = "test_resnet"  # timm's smallest, made for tests
FEW = {
    "progress": False,
    "rounds": 1,
    "adversarial_batches": (2,),
    "plain_batches": (2,),
    "screening": False,
    "eps": 0.02,
    "batch_size": 16,
    "lr": 1e-4,  # the model never learned anything: larger steps may blow it up
}


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    """A checkpoint and the images that it was (hardly) trained on."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=3)
    path = tmp_path_factory.mktemp("delivered") / "model.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 7}, path)
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return path, TensorDataset(images, torch.arange(60) % 3)


def test_a_checkpoint_is_purified_into_safetensors_with_a_record(delivered, tmp_path):
    path, data = delivered
    outcome = purify_checkpoint(path, arch=ARCH, data=data, out=tmp_path / "clean", **FEW, max_accuracy_loss=1.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.json", "clean.safetensors"]
    record = json.loads((tmp_path / "clean.json").read_text())
    assert record["input"] == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "weights under": "state_dict",
        "arch": ARCH,
    }
    assert record["sha256"] == hashlib.sha256((tmp_path / "clean.safetensors").read_bytes()).hexdigest()
    assert outcome.changed and all(math.isfinite(row["loss"]) for row in outcome.history if "loss" in row)
    assert record["history"] == outcome.history and record["settings"]["plain_batches"] == [2]
    model = timm.create_model(ARCH, num_classes=3)
    load_weights(model, read_checkpoint(tmp_path / "clean.safetensors"))
    for one, other in zip(model.parameters(), outcome.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_audited(delivered):
    path, data = delivered
    result = audit_checkpoint(path, arch=ARCH, data=data, progress=False, images=30, eps=0.02)
    assert result.transitions.shape == (3, 3) and 0 < result.images <= 30
    assert result.verdict in ("clean", "backdoored", "undecided")


def test_nothing_is_written_for_a_checkpoint_that_is_refused(delivered, tmp_path):
    _, data = delivered
    target = tmp_path / "written"

    class WritesAFile:
        def __reduce__(self):
            return pathlib.Path.write_text, (target, "pickle ran")

    torch.save({"state_dict": {}, "extra": WritesAFile()}, tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpoint, match="was not"):
        purify_checkpoint(tmp_path / "model.pt", arch=ARCH, data=data, out=tmp_path / "out", **FEW)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_an_architecture_that_does_not_fit_is_named(delivered, tmp_path):
    path, data = delivered
    with pytest.raises(ModelError, match="missing: "):
        audit_checkpoint(path, arch="test_vit", data=data, progress=False)
    with pytest.raises(ModelError, match="'resnet-of-mine'"):
        audit_checkpoint(path, arch="resnet-of-mine", data=data, progress=False)


def test_the_example_purifies_a_checkpoint_with_a_folder_of_images(delivered, short, tmp_path, monkeypatch, capsys):
    import runpy

    for row in range(30):
        folder = tmp_path / "images" / f"class{row % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
    script = pathlib.Path(__file__).parents[2] / "examples" / "purify_delivered_model.py"
    words = [str(script), str(delivered[0]), str(tmp_path / "images"), "--arch", ARCH, "--out", str(tmp_path / "out")]
    normalised = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    monkeypatch.setattr("sys.argv", [*words, *normalised, "--batches", "2", "2"])
    runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert "AuditResult" in shown and "PurifyResult" in shown
    assert (tmp_path / "out.safetensors").exists()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["pixel_range"] == {"low": [-1.0] * 3, "high": [1.0] * 3}


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_a_name_of_both_libraries_is_the_one_that_fits(name, tmp_path, monkeypatch):
    """timm and torchvision have different networks under some names."""
    made = torchvision.models.get_model(name, weights=None, num_classes=4)
    torch.save(made.state_dict(), tmp_path / "w.pt")
    images = SimpleNamespace(shape=(3, 32, 32), num_classes=4, fed_shape=None)
    model = model_of(name, read_checkpoint(tmp_path / "w.pt"), images).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), made.eval()(x))
    with pytest.raises(ModelError, match="neither timm nor torchvision"):
        build("fasterrcnn_resnet50_fpn", images)  # it classifies nothing, and would fetch weights


@pytest.mark.parametrize("form", ["as it came", "safetensors"])  # which are sorted by name
def test_grey_images_are_given_to_a_model_of_colour_images_in_three_channels(form, delivered, tmp_path, monkeypatch):
    arch, path = ARCH, delivered[0]
    if form == "safetensors":
        arch, path = "efficientnet_b0", tmp_path / "w.safetensors"
        safetensors.torch.save_model(timm.create_model(arch, num_classes=3), str(path))
    for row in range(12):
        folder = tmp_path / "grey" / f"class{row % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 20 * row).save(folder / f"{row}.png")
    seen = {}

    def watch(model, store, **options):
        seen["shape"], seen["pixels"] = store.shape, store.batch([1])
        assert model()(store.batch([0])).shape == (1, 3)

    monkeypatch.setattr(commands, "audit", watch)
    dataset = open_data(tmp_path / "grey")
    audit_checkpoint(path, arch=arch, data=dataset, bounds=(0, 1))
    assert seen["shape"] == (3, 16, 16) and seen["pixels"].shape == (1, 3, 16, 16)
    assert seen["pixels"].unique().tolist() == [pytest.approx(60 / 255)]


def test_grey_images_may_judge_a_model_of_colour_images(delivered, tmp_path):
    path, data = delivered
    grey = TensorDataset(data.tensors[0][:, :1], data.tensors[1])
    options = FEW | {"max_accuracy_loss": 1.0, "mean": 0.5, "std": 0.5, "validation": grey}
    outcome = purify_checkpoint(path, arch=ARCH, data=grey, out=tmp_path / "clean", **options)
    assert len(outcome.settings["pixel_range"]["low"]) == 3


@pytest.mark.parametrize("place", [".", "/"])
def test_a_place_without_a_name_is_no_file(place, delivered):
    with pytest.raises(FileExistsError, match="is a folder: name a file to write"):
        purify_checkpoint(delivered[0], arch=ARCH, data=delivered[1], out=place, **FEW)


def test_a_folder_in_the_place_of_the_weights_is_found_before_the_work(delivered, tmp_path):
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        purify_checkpoint(delivered[0], arch=ARCH, data=delivered[1], out=tmp_path / "out", **FEW)


def test_neither_the_checkpoint_nor_a_stranger_s_record_is_overwritten(delivered, tmp_path):
    path, data = delivered
    model = timm.create_model(ARCH, num_classes=3)
    safetensors.torch.save_model(model, str(tmp_path / "m.safetensors"))
    with pytest.raises(FileExistsError, match="is the checkpoint itself"):
        purify_checkpoint(tmp_path / "m.safetensors", arch=ARCH, data=data, out=tmp_path / "m", **FEW)
    safetensors.torch.save_model(model, str(tmp_path / "other.safetensors"))
    with pytest.raises(FileExistsError, match="holds weights of something else"):
        purify_checkpoint(path, arch=ARCH, data=data, out=tmp_path / "other", **FEW)
    (tmp_path / "out.json").write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match="holds something else and would be overwritten"):
        purify_checkpoint(path, arch=ARCH, data=data, out=tmp_path / "out", **FEW)


def test_a_record_keeps_its_own_names_to_itself(tmp_path):
    outcome = PurifyResult(nn.Linear(2, 2), [], np.arange(3), 0.9, 0.9, True, "it ended")
    for name in ("sha256", "model", "history"):
        with pytest.raises(ValueError, match=f"the record has a '{name}' of its own"):
            outcome.save(tmp_path / "out", **{name: "mine"})
    assert not list(tmp_path.iterdir())
