"""Embeddings of one space and modality on disk: written shard by shard, resumable, memory-mapped to read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..durable import LOCK, locked, named_write_errors, sha256, write_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SOURCE_FIELDS = ("id", "revision", "config_hash")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# About four times the rounding of one element in the half types: a vector may be normalised in them and then rounded.
NORM_TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}
TEMPORARY = re.compile(r"\.(manifest\.json|shard-\d+\.(safetensors|keys\.parquet))\.tmp")


@dataclass(frozen=True)
class Description:
    """State what a store holds and how it is cut; two runs may share a folder only if all of it is equal."""

    space: str
    modality: str
    source: dict[str, str]
    dim: int
    dtype: str
    shard_rows: int
    data_fingerprint: str

    def __post_init__(self) -> None:
        for name in ("space", "modality", "data_fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {value!r}, expected a non-empty string.")
        for name in ("dim", "shard_rows"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected an integer above 0.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        if (
            not isinstance(self.source, dict)
            or sorted(self.source) != sorted(SOURCE_FIELDS)
            or not all(isinstance(value, str) for value in self.source.values())
        ):
            raise ValueError(f"source is {self.source!r}, expected the strings {', '.join(SOURCE_FIELDS)}.")


@dataclass(frozen=True)
class Shard:
    """Name the two files of one shard, with their row count and their sha256 in hexadecimal.

    `skipped` counts the items that were passed over between its rows.
    """

    file: str
    keys_file: str
    rows: int
    sha256: str
    keys_sha256: str
    skipped: int = 0


class EmbeddingStore:
    """Keep unit-norm embeddings of shape (rows, dim) and their row keys in a folder, in the order of `append`.

    The folder holds `manifest.json`, `shard-00000.safetensors` (tensor `embeds`), `shard-00000.keys.parquet` (string
    column `key`), and so on. A shard is durable before the manifest names it, so a run killed at any instant goes on
    at row `rows` and ends with the bytes of an uninterrupted run (parquet files name the pyarrow version that wrote
    them: resume with the same one). One process at a time may write: a second one gets a ValueError at its next shard.
    What is read is checked: the first time that an object hands out a shard or its keys, their sha256 is compared.

    Example:
        source = {"id": "openai/clip-vit-base-patch32", "revision": commit, "config_hash": config_sha256}
        store = EmbeddingStore.create(
            folder, space="clip", modality="text", source=source, dim=512, data_fingerprint=texts_sha256
        )
        for start in range(store.rows, len(texts), 256):
            store.append(embed(texts[start : start + 256]), names[start : start + 256])
        store.finish()
        embeds = EmbeddingStore.open(folder).tensor()
    """

    def __init__(self, folder: Path, description: Description, shards: Sequence[Shard], complete: bool) -> None:
        """Wrap what a manifest says; use `create` or `open`."""
        self.folder = folder
        self.space = description.space
        self.modality = description.modality
        self.source = description.source
        self.dim = description.dim
        self.dtype = description.dtype
        self.shard_rows = description.shard_rows
        self.data_fingerprint = description.data_fingerprint
        self.complete = complete
        self._description = description
        self._shards = list(shards)
        self._pending: list[torch.Tensor] = []
        self._pending_keys: list[str] = []
        self._pending_skipped = 0
        self._verified: set[str] = set()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        space: str,
        modality: str,
        source: dict[str, str],
        dim: int,
        data_fingerprint: str,
        dtype: str = "float32",
        shard_rows: int = 65536,
    ) -> EmbeddingStore:
        """Create a store to append to, or re-open the one of the same description, complete or not, at row `rows`.

        A store of another description without a single shard is replaced. The shards that an incomplete one goes on
        from are verified. Raises ValueError, and touches nothing, if the folder holds one with shards or other files,
        or if another process writes there; OSError if the disk is full or not writable.

        Args:
            source: `id`, `revision` and `config_hash` of the encoder, as strings.
            data_fingerprint: identifies the rows, their order and their preprocessing.
            shard_rows: rows of every shard but the last; up to this many rows wait in memory and are lost by a kill.
        """
        folder = Path(folder)
        _import_parquet()  # A missing package is reported before the first embedding is computed, not a shard later.
        description = Description(space, modality, dict(source), dim, dtype, shard_rows, data_fingerprint)
        store = cls._found(folder, description)
        if store is not None and store.complete:
            return store
        with named_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            # Again: another process may have written since.
            store = cls._found(folder, description)
            _remove_temporary_files(folder)
            if store is None:
                store = cls(folder, description, [], complete=False)
                store._write_manifest([], complete=False)
        store.verify()
        return store

    @classmethod
    def _found(cls, folder: Path, description: Description) -> EmbeddingStore | None:
        """Return the store of a description that is there, None where one may be written; ValueError for another."""
        if (folder / MANIFEST).exists():
            found, shards, complete = _read_manifest(folder)
            if found == description:
                store = cls(folder, description, shards, complete)
                store._check_files()
                return store
            if shards:
                raise ValueError(
                    f"{folder} holds other embeddings: {_difference(found, description)}. Use another folder or "
                    "delete this one."
                )
        elif folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, expected a folder: use another path.")
        elif folder.exists() and any(
            path.name != LOCK and not TEMPORARY.fullmatch(path.name) for path in folder.iterdir()
        ):
            raise ValueError(f"{folder} is not empty and has no {MANIFEST}: use another folder or empty this one.")
        return None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> EmbeddingStore:
        """Open a complete store to read.

        Checks that every file is there and that dtype and shape agree with the manifest; contents are checked when
        they are read.
        Raises ValueError if the folder is missing, holds no store, or holds a damaged or incomplete one.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} has no {MANIFEST}, expected a folder of embeddings: run embed first.")
        store = cls(folder, *_read_manifest(folder))
        if not store.complete:
            raise ValueError(f"{folder} is incomplete, it holds {store.rows} rows so far: run embed again to go on.")
        store._check_files()
        return store

    @property
    def rows(self) -> int:
        """Count the rows that are durably written."""
        return sum(shard.rows for shard in self._shards)

    @property
    def position(self) -> int:
        """Count the items behind the written shards, those that were skipped included: where a resumed run goes on."""
        return self.rows + sum(shard.skipped for shard in self._shards)

    @property
    def digest(self) -> str:
        """Identify the written content by the sha256, in hexadecimal, of the manifest's list of shards."""
        shards = json.dumps([asdict(shard) for shard in self._shards], sort_keys=True)
        return hashlib.sha256(shards.encode()).hexdigest()

    def append(self, embeds: torch.Tensor, keys: Sequence[str]) -> None:
        """Add rows, writing a shard whenever `shard_rows` of them wait.

        Nothing is added if the arguments are wrong. If writing a shard fails, its rows wait for the next `append`.

        Args:
            embeds: (n, dim), finite, of norm 1 within 1e-4 (float32), 2e-3 (float16) or 2e-2 (bfloat16) once rounded
                to the dtype of the store.
            keys: n strings such as file names, not necessarily unique.
        """
        if self.complete:
            raise ValueError(f"{self.folder} is complete with {self.rows} rows: use another folder to add more.")
        if embeds.ndim != 2 or embeds.shape[1] != self.dim:
            raise ValueError(f"embeds have shape {tuple(embeds.shape)}, expected (n, {self.dim}) for {self.folder}.")
        if len(keys) != len(embeds):
            raise ValueError(f"Got {len(keys)} keys for {len(embeds)} embeddings: pass one key a row.")
        for key in keys:
            _check_key(key)
        rows = embeds.detach().to("cpu", DTYPES[self.dtype], copy=True)
        deviations = (torch.linalg.vector_norm(rows.float(), dim=1) - 1).abs()
        # A comparison with NaN is false: this refuses NaN and infinity too.
        wrong = (~(deviations <= NORM_TOLERANCES[self.dtype])).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            norm = torch.linalg.vector_norm(embeds[row].detach().double()).item()
            raise ValueError(
                f"{len(wrong)} of {len(embeds)} embeddings are not finite unit vectors in {self.dtype}, the first is "
                f"row {row} of norm {norm:.6g} (key {keys[row]!r}): L2-normalise in float32 before appending."
            )
        self._pending.append(rows)
        self._pending_keys.extend(keys)
        self._write_full_shards()

    def skip(self) -> None:
        """Count an item that has no row, in its place among those appended; the shard that it falls in is shorter."""
        if self.complete:
            raise ValueError(f"{self.folder} is complete with {self.rows} rows: use another folder to add more.")
        self._pending_skipped += 1
        self._write_full_shards()

    def finish(self) -> None:
        """Write the waiting rows as the last, shorter shard and mark the store complete, unless it is already."""
        if self.complete:
            return
        self._write_full_shards()
        if not self.rows and not self._pending_keys:
            raise ValueError(f"{self.folder} holds no rows, expected at least one: append some before finishing.")
        if self._pending_keys or self._pending_skipped:
            self._write_shard(self._pending_rows(), self._pending_keys, complete=True)
            self._pending, self._pending_keys = [], []
        else:
            with self._writing():
                self._write_manifest(self._shards, complete=True)

    def tensor(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return all written rows, (rows, dim), in the stored dtype.

        On the CPU one shard is memory-mapped without a copy, copy-on-write; several shards are copied together.
        """
        if len(self._shards) == 1:
            return next(self.shards()).to(device)
        embeds = torch.empty(self.rows, self.dim, dtype=DTYPES[self.dtype], device=device)
        start = 0
        for shard in self.shards():
            embeds[start : start + len(shard)] = shard
            start += len(shard)
        return embeds

    def shards(self) -> Iterator[torch.Tensor]:
        """Yield the written rows shard by shard, (n, dim), memory-mapped (copy-on-write), in the stored dtype."""
        for shard in self._shards:
            self._verify(shard.file, shard.sha256)
            yield self._load_shard(shard)

    def keys(self) -> list[str]:
        """Return the key of every written row."""
        _, pq = _import_parquet()
        keys: list[str] = []
        for shard in self._shards:
            self._verify(shard.keys_file, shard.keys_sha256)
            keys += pq.ParquetFile(self.folder / shard.keys_file).read()["key"].to_pylist()
        return keys

    def verify(self) -> None:
        """Read every file anew and raise ValueError naming the first whose sha256 is wrong."""
        self._verified.clear()
        for shard in self._shards:
            self._verify(shard.file, shard.sha256)
            self._verify(shard.keys_file, shard.keys_sha256)

    def _verify(self, name: str, digest: str) -> None:
        if name in self._verified:
            return
        try:
            found = sha256(self.folder / name)
        except OSError as error:
            raise self._damaged(name, f"cannot be read ({error})") from error
        if found != digest:
            raise self._damaged(name, "does not have the sha256 of the manifest")
        self._verified.add(name)

    def _write_full_shards(self) -> None:
        if len(self._pending_keys) + self._pending_skipped < self.shard_rows:
            return
        rows = self._pending_rows()
        while len(self._pending_keys) + self._pending_skipped >= self.shard_rows:
            number = self.shard_rows - self._pending_skipped
            self._write_shard(rows[:number], self._pending_keys[:number], complete=False)
            rows = rows[number:]
            self._pending = [rows]
            self._pending_keys = self._pending_keys[number:]
        # A view would keep the rows that are written in memory.
        self._pending = [rows.clone()]

    def _pending_rows(self) -> torch.Tensor:
        return torch.cat([torch.empty(0, self.dim, dtype=DTYPES[self.dtype]), *self._pending])

    def _write_shard(self, rows: torch.Tensor, keys: list[str], complete: bool) -> None:
        file, keys_file = _shard_names(len(self._shards))
        contents = safetensors.torch.save({"embeds": rows}), _keys_to_parquet(keys)
        digest, keys_digest = (hashlib.sha256(data).hexdigest() for data in contents)
        with self._writing():
            for name, data in zip((file, keys_file), contents, strict=True):
                write_durably(self.folder / name, data)
            shard = Shard(file, keys_file, len(keys), digest, keys_digest, self._pending_skipped)
            self._write_manifest([*self._shards, shard], complete)
        self._pending_skipped = 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other processes out while a shard is written, and refuse to write over what one of them has written."""
        with locked(self.folder):
            try:
                found = _read_manifest(self.folder)
            except FileNotFoundError:
                found = None
            if found != (self._description, self._shards, self.complete):
                raise ValueError(
                    f"{self.folder} was changed by another process since this one opened it. Let one process at a "
                    "time write, and run again to go on behind its last shard."
                )
            yield

    def _write_manifest(self, shards: list[Shard], complete: bool) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            **asdict(self._description),
            "complete": complete,
            "rows": sum(shard.rows for shard in shards),
            "shards": [asdict(shard) for shard in shards],
        }
        write_durably(self.folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
        self._shards = list(shards)
        self.complete = complete

    def _check_files(self) -> None:
        for shard in self._shards:
            self._load_shard(shard)
            if not (self.folder / shard.keys_file).is_file():
                raise self._damaged(shard.keys_file, "is missing")

    def _load_shard(self, shard: Shard) -> torch.Tensor:
        expected = (SAFETENSORS_NAMES[self.dtype], [shard.rows, self.dim])
        try:
            with safe_open(self.folder / shard.file, framework="pt") as file:
                header = file.get_slice("embeds")
                found = (header.get_dtype(), header.get_shape())
                if found != expected:
                    raise self._damaged(shard.file, "holds {} {}, expected {} {}".format(*found, *expected))
                embeds: torch.Tensor = file.get_tensor("embeds")
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard.file, f"cannot be read ({error})") from error
        return embeds

    def _damaged(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.folder / name} {reason}: delete {self.folder} and run embed again.")


