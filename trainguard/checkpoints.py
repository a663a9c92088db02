"""Weights in and out of files, without ever running what is in a file.

A checkpoint from a stranger is read as safetensors, or as a state dict through `torch.load(weights_only=True)`. A
pickle is first looked over opcode by opcode, without executing it: one that names anything but tensors and plain
containers is refused there. What comes out is safetensors, with a JSON beside it that says how it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from trainguard.errors import ModelError
from trainguard.files import plain, write_atomically
from trainguard.models import bare, load_tensors, tensors_of

State = dict[str, Tensor]

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of every file of torch.save before 1.6
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, storage keys
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LONGEST_PICKLE = 64 << 20  # bytes, of names and shapes without any weights: those of the largest models have some MB
_DEEPEST = 4  # how far inside weights may lie

_HARMLESS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",  # the milestones of a learning rate schedule
        "_codecs.encode",  # bytes, in the protocol of torch.save
        "argparse.Namespace",  # timm's train script saves its arguments
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",  # of eight bits
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.Size",
        "torch.device",
        "torch.storage.UntypedStorage",
    }
    | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "complex", "bytearray")}
    | {f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    | {f"torch.{name}" for name in dir(torch) if name.endswith("Storage")}
)

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PLAIN = ("state_dict", "model", "model_state_dict", "module", "net", "weights")

_WRAPPED = re.compile(r"(?<![^.])module\.")  # the mark of DDP, which stands before whatever it wrapped

_CONVERT = (
    "Convert it in a place where you trust it and its author: "
    'safetensors.torch.save_file(model.state_dict(), "weights.safetensors"), '
    'or torch.save(model.state_dict(), "weights.pt")'
)


class UnsafeCheckpoint(ModelError):
    """A file that would run code if it were unpickled; nothing of it was executed."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they were found in a file.

    Attributes:
        weights: name to tensor, on the CPU, names as in the file.
        path: where they came from.
        sha256: of the whole file, hexadecimal.
        where: the key inside the file that held them, `""` for the top level.
        lightning: whether the file is a Lightning checkpoint, which holds the state of losses and metrics as well.
    """

    weights: State
    path: Path
    sha256: str
    where: str
    lightning: bool


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in a file.

    Known layouts: safetensors; a state dict; one under `state_dict`, `model`, `model_state_dict`, `module`, `net` or
    `weights`, as timm, Lightning and most training scripts save it; averaged (EMA) weights under `state_dict_ema`,
    `model_ema`, `ema_state_dict` or `ema`: where a file has both these are taken, as timm does, and get deployed.

    Args:
        path: of the file. What it is shows in its first bytes; the suffix does not count.

    Returns:
        The weights, with names as in the file (`load_weights` takes prefixes off).

    Raises:
        UnsafeCheckpoint: unpickling the file would run code.
        ModelError: the file is missing, truncated, empty, or holds no weights.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            content = _read(path, file, start)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    weights, where = _find_weights(content, path, set())
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    return Checkpoint(weights, path, sha256(path), where, lightning)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model, whole or not at all.

    The marks of torch.compile (`_orig_mod.`) and DDP (`module.`) are taken off, and so is the attribute under which a
    Lightning module or another wrapper keeps its network (`model.`, `net.`): the prefix under which most names fit.

    Args:
        model: of the architecture that the weights belong to; changed in place.
        checkpoint: from `read_checkpoint`.

    Raises:
        ModelError: names that are missing or too many, shapes or kinds of numbers that differ, or weights that are not
            finite; all named.
    """
    model = bare(model)
    tensors = tensors_of(model)
    own = {_uncompiled(name): name for name in tensors}  # a part of it may be compiled
    expected = {plain: tensors[name] for plain, name in own.items()}
    weights = _without_prefix(checkpoint, expected.keys())
    counts = {name: value for name, value in expected.items() if name.endswith(".num_batches_tracked")}
    weights = counts | weights  # torch before 0.4.1 and other frameworks do not count
    averaged = checkpoint.where.split(".")[0] in _AVERAGED
    path = f"{checkpoint.path} (its averaged weights, {checkpoint.where})" if averaged else checkpoint.path
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    if missing or surplus:
        parts = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        parts += [f"{len(surplus)} surplus: {_some(surplus)}"] if surplus else []
        raise ModelError(
            f"{path} does not fit {type(model).__name__} ({'; '.join(parts)}): "
            "give the architecture that it was saved from"
        )
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in expected.items()
        if weights[name].shape != value.shape
    ]
    if wrong:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {_some(wrong, '; ')}: "
            "give the architecture that it was saved from, and images with all of its classes and channels, at the "
            "size that it was trained at (--size)"
        )
    kinds = [
        f"{name} is {_kind(weights[name])}, the model has {_kind(value)}"
        for name, value in expected.items()
        if (weights[name].is_complex() and not value.is_complex()) or (_is_real(value) and not _is_real(weights[name]))
    ]
    if kinds:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {_some(kinds, '; ')}: give the weights as they were trained, "
            "not quantized"
        )
    infinite = [  # where the model's own are too, they belong there: the mask of an attention
        name
        for name, value in weights.items()
        if value.is_floating_point() and not _is_finite(value) and _is_finite(expected[name])
    ]
    if infinite:
        raise ModelError(f"{path} holds NaN or infinite weights in {_some(infinite)}: it comes from a failed training")
    load_tensors(model, {own[name]: value for name, value in weights.items()})


