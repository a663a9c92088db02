"""Files that are written whole or not at all, and values as they are written."""

import errno
import io
import json
import math
import os
import stat
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainguard.errors import StateError

RESULTS = ("result.json", "audit.json", "drill.json")  # of which a folder holds one, and its report
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control characters, marks that format, halves of characters, separators
JOINERS = "\u200c\u200d"  # in words of some scripts, and in emoji


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary file to write to, which becomes `path` when the block ends without an error.

    The temporary file lies beside `path` and has its suffix, is flushed to the disk, and then renamed: whoever looks
    at `path` sees the old file or the new one, never half of either. If the block raises, `path` is untouched and the
    temporary file is gone.

    Args:
        path: the file to write; its folder is made where it does not exist.

    Yields:
        The temporary path to write to.

    Raises:
        StateError: the folder cannot be written, or the disk is full; the message names the path and the way out.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "no regular file"
        raise StateError(f"{path} is {what}: name a file to write")
    folder = writable_folder(target.parent)
    with _explained(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.stem[:40]}.", suffix=target.suffix, dir=folder)
        os.close(handle)
    temporary = Path(name)
    try:
        with _explained(target):
            yield temporary
            with open(temporary, "r+b") as written:  # Windows flushes no file that is only read
                os.fsync(written.fileno())
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
            os.replace(temporary, target)
            _flush_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_for_torch(path: str | os.PathLike, value: Any) -> None:
    """Write what `torch.load` reads, whole or not at all; see `write_atomically`."""
    import torch

    content = io.BytesIO()  # where the disk is full, torch's own writer says something else than the system
    torch.save(value, content)
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def writable_folder(path: str | os.PathLike) -> Path:
    """Make a folder where there is none, and make sure that files can be put in it.

    Args:
        path: the folder.

    Returns:
        The folder as a `Path`.

    Raises:
        StateError: it cannot be made or written, or something that is not a folder lies there.
    """
    folder = Path(path)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # access() asks about permission bits alone; a real file also finds read-only mounts and quotas.
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def read_record(path: Path, error: type[Exception] = ValueError) -> dict[str, Any]:
    """What a JSON file of ours holds, which is always an object.

    Args:
        path: the file.
        error: what to raise where it holds something else; the message names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read ({problem}): it was damaged or is not one of ours") from None
    if not isinstance(record, dict):
        raise error(f"{path} holds a {type(record).__name__} where an object was expected: it is not one of ours")
    return record


def results_in(folder: Path, besides: str = "") -> list[str]:
    """The files of results in a folder, but for one name."""
    return [name for name in RESULTS if name != besides and (folder / name).is_file()]


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays and tensors as lists, what is infinite or NaN as null, anything else as text."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def visible(text: str) -> str:
    """Text of a stranger's, with what could rule a terminal or turn the reading direction shown as its code.

    Names of classes and files come with the data: escape sequences in them could erase a verdict and write another.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in UNSEEN and character not in JOINERS
        else character
        for character in text
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's errors about a path into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"no permission to write {path}: choose another folder or change its permissions"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full, {path} was not written: free some space or choose a folder on another disk"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            message = f"expected a folder at {path}, found a file: choose another folder or move the file away"
        else:
            raise
        raise StateError(message) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can flush a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
