"""Where an embedding store lies: a folder of this machine, or an address of any file system that fsspec knows."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from urllib.parse import unquote

from ..durable import LOCK, cache_folder, locked, named_write_errors, sha256, write_durably

HUB_DATASETS = "hf://datasets/"
# Seconds until the temporary file of another machine must be that of a killed process.
LEFTOVER_AGE = 3600
# Name, revision and folder.
HUB_ADDRESS = re.compile(rf"{HUB_DATASETS}([^/@]+/[^/@]+)(?:@([^/]+))?((?:/.*)?)")
TEMPORARY = re.compile(r"\..+\.tmp")


def is_address(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is named by an address of fsspec, such as `s3://BUCKET/FOLDER`."""
    return "://" in os.fspath(folder)


def place(folder: str | os.PathLike[str]) -> LocalPlace | RemotePlace:
    """Return the place that a path or an address names.

    Raises:
        ValueError: no file system of fsspec's has such addresses, or what it needs is not installed.
    """
    name = os.fspath(folder)
    if name.startswith("file:"):
        path = name.removeprefix("file://")
        if not path.startswith("/"):
            raise ValueError(
                f"Expected an address of this machine as file:///FOLDER, got {name!r}. Pass the path alone."
            )
        return LocalPlace(Path(path))
    if is_address(name) and not name.partition("://")[2].strip("/"):
        raise ValueError(
            f"The address {name!r} names no folder. Write it as {name.partition('://')[0]}://BUCKET/FOLDER."
        )
    return RemotePlace(name) if is_address(name) else LocalPlace(Path(name))


class LocalPlace:
    """A folder of this machine, whose files are durable when they appear and are read by memory map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def make(self) -> None:
        """Make the folder where it is missing."""
        with named_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        """Return the names of the files, without lock and temporary files."""
        if not self.folder.exists():
            return set()
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected a folder: use another output folder.")
        found = {entry.name for entry in os.scandir(self.folder)}
        return {name for name in found if name != LOCK and not TEMPORARY.fullmatch(name)}

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError where there is none."""
        return (self.folder / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return what those files hold that are there."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is whole under its name, whoever else writes the same one at the same time."""
        own = self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}.tmp"
        write_durably(self.folder / name, data, own)

    def remove(self, name: str) -> None:
        """Remove a file, if it is still there."""
        (self.folder / name).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what killed writers left; called when nobody has anything to write any more."""
        for entry in os.scandir(self.folder):
            if TEMPORARY.fullmatch(entry.name) and not _is_written(Path(entry)):
                Path(entry).unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out (see [`cmcr_hf.durable.locked`])."""
        return locked(self.folder)

    def sha256(self, name: str, expected: str) -> str:
        """Return the sha256 of a file in hexadecimal."""
        return sha256(self.folder / name)

    def path(self, name: str, digest: str) -> Path:
        """Return the path of a file."""
        return self.folder / name


class RemotePlace:
    """A folder behind an address of fsspec, such as `s3://`, `gs://` or `hf://`.

    Its files are written whole or not at all, as object stores do it. What is read is kept on this machine, in
    `cmcr_hf/stores` of `$XDG_CACHE_HOME` or `~/.cache`, by its sha256, and read from there by memory map: delete that
    folder to be rid of it.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        self._address = address.rstrip("/")
        try:
            self._files, self._base = fsspec.url_to_fs(self._address)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"Cannot open {address}: {error}. Check the address, or install what it needs."
            ) from error

    def __str__(self) -> str:
        return self._address

    def make(self) -> None:
        """Do nothing: an address has no folder without a file."""

    def names(self) -> set[str]:
        """Return the names of the files at the address as it is now."""
        with self._named_errors():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._base, detail=True)
            except FileNotFoundError:
                return set()
        return {entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"}

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name, as of now."""
        with self._named_errors():
            self._files.invalidate_cache()
            return bool(self._files.isfile(f"{self._base}/{name}"))

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError where there is none."""
        with self._named_errors():
            data: bytes = self._files.cat_file(f"{self._base}/{name}")
        return data

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where that is not told; FileNotFoundError where there is none."""
        with self._named_errors():
            size: int | None = self._files.size(f"{self._base}/{name}")
        return size

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return what those files hold that are there, fetched at the same time where the file system can."""
        with self._named_errors():
            found = self._files.cat([f"{self._base}/{name}" for name in names], on_error="omit") if names else {}
        return {path.rsplit("/", 1)[-1]: data for path, data in found.items()}

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with self._named_errors():
            try:
                self._files.pipe_file(f"{self._base}/{name}", data)
            except FileNotFoundError:  # A file system with folders.
                self._files.makedirs(self._base, exist_ok=True)
                self._files.pipe_file(f"{self._base}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is still there."""
        with self._named_errors(), suppress(FileNotFoundError):
            self._files.rm_file(f"{self._base}/{name}")

    def remove_leftovers(self) -> None:
        """Do nothing: a file is there whole or not at all."""

    def locked(self) -> AbstractContextManager[None]:
        """Do nothing: an address has no lock. Whoever writes the same store there writes the same bytes."""
        return nullcontext()

    def sha256(self, name: str, expected: str) -> str:
        """Return the sha256 of a file in hexadecimal; a copy on this machine that has another is fetched anew."""
        copy = self.path(name, expected)
        if sha256(copy) != expected:
            copy.unlink(missing_ok=True)
            copy = self.path(name, expected)
        return sha256(copy)

    def path(self, name: str, digest: str) -> Path:
        """Return the path of a copy on this machine, which is fetched where there is none of this sha256."""
        copy = cache_folder("stores") / digest[:2] / (digest + Path(name).suffix)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
            try:
                with named_write_errors(copy.parent), self._named_errors():
                    self._files.get_file(f"{self._base}/{name}", str(partial))
                # Under the name of another content, it would be taken for that one from then on.
                if sha256(partial) != digest:
                    raise ValueError(f"{self}/{name} does not have the sha256 of the manifest")
                partial.replace(copy)
            finally:
                partial.unlink(missing_ok=True)
        return copy

    def _named_errors(self) -> AbstractContextManager[None]:
        return named_network_errors(self._address)


