import errno
import os
import stat

import pytest

from trainguard import files
from trainguard.errors import StateError
from trainguard.files import visible, writable_folder, write_atomically


def test_write_atomically_makes_the_folder_and_the_file(tmp_path):
    path = tmp_path / "new" / "state.json"
    with write_atomically(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["state.json"]


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(KeyError), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_disk_full_is_named_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "state.json"
    with (
        pytest.raises(StateError, match=r"disk is full.*state\.json.*free some space"),
        write_atomically(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_no_permission_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StateError, match=f"no permission to write {tmp_path}: choose another folder"):
        writable_folder(tmp_path)


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StateError, match=r"expected a folder at .*taken"):
        writable_folder(tmp_path / "taken" / "inside")
    with pytest.raises(StateError, match=r"expected a folder at .*taken"):
        writable_folder(tmp_path / "taken")


def test_other_errors_pass_through_unchanged(tmp_path):
    with pytest.raises(OSError, match="no such device") as caught, write_atomically(tmp_path / "x"):
        raise OSError(errno.ENODEV, "no such device")
    assert not isinstance(caught.value, StateError)


def test_files_have_the_permissions_that_the_user_s_umask_gives(tmp_path):
    with write_atomically(tmp_path / "x") as temporary:
        temporary.write_text("")
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_link_is_written_through_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with write_atomically(tmp_path / "link.txt") as path:
        path.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "no regular file"), (".", "a folder")):
        with pytest.raises(StateError, match=f"is {what}: name a file to write"), write_atomically(tmp_path / name):
            raise AssertionError("there is nothing to write to")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_stranger_s_text_cannot_rule_a_terminal():
    assert visible("\x1b[2Kclean\nverdict\u202e") == r"\x1b[2Kclean\nverdict\u202e"
    for name in ("Kätzchen", "חתול", "\U0001f468\u200d\U0001f469", "a b"):
        assert visible(name) == name


def test_a_file_that_is_written_anew_keeps_its_permissions(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    path.chmod(0o600)
    with write_atomically(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    with write_atomically(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_halves_of_characters_are_shown():
    assert visible("caf\udce9") == "caf\\udce9"