def _difference(there: Description, here: Description) -> str:
    differing = {
        field.name: f"{_short(getattr(there, field.name))} there and {_short(getattr(here, field.name))} here"
        for field in fields(Description)
        if getattr(there, field.name) != getattr(here, field.name)
    }
    if list(differing) == ["data_fingerprint"]:
        # A store that is computed from others has their digests and its settings in its fingerprint.
        return f"the items have changed since (or what made them; data_fingerprint {differing['data_fingerprint']})"
    return "; ".join(f"{name} is {values}" for name, values in differing.items())


def _short(value: object) -> str:
    """Return the repr of a value with its hashes cut to twelve digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1", repr(value))


def _read_manifest(folder: Path) -> tuple[Description, list[Shard], bool]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format_version"] == FORMAT_VERSION:
            return _parse_manifest(manifest)
    except KeyError as error:
        raise ValueError(f"{path} is damaged (no {error}): delete {folder} and run embed again.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder} and run embed again.") from error
    raise ValueError(
        f"{path} has format_version {manifest['format_version']!r}, expected {FORMAT_VERSION}: "
        f"read it with the version of cmcr-hf that wrote it, or delete {folder} and run embed again."
    )


def _parse_manifest(manifest: dict[str, Any]) -> tuple[Description, list[Shard], bool]:
    description = Description(**{field.name: manifest[field.name] for field in fields(Description)})
    shards = [Shard(**{field.name: shard[field.name] for field in fields(Shard)}) for shard in manifest["shards"]]
    complete = manifest["complete"]
    if not isinstance(complete, bool):
        raise ValueError(f"complete is {complete!r}, expected true or false")
    for index, shard in enumerate(shards):
        # Names are compared, never trusted: a manifest cannot point outside its folder.
        if (shard.file, shard.keys_file) != _shard_names(index):
            raise ValueError(f"shard {index} names {shard.file!r} and {shard.keys_file!r}")
        may_be_shorter = complete and index == len(shards) - 1
        counts = (shard.rows, shard.skipped)
        whole = all(_is_count(count) or (type(count) is int and count == 0) for count in counts)
        items = sum(counts) if whole else 0
        if not 0 < items <= description.shard_rows or (items < description.shard_rows and not may_be_shorter):
            raise ValueError(f"shard {index} has {shard.rows!r} rows and {shard.skipped!r} skipped items")
    if manifest["rows"] != sum(shard.rows for shard in shards) or (complete and not shards):
        raise ValueError(f"rows is {manifest['rows']!r}, which the shards contradict")
    return description, shards, complete


def _shard_names(index: int) -> tuple[str, str]:
    return f"shard-{index:05d}.safetensors", f"shard-{index:05d}.keys.parquet"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise ValueError(f"Key {key!r} is a {type(key).__name__}, expected a string.")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Key {key!r} is not valid Unicode ({error.reason}): rename the file or the row.") from error


def _keys_to_parquet(keys: list[str]) -> bytes:
    pa, pq = _import_parquet()
    table = pa.table({"key": pa.array(keys, pa.string())})
    sink = pa.BufferOutputStream()
    # Plain pages: the bytes depend on the keys, not on a compressor's version.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _import_parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Row keys are stored with pyarrow: pip install "cmcr-hf[train]".') from error
    return pyarrow, pyarrow.parquet


def _remove_temporary_files(folder: Path) -> None:
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink()