@contextmanager
def named_network_errors(address: str) -> Iterator[None]:
    """Name an address in what the many clients behind fsspec raise."""
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"Cannot reach {address}: {reason}. Check the address, the access and the network.") from error


def _is_written(temporary: Path) -> bool:
    """Return whether a process that still runs may have a temporary file open, as far as can be told from here."""
    named = re.fullmatch(r".+\.(\d+)\.tmp", temporary.name)
    if named is None or int(named[1]) == os.getpid():
        return False
    if f".{socket.gethostname()}.{named[1]}.tmp" not in temporary.name or sys.platform == "win32":
        with suppress(FileNotFoundError):
            return time.time() - temporary.stat().st_mtime < LEFTOVER_AGE
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class HubPlace(RemotePlace):
    """A folder of a data set of the Hub, to read from.

    What is read stays in the cache of `huggingface_hub`, so that it is fetched once, and there without network.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        found = HUB_ADDRESS.fullmatch(self._address)
        assert found is not None  # `place_to_read` has looked.
        self._repo_id, self._revision, self._folder = found[1], found[2] and unquote(found[2]), found[3].strip("/")

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name, which is fetched then."""
        try:
            self._fetched(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError where there is none."""
        return self._fetched(name).read_bytes()

    def sha256(self, name: str, expected: str) -> str:
        """Return the sha256 of a file in hexadecimal; a copy on this machine that has another is fetched anew."""
        digest = sha256(self._fetched(name))
        return digest if digest == expected else sha256(self._fetched(name, anew=True))

    def path(self, name: str, digest: str) -> Path:
        """Return the path of a copy on this machine."""
        return self._fetched(name)

    def _fetched(self, name: str, *, anew: bool = False) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError

        from ..hub_errors import explanation

        path = f"{self._folder}/{name}" if self._folder else name
        try:
            return Path(
                hf_hub_download(self._repo_id, path, repo_type="dataset", revision=self._revision, force_download=anew)
            )
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{self}/{name} is not on this machine, and the Hub cannot be reached, or is not to be "
                "(HF_HUB_OFFLINE). Read it once with network."
            ) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"there is no {self}/{name}") from error
        except HfHubHTTPError as error:
            raise OSError(explanation(error, f"datasets/{self._repo_id}")) from error
        except (OSError, HTTPError) as error:
            raise OSError(f"Cannot fetch {self}/{name}: {' '.join(str(error).split())}. Try again.") from error


def place_to_read(folder: str | os.PathLike[str]) -> LocalPlace | RemotePlace:
    """Return the place that a path or an address names, to read from; one on the Hub at the commit of now."""
    address = pinned_address(os.fspath(folder))
    return HubPlace(address) if HUB_ADDRESS.fullmatch(address.rstrip("/")) else place(address)


def pinned_address(address: str) -> str:
    """Name the commit in an address of a Hub data set's files; return any other address as it is."""
    found = HUB_ADDRESS.fullmatch(address)
    commit = hub_commit(found[1], found[2]) if found else None
    return f"{HUB_DATASETS}{found[1]}@{commit}{found[3]}" if found and commit else address


def hub_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a revision of a Hub data set, where that can be told."""
    # Not with the module: the import of transformers takes seconds, which a folder's listing can do without.
    from transformers.utils.hub import resolve_revision

    resolved = resolve_revision(name, revision, repo_type="dataset")
    return getattr(resolved, "resolved", resolved)


Place = LocalPlace | RemotePlace
