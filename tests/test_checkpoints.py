import argparse
import hashlib
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from trainguard.checkpoints import UnsafeCheckpoint, load_weights, read_checkpoint, sha256, write_weights
from trainguard.errors import ModelError, StateError
from trainguard.models import load_tensors


def net(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, classes))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


LAYOUTS = {
    "state dict": lambda s: s,
    "under state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}, "param_groups": []}},
    "under model": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, name="run")},
    "ddp": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "ddp of compiled": lambda s: prefixed(s, "module._orig_mod."),
    "lightning": lambda s: {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(4)},
    },
    "lightning, compiled": lambda s: {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(s, "net._orig_mod."),
    },
    "timm with average": lambda s: {
        "arch": "x",
        "state_dict": {name: value + 1 for name, value in s.items()},
        "state_dict_ema": s,
        "args": argparse.Namespace(lr=0.1),
    },
    "with a schedule and streams": lambda s: {
        "model": s,
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(
            torch.optim.SGD(net().parameters(), 0.1), [3, 5]
        ).state_dict(),
        "seen": {1, 2},
        "raw": [b"bytes", bytearray(b"more"), 1j],
    },
    "not counted": lambda s: {name: value for name, value in s.items() if "num_batches" not in name},
    "with another state": lambda s: s | {"0._extra_state": {"scale": 2}},
    "ddp of a part": lambda s: {name.replace("0.", "0.module.", 1): value for name, value in s.items()},
    "averaged model": lambda s: {"model_ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(3)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_known_layouts_are_read(tmp_path, layout, zipped):
    path = tmp_path / "weights.pt"
    torch.save(LAYOUTS[layout](net(1).state_dict()), path, _use_new_zipfile_serialization=zipped)
    model = net(0)
    load_weights(model, read_checkpoint(path))
    assert same(model, net(1))


def test_averaged_weights_are_taken_and_the_record_says_so(tmp_path):
    torch.save({"state_dict": net(1).state_dict(), "state_dict_ema": net(2).state_dict()}, tmp_path / "w.pt")
    model = net(0)
    load_weights(model, checkpoint := read_checkpoint(tmp_path / "w.pt"))
    assert same(model, net(2)) and checkpoint.where == "state_dict_ema"
    assert checkpoint.sha256 == hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()


def test_settings_under_the_name_of_averaged_weights_are_none(tmp_path):
    settings = {"decay": torch.tensor(0.99), "updates": torch.tensor(7)}
    torch.save({"model": net(1).state_dict(), "ema": settings}, tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt").where == "model"


def test_a_file_that_holds_one_thing_under_every_name_is_refused_at_once(tmp_path):
    content = {"lr": 0.1}
    for _ in range(12):
        content = dict.fromkeys(("model", "state_dict", "ema", "net", "module", "weights"), content)
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no state dict"):  # 6 to the 12th places, if it looked at each
        read_checkpoint(tmp_path / "w.pt")


def test_a_packed_archive_is_refused_before_its_pickle_is_read(tmp_path):
    torch.save(net(1).state_dict(), tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as plain,
        zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as one,
    ):
        for name in plain.namelist():
            one.writestr(name, plain.read(name))
    with pytest.raises(ModelError, match=r"is packed as torch\.save packs nothing"):
        read_checkpoint(tmp_path / "p.pt")


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(tmp_path, kind):
    state = net(1).state_dict()
    name = next(iter(state))
    torch.save(state | {name: state[name].to(kind)}, tmp_path / "w.pt")
    model = net(0)
    with pytest.raises(ModelError, match=f"{name} is {str(kind)[6:]}, the model has float32: .*not quantized"):
        load_weights(model, read_checkpoint(tmp_path / "w.pt"))
    assert same(model, net(0))


class Scaled(nn.Linear):
    """Keeps something in its state that is no tensor, as quantization layers do."""

    def get_extra_state(self):
        return {"scale": 2}

    def set_extra_state(self, state):
        assert state == {"scale": 2}


class Counted(nn.Linear):
    """Keeps a tensor there."""

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        assert state.tolist() == [1]


@pytest.mark.parametrize("kind", [Scaled, Counted])
def test_what_modules_keep_beside_their_weights_comes_back(kind, tmp_path):
    model = nn.Sequential(kind(3, 2))
    write_weights(tmp_path / "w", model, {})
    other = nn.Sequential(kind(3, 2))
    load_weights(other, read_checkpoint(tmp_path / "w.safetensors"))
    assert torch.equal(other[0].weight, model[0].weight)


def test_what_is_kept_beside_the_weights_stays_in_its_own_precision():
    model = nn.BatchNorm2d(3)
    model.register_buffer("scale", torch.ones(3, dtype=torch.float64), persistent=False)
    load_tensors(model, {"scale": torch.full((3,), 2.0, dtype=torch.bfloat16)})
    assert model.scale.dtype == torch.float64 and model.scale.tolist() == [2.0] * 3


def test_safetensors_is_read_by_content_not_by_suffix(tmp_path):
    safetensors.torch.save_file(prefixed(net(1).state_dict(), "module."), tmp_path / "weights.bin")
    model = net(0)
    load_weights(model, read_checkpoint(tmp_path / "weights.bin"))
    assert same(model, net(1))


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), "pickle ran"))


class RunsACommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("payload", [WritesAFile, RunsACommand])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 4", "pickle 0"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, payload, form):
    target, path = tmp_path / "written", tmp_path / "weights.pt"
    content = {"state_dict": net(1).state_dict(), "extra": payload(str(target))}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        protocol = int(form[-1]) if form[-1].isdigit() else 2
        path.write_bytes(pickle.dumps({"extra": payload(str(target))}, protocol=protocol))
    expected = ModelError if form == "pickle 0" else UnsafeCheckpoint  # protocol 0 has no mark of a pickle
    with pytest.raises(expected) as refusal:
        read_checkpoint(path)
    assert not target.exists()
    if expected is UnsafeCheckpoint:
        assert "save_file(model.state_dict()" in str(refusal.value) and str(path) in str(refusal.value)
    pickle.loads(pickle.dumps(payload(str(target))))
    assert target.exists()  # the payload is real: it was not refused because it is broken


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_pickled_module_and_a_script_are_refused_by_name(tmp_path):
    torch.save(net(), tmp_path / "module.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_checkpoint(tmp_path / "module.pt")
    torch.jit.trace(net(), torch.rand(1, 3, 8, 8)).save(tmp_path / "script.pt")
    with pytest.raises(UnsafeCheckpoint, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_truncated_file_is_called_so(tmp_path, form, share):
    path = tmp_path / "weights"
    if form == "safetensors":
        safetensors.torch.save_file(net().state_dict(), path)
    else:
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"truncated or damaged|weights is empty") as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"not a checkpoint", "neither safetensors"), (None, "cannot read")]
)
def test_what_is_no_checkpoint_is_called_so(tmp_path, content, words):
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_checkpoint(tmp_path / "w")


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"epoch \(int\), loss \(float\)"):
        read_checkpoint(tmp_path / "w.pt")


