import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmcr_hf import durable
from cmcr_hf.durable import (
    WriteError,
    locked,
    named_write_errors,
    new_folder,
    replacement,
    sync_folder,
    sync_tree,
    verify_checksums,
    write_checksums,
    write_durably,
)


@pytest.fixture
def tree(tmp_path):
    """A folder with a file in it and one below, sealed by its checksums."""
    folder = tmp_path / "tree"
    (folder / "below").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"alpha")
    (folder / "below" / "b.bin").write_bytes(b"beta")
    write_checksums(folder)
    return folder


def test_a_file_is_replaced_whole_and_leaves_no_temporary_one(tmp_path):
    for data in (b"old", b"new"):
        write_durably(tmp_path / "file", data)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def fill_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    write_durably(tmp_path / "file", b"old")
    monkeypatch.setattr(os, step, fill_disk)
    with pytest.raises(WriteError, match=f"Cannot write to {tmp_path}: No space left on device. Free space and run"):
        write_durably(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_folder_is_replaced_whole(tmp_path):
    for data in (b"old", b"new"):
        with replacement(tmp_path / "folder") as folder:
            folder.mkdir()
            (folder / "file").write_bytes(data)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_a_link_to_a_folder_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "folder")
    for data in (b"old", b"new"):
        with replacement(tmp_path / "link") as folder:
            folder.mkdir()
            (folder / "file").write_bytes(data)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "folder" / "file").read_bytes() == b"new"
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "folder", "file", "link"}


@pytest.mark.parametrize("call", range(2))
def test_a_failed_replacement_of_a_folder_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch, call):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    rename, renames = os.rename, []

    def renaming(*paths):
        renames.append(paths)
        if len(renames) - 1 == call:
            fill_disk()
        rename(*paths)

    monkeypatch.setattr(os, "rename", renaming)
    with (
        pytest.raises(WriteError, match=f"Cannot write to {tmp_path}: No space left on device"),
        replacement(tmp_path / "folder") as folder,
    ):
        folder.mkdir()
        (folder / "file").write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free space and run again"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. Free space and run again"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system. Make it writable"),
        (PermissionError(errno.EACCES, "Permission denied", "run/a/b"), "Permission denied. Make it writable"),
        (
            OSError(errno.ENOSPC, "No space left on device", "src/code.py", None, "run/code.py"),
            "No space left on device",
        ),
        (Exception("No space left on device (os error 28)"), "No space left on device. Free space"),
        (RuntimeError("Error while serializing: Read-only file system (os error 30)"), "Read-only file system"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "No space left on device"),
    ],
)
def test_what_a_disk_makes_libraries_raise_names_the_folder_and_the_remedy(error, expected):
    with (
        pytest.raises(WriteError, match=f"^Cannot write to run: {expected}") as caught,
        named_write_errors(Path("run")),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied", "data/photo.jpg"),
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/cache"),
        ValueError("Cannot read image 'a.jpg': Permission denied"),
        WriteError("Cannot write to run/store: No space left on device."),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as caught, named_write_errors(Path("run")):
        raise error
    assert caught.value is error


def test_a_tree_as_it_was_written_passes(tree):
    verify_checksums(tree)
    assert sorted(json.loads((tree / "sha256.json").read_text())) == ["a.bin", "below/b.bin"]


def test_a_file_of_others_in_a_tree_is_none_of_its_business(tree):
    (tree / "below" / ".DS_Store").write_text("")
    verify_checksums(tree)


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda tree: flip(tree / "a.bin"), "a.bin does not have the sha256 that sha256.json records"),
        (lambda tree: (tree / "below" / "b.bin").write_bytes(b"bet"), "below/b.bin does not have the sha256"),
        (lambda tree: (tree / "below" / "b.bin").unlink(), "below/b.bin does not have the sha256"),
        (lambda tree: (tree / "sha256.json").unlink(), "sha256.json cannot be read"),
        (lambda tree: (tree / "sha256.json").write_bytes(b"\xff"), "sha256.json is no JSON"),
        (lambda tree: (tree / "sha256.json").write_text("[]"), "sha256.json holds no object"),
    ],
)
def test_a_tree_that_differs_is_named(tree, damage, expected):
    damage(tree)
    with pytest.raises(ValueError, match=expected):
        verify_checksums(tree)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of open files from /proc")
def test_checksums_are_written_behind_everything_they_vouch_for(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"alpha")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_checksums(tmp_path)
    names = [Path(name).relative_to(tmp_path).as_posix() for name in synced]
    assert names == ["a.bin", ".", ".sha256.json.tmp", "."]


def test_windows_does_not_open_a_folder_and_syncs_files_that_are_open_for_writing(tree, monkeypatch):
    modes = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", lambda *arguments: pytest.fail("A folder cannot be opened there."))
    monkeypatch.setattr(durable, "_sync", lambda descriptor: modes.append(descriptor))
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: modes.append(mode) or opened(path, mode))
    sync_folder(tree)
    sync_tree(tree)
    assert [mode for mode in modes if isinstance(mode, str)] == ["r+b"] * 3


def test_macos_asks_the_drive_to_empty_its_cache(tmp_path, monkeypatch):
    import fcntl

    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("That stops at the cache."))
    write_durably(tmp_path / "file", b"data")
    # Of the file and of its folder.
    assert asked == [51, 51]


def test_macos_falls_back_to_fsync_on_a_file_system_without_that_call(tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor, command):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    synced = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    write_durably(tmp_path / "file", b"data")
    assert len(synced) == 2


def test_a_second_holder_of_a_lock_is_refused_at_once_until_the_first_ends(tmp_path):
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(ValueError, match=f"another run is using {folder}"), locked(folder):
        pytest.fail("Two hold the lock.")
    with locked(folder):
        pass


def test_windows_locks_the_first_byte_of_the_file(tmp_path, monkeypatch):
    locks = []

    def locking(descriptor, mode, count):
        if locks:
            raise PermissionError(errno.EACCES, "Permission denied")
        locks.append((mode, count))

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with locked(tmp_path), pytest.raises(ValueError, match=f"another run is using {tmp_path}"), locked(tmp_path):
        pytest.fail("Two hold the lock.")
    assert locks == [(2, 1)]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    import fcntl

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ValueError, match=r"Cannot lock .*\.lock: No locks available\. Use an output"),
        locked(tmp_path),
    ):
        pytest.fail("Nothing keeps others out.")


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "model.safetensors").write_bytes(b"all")
        (folder / "model.safetensors").chmod(0o600)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    usual = tmp_path / "usual"
    usual.touch()
    assert (tmp_path / "deep/new/model.safetensors").stat().st_mode == usual.stat().st_mode
    (tmp_path / "directory").mkdir()
    assert (tmp_path / "deep/new").stat().st_mode == (tmp_path / "directory").stat().st_mode


def test_a_new_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"
    with pytest.raises(ValueError, match="empty was filled by another run meanwhile"), new_folder(tmp_path / "empty"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}
