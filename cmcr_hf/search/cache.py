"""Caches on disk that any number of processes may share, and a kill at any instant leaves whole: digests, vectors."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..durable import named_write_errors, sha256, write_durably

SHARD_ROWS = 65_536
# With more files that are not full, merging them is worth its time.
MAX_SMALL_SHARDS = 8
# Seconds until a temporary file must be that of a killed process.
LEFTOVER_AGE = 3600
SHA256_BYTES = 32
# A merge by another process may remove a file between listing and reading; twice in a row is rare.
READ_ATTEMPTS = 10

T = TypeVar("T")


class VectorCache:
    """Vectors by key, `(dim,)` float32 each, in immutable files that are mapped into memory.

    A file holds the tensors `embeds` (rows, dim) float32 and `keys` (rows, 32) uint8. It appears under its name when
    it is complete, and nothing else tells what there is, so nothing can contradict it: two processes that add the same
    vector cost its space twice. A damaged file is removed, with a warning.

    Args:
        folder: need not exist before the first vector.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._load()
        for path in folder.glob("*.safetensors.*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                    path.unlink()

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def row(self, key: bytes) -> int:
        """Return the place of a key's score in [`scores`]; `merge` moves it."""
        return self._row_of[key]

    def vector(self, key: bytes) -> np.ndarray:
        """Return a copy of the vector of a key."""
        row = self._row_of[key]
        for embeds in self._shards.values():
            if row < len(embeds):
                return np.array(embeds[row])
            row -= len(embeds)
        raise KeyError(key)

    def scores(self, vector: np.ndarray) -> np.ndarray:
        """Return the inner products of all vectors with one, `(rows,)` float32."""
        return np.concatenate([embeds @ vector for embeds in self._shards.values()])

    def add(self, vectors: Sequence[tuple[bytes, np.ndarray]]) -> None:
        """Write vectors durably, as a file of their own.

        Args:
            vectors: keys of 32 bytes, each with its vector; all vectors of a cache have one width.
        """
        if vectors:
            self._open(self._write([key for key, _ in vectors], np.stack([vector for _, vector in vectors])))

    def merge(self, wanted: set[bytes] | None = None) -> None:
        """Rewrite small files as few large ones where there are many, and all where most vectors are not wanted.

        Args:
            wanted: keys to keep, all where it is `None`.
        """
        total = sum(map(len, self._shards.values()))
        small = [path for path, embeds in self._shards.items() if len(embeds) < SHARD_ROWS]
        kept = self._row_of.keys() if wanted is None else self._row_of.keys() & wanted
        mostly_dead = total > 2 * len(kept)
        if len(small) <= MAX_SMALL_SHARDS and not mostly_dead:
            return
        old = list(self._shards) if mostly_dead else small
        is_old = np.concatenate([np.full(len(embeds), path in old) for path, embeds in self._shards.items()])
        moved = [key for key, row in self._row_of.items() if is_old[row] and key in kept]
        written = [
            self._write(part, np.stack([self.vector(key) for key in part])) for part in batches(moved, SHARD_ROWS)
        ]
        for path in set(old) - set(written):
            path.unlink(missing_ok=True)
        self._load()

    def _load(self) -> None:
        for attempt in range(READ_ATTEMPTS):
            self._shards: dict[Path, np.ndarray] = {}
            self._row_of: dict[bytes, int] = {}
            try:
                for path in sorted(self._folder.glob("shard-*.safetensors")):
                    self._open(path)
                return
            except FileNotFoundError:
                if attempt == READ_ATTEMPTS - 1:
                    raise

    def _write(self, keys: Sequence[bytes], embeds: np.ndarray) -> Path:
        from safetensors.numpy import save

        joined = b"".join(keys)
        path = self._folder / f"shard-{hashlib.sha256(joined).hexdigest()[:20]}.safetensors"
        rows = np.frombuffer(joined, np.uint8).reshape(-1, SHA256_BYTES)
        _replace(path, save({"embeds": embeds.astype("<f4"), "keys": rows}))
        return path

    def _open(self, path: Path) -> None:
        try:
            embeds, keys = _map_shard(path)
            widths = {embeds.shape[1], *(other.shape[1] for other in self._shards.values())}
            if len(widths) > 1:
                raise ValueError(f"its vectors are of width {embeds.shape[1]}")
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}): what it held is made anew.", stacklevel=2)
            path.unlink(missing_ok=True)
            return
        start = sum(map(len, self._shards.values()))
        self._shards[path] = embeds
        starts = range(0, len(keys), SHA256_BYTES)
        self._row_of |= {keys[at : at + SHA256_BYTES]: start + row for row, at in enumerate(starts)}


def _map_shard(path: Path) -> tuple[np.ndarray, bytes]:
    """Map the embeddings of a file into memory, and read its keys."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError("it is cut off")
        header = json.loads(file.read(length))
        rows, dim = header["embeds"]["shape"]
        start, end = header["embeds"]["data_offsets"]
        keys_start, keys_end = header["keys"]["data_offsets"]
        found = (header["embeds"]["dtype"], header["keys"]["dtype"], end - start, keys_end - keys_start)
        if found != ("F32", "U8", 4 * rows * dim, SHA256_BYTES * rows) or 8 + length + max(end, keys_end) != size:
            raise ValueError("its size is not the one it declares")
        file.seek(8 + length + keys_start)
        keys = file.read(keys_end - keys_start)
        # safetensors itself would copy them into memory.
        return np.memmap(file, "<f4", "r", 8 + length + start, (rows, dim)), keys


class FileDigests:
    """The sha256 of files, kept in a JSON file with their sizes and times: an unchanged file is not read again.

    Beside it a remark, which holds until the file changes. A damaged JSON file starts anew, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, list[Any]] = {}
        self._seen: set[str] = set()
        self._changed = False
        try:
            document = json.loads(path.read_bytes())
            self._entries = {name: [*entry] for name, entry in document.items() if len(entry) == 5}
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}): the files that it knew are read again.", stacklevel=2)

    def digest(self, name: str, path: Path, status: os.stat_result) -> str:
        """Return the sha256 of a file in hexadecimal.

        Args:
            name: what the file is known by.
            status: its `path.stat()`.
        """
        # Of the times also that of the last change of anything: some programs set the other one back.
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        self._seen.add(name)
        if name not in self._entries or self._entries[name][:3] != state:
            self._entries[name] = [*state, sha256(path), None]
            self._changed = True
        digest: str = self._entries[name][3]
        return digest

    def remark(self, name: str) -> str | None:
        """Return the remark on a file whose digest was asked for, or None."""
        remark: str | None = self._entries[name][4]
        return remark

    def set_remark(self, name: str, remark: str) -> None:
        self._entries[name][4] = remark
        self._changed = True

    def save(self, *, forget: bool = False) -> None:
        """Write what has changed.

        Args:
            forget: leave out the files that were not asked for.
        """
        if forget and len(self._seen) < len(self._entries):
            self._entries = {name: entry for name, entry in self._entries.items() if name in self._seen}
            self._changed = True
        if self._changed:
            _replace(self._path, json.dumps(self._entries).encode())
            self._changed = False


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _replace(path: Path, data: bytes) -> None:
    # First under a name of this writer's own, as there may be several.
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with named_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, data, own)