def test_what_is_no_weight_among_many_is_named_first(tmp_path):
    torch.save({f"w{i}": torch.ones(1) for i in range(9)} | {"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"found epoch \(int\), w0 \(Tensor\)"):
        read_checkpoint(tmp_path / "w.pt")


def test_names_that_are_no_text_are_shown(tmp_path):
    torch.save({0: torch.ones(2), 1: torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"holds no state dict: .* found 0 \(Tensor\), 1 \(Tensor\)"):
        read_checkpoint(tmp_path / "w.pt")


def test_weights_of_eight_bits_are_read(tmp_path):
    state = net(1).state_dict() | {"3.bias": torch.tensor([0.5, 1, 2, -4]).to(torch.float8_e4m3fn)}
    torch.save(state, tmp_path / "w.pt")
    model = net(0)
    load_weights(model, read_checkpoint(tmp_path / "w.pt"))
    assert model[3].bias.tolist() == [0.5, 1, 2, -4]


@pytest.mark.parametrize("wrap", ["average", "compiled part"])
def test_what_was_written_of_a_wrapped_model_is_read_into_its_like(wrap, tmp_path):
    def wrapped(seed):
        if wrap == "average":
            return torch.optim.swa_utils.AveragedModel(net(seed))
        return nn.Sequential(torch.compile(net(seed)), nn.Identity())

    model = wrapped(0)
    load_weights(model, read_checkpoint(write_weights(tmp_path / "w", wrapped(1), {})))
    assert same(model, wrapped(1))


def refused(tmp_path, state, words):
    torch.save(state, tmp_path / "w.pt")
    model = net(0)
    with pytest.raises(ModelError, match=words):
        load_weights(model, read_checkpoint(tmp_path / "w.pt"))
    assert same(model, net(0))


def test_of_two_networks_of_one_architecture_none_is_guessed(tmp_path):
    two = prefixed(net(1).state_dict(), "student.") | prefixed(net(2).state_dict(), "teacher.")
    for saved in (two, {"pytorch-lightning_version": "2.4.0", "state_dict": two}):
        refused(tmp_path, saved, r"two networks of this architecture, 'student\.' and 'teacher\.'")


def test_averages_of_parameters_alone_keep_the_statistics_beside_them(tmp_path):
    state = net(1).state_dict()
    averaged = {name: value + 1 for name, value in state.items() if "running" not in name and "num_" not in name}
    torch.save({"model": prefixed(state, "module."), "ema": averaged}, tmp_path / "w.pt")
    load_weights(model := net(0), read_checkpoint(tmp_path / "w.pt"))
    assert torch.equal(model[0].weight, state["0.weight"] + 1)
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    refused(tmp_path, {"ema": averaged}, r"its averaged weights, ema\) does not fit Sequential \(2 missing")


def test_a_name_that_ends_in_module_is_a_name(tmp_path):
    torch.save(prefixed(net(1).state_dict(), "backbone_module."), tmp_path / "w.pt")
    load_weights(model := net(0), read_checkpoint(tmp_path / "w.pt"))
    assert same(model, net(1))


def test_what_holds_itself_or_is_encrypted_is_called_so(tmp_path):
    endless = {"epoch": 3}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no state dict: expected names and tensors, found epoch"):
        read_checkpoint(tmp_path / "w.pt")
    torch.save(net(1).state_dict(), tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        start = content.find(mark)
        while start >= 0:
            content[start + place] |= 1
            start = content.find(mark, start + 1)
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_checkpoint(tmp_path / "w.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = net(1).state_dict()
    refused(tmp_path, {k: v for k, v in state.items() if k != "3.bias"}, r"1 missing: 3\.bias")
    refused(tmp_path, state | {"4.weight": torch.ones(1)}, r"1 surplus: 4\.weight")
    refused(tmp_path, prefixed(state, "model.") | {"loss.weight": torch.ones(4)}, r"1 surplus: loss\.weight")
    refused(tmp_path, net(1, classes=7).state_dict(), r"3\.weight is \(7, 144\), the model has \(4, 144\)")
    refused(tmp_path, state | {"0.bias": torch.full((4,), float("nan"))}, r"NaN or infinite weights in 0\.bias")


def test_written_weights_read_back_with_a_record_beside_them(tmp_path):
    path = write_weights(tmp_path / "out", net(1), {"settings": {"seed": 3}, "history": [{"round": 0}]})
    assert path == tmp_path / "out.safetensors"
    model = net(0)
    load_weights(model, read_checkpoint(path))
    assert same(model, net(1))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["sha256"] == sha256(path) and record["weights"] == "out.safetensors"
    assert record["settings"] == {"seed": 3} and record["history"] == [{"round": 0}]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_weights(tmp_path / "out.safetensors", net(1), {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, StateError)):
        write_weights(path, net(2), {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.safetensors"]


def test_tied_weights_and_wrapped_models_are_written_bare(tmp_path):
    model = net(1)
    model.add_module("5", model[3])
    path = write_weights(tmp_path / "tied", nn.DataParallel(torch.compile(model)), {})
    names = set(safetensors.torch.load_file(path))
    assert {"0.weight", "3.weight", "5.weight"} <= names and not any("module" in n or "_orig_mod" in n for n in names)