def write_weights(path: str | Path, model: nn.Module, about: Mapping[str, Any]) -> Path:
    """Write a model's weights as safetensors, and `about` as JSON beside them.

    Each of the two files is written whole or not at all, and both are written before either is put in its place, the
    JSON first: what is killed in between can be saved again. The JSON also gets the weights' file name and their
    `sha256`.

    Args:
        path: of the weights; `.safetensors` is added where it is missing.
        model: whose state dict is written; names as in an unwrapped model.
        about: JSON values: settings, history, what went in.

    Returns:
        The path of the weights; the JSON has the same name with `.json`.
    """
    path = weights_path(path)
    state = tensors_of(bare(model))
    weights = {_uncompiled(name): value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    record = {"weights": path.name, "sha256": hashlib.sha256(content).hexdigest(), **about}
    text = json.dumps(plain(record), indent=1, allow_nan=False) + "\n"  # before anything is written
    with write_atomically(path) as weights_file, write_atomically(path.with_suffix(".json")) as record_file:
        weights_file.write_bytes(content)
        record_file.write_text(text)
    return path


def weights_path(path: str | Path) -> Path:
    """The path of weights as `write_weights` has it: with `.safetensors` at its end."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, file: IO[bytes], start: bytes) -> Any:
    """What a file holds, by its first bytes."""
    if not start:
        raise ModelError(f"{path} is empty: expected a checkpoint")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path} is truncated or damaged (safetensors says: {error}): copy it again") from None
    if start.startswith(_ZIP):
        _check_archive(path)
    elif start.startswith(_PICKLE):
        _check_legacy(path, file)
    else:
        raise ModelError(
            f"{path} is neither safetensors nor a file of torch.save (it begins with {start[:4]!r}), "
            "or its start is damaged"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is truncated or damaged (torch says: {reason}): copy it again") from None


def _check_archive(path: Path) -> None:
    """Refuse a zip file of torch.save whose pickle names anything but tensors and containers."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith((".py", "constants.pkl")) or "/code/" in name for name in names):
                raise UnsafeCheckpoint(f"{path} is a TorchScript program, not a checkpoint; it was not run. {_CONVERT}")
            pickles = [name for name in names if name.endswith(".pkl")]
            if len(pickles) != 1:
                raise ModelError(f"{path} is a zip file, but not one of torch.save: expected one data.pkl in it")
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if packed or archive.getinfo(pickles[0]).file_size > _LONGEST_PICKLE:
                raise ModelError(f"{path} is packed as torch.save packs nothing: save the weights anew, as safetensors")
            with archive.open(pickles[0]) as file:
                _check_pickle(path, file)
    except (zipfile.BadZipFile, RuntimeError) as error:  # also encrypted, or packed unusually
        raise ModelError(f"{path} is truncated or damaged ({error}): copy it again") from None


def _check_legacy(path: Path, file: IO[bytes]) -> None:
    """Refuse a file of torch.save before 1.6, a row of pickles, on the same grounds; and any other pickle."""
    file.seek(0)
    first = next((value for _, value, _ in _opcodes(path, file) if isinstance(value, int) and value > 255), None)
    if first != _LEGACY_MAGIC:
        file.seek(0)
        _check_pickle(path, file)
        raise UnsafeCheckpoint(f"{path} is a plain pickle, not a checkpoint; it was not unpickled. {_CONVERT}")
    file.seek(0)
    for _ in range(_LEGACY_PICKLES):
        _check_pickle(path, file)


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    """Look over one pickle without executing it."""
    for opcode, value, _ in _opcodes(path, file):
        if opcode in ("GLOBAL", "INST"):
            name = str(value).replace(" ", ".")
            if name not in _HARMLESS or opcode == "INST":
                raise UnsafeCheckpoint(f"{path} would run {name} when unpickled, so it was not. {_CONVERT}")
        elif opcode in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise UnsafeCheckpoint(f"{path} would look up code by {opcode} when unpickled, so it was not. {_CONVERT}")


def _opcodes(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any, int | None]]:
    try:
        for opcode, value, position in pickletools.genops(file):
            yield opcode.name, value, position
    except Exception as error:  # genops raises ValueError, EOFError, UnicodeDecodeError, ... for a damaged pickle
        raise ModelError(f"{path} is truncated or damaged (its pickle cannot be read: {error})") from None


