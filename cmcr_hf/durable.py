"""Files and folders that a crash leaves whole, that show it when they are damaged, and that one process uses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

CHECKSUMS = "sha256.json"
LOCK = ".lock"
WRITE_REMEDIES = {
    errno.ENOSPC: "Free space and run again",
    errno.EDQUOT: "Free space and run again",
    errno.EROFS: "Make it writable or use another folder, and run again",
    errno.EFBIG: "Use a file system, and a limit of the shell (ulimit -f), that take larger files, and run again",
    errno.EEXIST: "Move that file away or use another folder, and run again",
    errno.EACCES: "Make it writable or use another folder, and run again",
}
# Libraries tell of a disk by their texts alone: safetensors and tokenizers by the system's, torch by its own.
WRITE_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "PytorchStreamWriter failed writing": errno.ENOSPC,
    "enforce fail at inline_container": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,
}


class WriteError(OSError):
    """A folder that cannot be written, named with the remedy."""


@contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Raise a `WriteError` that names the folder in place of what a full or read-only disk makes libraries raise."""
    try:
        yield
    except (WriteError, ValueError):
        raise
    except Exception as error:  # tokenizers raises no other class.
        told = [code for text, code in WRITE_TEXTS.items() if text in str(error)]
        code = getattr(error, "errno", None) or (told[0] if told else None)
        # Of a copy, the one that is read comes first.
        named = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
        paths = [Path(str(name)).absolute() for name in named]
        elsewhere = paths and all(folder.absolute() not in (path, *path.parents) for path in paths)
        if code not in WRITE_REMEDIES or elsewhere:
            raise
        raise WriteError(
            f"Cannot write to {folder}: {os.strerror(code)}. {WRITE_REMEDIES[code]}: what is written is kept."
        ) from error


def temporary_path(path: Path) -> Path:
    """Return the name under which a file or folder is written before it takes its own."""
    return path.with_name(f".{path.name}.tmp")


def write_durably(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace a file so that a kill or a power failure leaves the old bytes or the new ones.

    If writing fails, what was written is removed: on a full disk, it takes space that is to be freed.

    Args:
        temporary: written first, beside the file; one of the process's own where several may write the file at a time.
    """
    temporary = temporary or temporary_path(path)
    with named_write_errors(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            os.replace(temporary, path)
        except (Exception, KeyboardInterrupt):
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """Give a name to write a folder to, which takes the place of `folder` when the context ends without an error.

    Otherwise the folder is as it was, and what was written is removed; what a kill leaves, the next replacement
    removes.
    """
    with named_write_errors(folder.parent):
        # A link stays one, and what it leads to is replaced.
        folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
        _clear_replacement(folder)
        new, old = temporary_path(folder), _old_path(folder)
        try:
            yield new
            _finish(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except (Exception, KeyboardInterrupt):
            _clear_replacement(folder)
            raise
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _clear_replacement(folder: Path) -> None:
    """Remove what a replacement of a folder left; one between its two renames gives the old folder back."""
    old = _old_path(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (temporary_path(folder), old):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `folder` in one step when the context ends without an error.

    Raises ValueError if `folder` is there by then and not empty, `WriteError` if the disk is full or not writable;
    what was written is removed.
    """
    # A link stays one, and what it leads to is filled.
    folder = Path(os.path.realpath(folder))
    with named_write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with named_write_errors(folder.parent):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _finish(temporary)
        try:
            # Takes the place of an empty folder, and of no other one.
            temporary.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ValueError(f"{folder} was filled by another run meanwhile. Name a new folder.") from error
            raise ValueError(
                f"{folder} cannot be replaced ({error.strerror}): name a folder that is not there yet, such as "
                f"{folder / 'model'}."
            ) from error
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def _finish(folder: Path) -> None:
    """Give the files of a folder that was just written their usual permissions, and bring all of it to the disk."""
    give_usual_permissions(folder.rglob("*.safetensors"))
    sync_tree(folder)


def give_usual_permissions(paths: Iterable[Path]) -> None:
    """Give files the permissions of any other new file: safetensors writes its own for their owner alone."""
    usual = 0o666 & ~_umask()
    for path in paths:
        path.chmod(usual)


def _old_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def sync_tree(folder: Path) -> None:
    """Bring to the disk what other libraries wrote below a folder, and the names of it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            # Windows syncs only what is open for writing; elsewhere that would refuse read-only files.
            with Path(parent, name).open("r+b" if sys.platform == "win32" else "rb") as file:
                _sync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; Windows cannot open a folder, and journals names by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # There, fsync stops at the drive's cache. Not every file system of others takes the stronger call.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def write_checksums(folder: Path) -> None:
    """Finish a folder and record the sha256 of its files in it: the last step of writing it."""
    _finish(folder)
    own = (folder / CHECKSUMS, temporary_path(folder / CHECKSUMS))
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in own]
    checksums = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    write_durably(folder / CHECKSUMS, (json.dumps(checksums, indent=2, sort_keys=True) + "\n").encode())


def verify_checksums(folder: Path) -> None:
    """Check the files that `write_checksums` recorded; ValueError names the first that differs."""
    path = folder / CHECKSUMS
    try:
        recorded = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} holds no object")
    for name, digest in recorded.items():
        # Files that others put beside them are none of our business.
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} does not have the sha256 that {CHECKSUMS} records")


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path:
    """Return the folder of a cache of this package: below `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmcr_hf" / name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it is missing.

    The lock ends with the process, however that ends; the empty file `.lock` stays. Raises ValueError, at once, if
    another process holds it, and `WriteError` if the folder cannot be written.
    """
    path = folder / LOCK
    with named_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            _lock(file)
        # Windows says that access is denied.
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another run is using {folder}. Wait for its end, or use another output folder."
            ) from error
        except OSError as error:
            raise ValueError(
                f"Cannot lock {path}: {error.strerror}. Use an output folder on another file system."
            ) from error
        yield


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