def _find_weights(content: Any, path: Path, tried: set[int], depth: int = 0) -> tuple[State, str]:
    """The state dict in what a file holds, and the key it was under.

    Args:
        content: of the file, or of a part of it.
        path: of the file.
        tried: identities of parts that hold none: a hostile file has the same one under every key.
        depth: of this part in the file.
    """
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds a {type(content).__name__}: expected a state dict, from name to tensor")
    for key in (*_AVERAGED, *_PLAIN):
        nested = content.get(key)
        if isinstance(nested, Mapping) and depth < _DEEPEST and id(nested) not in tried:
            try:
                weights, where = _find_weights(nested, path, tried, depth + 1)
                if all(value.ndim == 0 for value in weights.values()):
                    raise ModelError(f"{path} holds no state dict under {key!r}")
            except ModelError:  # settings under a name that others use for weights
                tried.add(id(nested))
                continue
            return _statistics(content, weights) | weights, f"{key}.{where}".rstrip(".")
    content = {k: v for k, v in content.items() if isinstance(v, Tensor) or not str(k).endswith("_extra_state")}
    if not content or not all(isinstance(k, str) and isinstance(value, Tensor) for k, value in content.items()):
        first = sorted(content.items(), key=lambda item: isinstance(item[0], str) and isinstance(item[1], Tensor))
        found = ", ".join(f"{name} ({type(value).__name__})" for name, value in first[:6]) or "nothing"
        raise ModelError(f"{path} holds no state dict: expected names and tensors, found {found}")
    return dict(content), ""


def _statistics(content: Mapping, weights: State) -> State:
    """BatchNorm's statistics beside averaged weights that have none: who averages by hand averages parameters."""
    if any(name.endswith(_STATISTICS) for name in weights):
        return {}
    plain = (content[key] for key in _PLAIN if isinstance(content.get(key), Mapping))
    return {name: value for name, value in next(plain, {}).items() if str(name).endswith(_STATISTICS)}


def _without_prefix(checkpoint: Checkpoint, expected: Collection[str]) -> State:
    """The weights under the prefix with which most names are the model's; the rest stays, to be called surplus."""
    weights = {_uncompiled(name): value for name, value in checkpoint.weights.items()}
    if "n_averaged" not in expected:  # the counter of torch.optim.swa_utils.AveragedModel
        weights.pop("n_averaged", None)
    if any(_WRAPPED.search(name) for name in weights) and not any(_WRAPPED.search(name) for name in expected):
        weights = {_WRAPPED.sub("", name): value for name, value in weights.items()}  # of parts of the model too
    prefixes = {""} | {name[: i + 1] for name in weights for i, letter in enumerate(name) if letter == "."}

    def hits(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in expected for name in weights)

    found = {prefix: hits(prefix) for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix))}
    prefix = max(found, key=lambda name: found[name])
    whole = sum(not name.endswith("num_batches_tracked") for name in expected)
    rivals = [name for name, count in found.items() if count >= whole and not name.startswith(prefix)]
    if rivals:
        raise ModelError(
            f"{checkpoint.path} holds two networks of this architecture, {prefix!r} and {rivals[0]!r}: save the one "
            "that is meant into a file of its own"
        )
    inside = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    outside = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    return inside if checkpoint.lightning else inside | outside


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _is_finite(value: Tensor) -> bool:
    return bool(value.float().isfinite().all())  # of 8 bits, torch does not know


def _uncompiled(name: str) -> str:
    """A name without the mark of torch.compile, which stands before whatever was compiled."""
    return name.replace("_orig_mod.", "")


def _some(names: list[str], between: str = ", ", most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
