"""Embeddings of one space and modality on disk: written shard by shard, resumable, memory-mapped to read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .manifest import (
    DTYPES,
    MANIFEST,
    SHA256,
    Description,
    Number,
    Receipt,
    Shard,
    dump_manifest,
    parse_manifest,
    receipt_numbers,
    shard_names,
)
from .places import HubPlace, LocalPlace, Place, RemotePlace, place, place_to_read

REJECTS = "rejects.jsonl"
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# About four times the rounding of one element in the half types: a vector may be normalised in them and then rounded.
NORM_TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}


class EmbeddingStore:
    """Keep unit-norm embeddings of shape (rows, dim) and their row keys in a folder, in a fixed order.

    The folder holds `manifest.json`, `shard-00000.safetensors` (tensor `embeds`), `shard-00000.keys.parquet` (string
    column `key`), and so on; it may be an address of fsspec, such as `s3://BUCKET/FOLDER`. A shard is durable before
    its receipt, `shard-00000.json`, vouches for it, and the manifest of a complete store takes the receipts' place. So
    a run killed at any instant goes on behind what it has receipts of, and ends with the bytes of an uninterrupted run
    (parquet files name the pyarrow version that wrote them: resume with the same one).

    Rows come in order, by `append` and `finish`, from one process at a time: a second one gets a ValueError at its
    next shard. Or whole shards come in any order by `write`, from any number of processes that agree on what is in
    each of them, until `complete_if_whole` finds all of them. What is read is checked: the first time that an object
    hands out a shard or its keys, their sha256 is compared.

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

    def __init__(self, place: Place, description: Description, shards: Sequence[Shard], complete: bool) -> None:
        """Wrap what a manifest says; use `create` or `open`."""
        self.place = place
        self.space = description.space
        self.modality = description.modality
        self.source = description.source
        self.dim = description.dim
        self.dtype = description.dtype
        self.shard_rows = description.shard_rows
        self.data_fingerprint = description.data_fingerprint
        self.complete = complete
        self.found_complete = complete
        self.completed_here = False
        self.description = description
        self._shards = list(shards)
        self._pending: list[torch.Tensor] = []
        self._pending_keys: list[str] = []
        self._verified: set[str] = set()

    @property
    def folder(self) -> Path | str:
        """The path of the folder, or its address."""
        return self.place.folder if isinstance(self.place, LocalPlace) else str(self.place)

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
        share: tuple[int, int] = (0, 1),
    ) -> EmbeddingStore:
        """Create a store to write to, or re-open the one of the same description, complete or not.

        A store of another description without a single row is replaced. Raises ValueError, and touches nothing, if
        the folder holds one with shards or other files, or a damaged shard; OSError if the disk is full or not
        writable.

        Args:
            source: `id`, `revision` and `config_hash` of the encoder, as strings.
            data_fingerprint: identifies the rows, their order and their preprocessing.
            shard_rows: rows of a shard at most; up to this many rows wait in memory and are lost by a kill.
            share: of this process, from 0, and their number: of an incomplete store, it verifies the shards of its
                share, where they lie on this machine.
        """
        _import_parquet()  # A missing package is reported before the first embedding is computed, not a shard later.
        description = Description(space, modality, dict(source), dim, dtype, shard_rows, data_fingerprint)
        there = place(folder)
        store = cls._found(there, description)
        if store is None:
            there.make()
            store = cls(there, description, [], complete=False)
            for number in store.numbers():
                # Of a store without a row.
                for name in shard_names(number):
                    there.remove(name)
            there.remove_leftovers()
            there.write(MANIFEST, dump_manifest(description, [], complete=False))
        elif not store.complete and isinstance(there, LocalPlace):
            there.remove_leftovers()
            store._verify_all(store._shards[share[0] :: share[1]])
        return store

    @classmethod
    def _found(cls, there: Place, description: Description) -> EmbeddingStore | None:
        """Return the store of a description that is there, None where one may be written; ValueError for another."""
        names = there.names()
        if MANIFEST in names:
            found, shards, complete = parse_manifest(there.read(MANIFEST), str(there))
            if found == description:
                store = cls(there, description, shards, complete)
                if complete:
                    store._check_files()
                    if receipt_numbers(names):
                        # Of a run that was killed between its last two steps.
                        store._remove_receipts()
                else:
                    store._shards = [receipt.shard for receipt in store.receipts()]
                return store
            if complete or any(receipt.rows for receipt in cls(there, found, [], complete=False).receipts()):
                raise ValueError(
                    f"{there} holds other embeddings: {_difference(found, description)}. Use another folder, or "
                    "delete this one."
                )
        elif names:
            raise ValueError(f"{there} is not empty and has no {MANIFEST}: use another folder or empty this one.")
        return None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> EmbeddingStore:
        """Open a complete store to read; one on the Hub, `hf://datasets/ORG/NAME`, at the commit of now.

        Checks that every file is there and that dtype and shape agree with the manifest; contents are checked when
        they are read, and so is all of one on the Hub.
        Raises ValueError if the folder is missing, holds no store, or holds a damaged or incomplete one; OSError if
        the Hub cannot be reached or does not show it.
        """
        there = place_to_read(folder)
        try:
            content = there.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"{there} has no {MANIFEST}, expected a folder of embeddings: run embed first."
            ) from error
        store = cls(there, *parse_manifest(content, str(there)))
        if not store.complete:
            rows = sum(receipt.rows for receipt in store.receipts())
            raise ValueError(f"{there} is incomplete, it holds {rows} rows so far: run again what makes it, to go on.")
        store._check_files()
        return store

    @property
    def shard_records(self) -> list[Shard]:
        """What the manifest says of each shard."""
        return list(self._shards)

    @property
    def rows(self) -> int:
        """Count the rows that are durably written."""
        return sum(shard.rows for shard in self._shards)

    @property
    def skipped(self) -> int:
        """Count the items between them that were passed over."""
        return sum(shard.skipped for shard in self._shards)

    @property
    def digest(self) -> str:
        """Identify the written content by the sha256, in hexadecimal, of the manifest's list of shards."""
        shards = json.dumps([asdict(shard) for shard in self._shards], sort_keys=True)
        return hashlib.sha256(shards.encode()).hexdigest()

    def append(self, embeds: torch.Tensor, keys: Sequence[str]) -> None:
        """Add rows behind those that are there, writing a shard whenever `shard_rows` of them wait.

        Nothing is added if the arguments are wrong. If writing a shard fails, its rows wait for the next `append`.

        Args:
            embeds: (n, dim), finite, of norm 1 within 1e-4 (float32), 2e-3 (float16) or 2e-2 (bfloat16) once rounded
                to the dtype of the store.
            keys: n strings such as file names, not necessarily unique.
        """
        if self.complete:
            raise ValueError(f"{self.folder} is complete with {self.rows} rows: use another folder to add more.")
        self._pending.append(self._checked(embeds, keys))
        self._pending_keys.extend(keys)
        self._write_full_shards()

    def finish(self) -> None:
        """Write the waiting rows as the last, shorter shard and mark the store complete, unless it is already."""
        if self.complete:
            return
        self._write_full_shards()
        if self._pending_keys:
            self._write_next(self._pending_rows(), self._pending_keys)
            self._pending, self._pending_keys = [], []
        with self.place.locked():
            if not self.is_complete_by_now():
                self._complete(self.receipts())

    def written(self, number: Number) -> Receipt | None:
        """Return the receipt of a shard, None where it is not written yet."""
        try:
            content = self.place.read(shard_names(number)[2])
        except FileNotFoundError:
            return None
        return Receipt.parse(content, number, self.description.digest)

    def write(
        self,
        number: Number,
        embeds: torch.Tensor,
        keys: Sequence[str],
        *,
        rejects: Sequence[dict[str, str]] = (),
        last: bool = True,
    ) -> Receipt:
        """Write one shard, `(n, dim)` as for `append`, durably, and then its receipt.

        One that is there stays: another process was quicker, whose machine may round otherwise.

        Args:
            number: its place in the store, by its own number, from 0; or, of a part of the data whose end may be
                unknown, by that of the part and its own in the part.
            rejects: `key` and `reason` of the items that were passed over between its rows.
            last: of its part.
        """
        if len(keys) + len(rejects) > self.shard_rows:
            raise ValueError(f"Got {len(keys) + len(rejects)} items, expected at most {self.shard_rows} a shard.")
        rows = self._checked(embeds, keys)
        contents = safetensors.torch.save({"embeds": rows}), keys_to_parquet(keys)
        digest, keys_digest = (hashlib.sha256(data).hexdigest() for data in contents)
        receipt = Receipt(number, len(keys), digest, keys_digest, last, rejects)
        if self.is_complete_by_now() or self.written(number) is not None:
            return receipt
        names = shard_names(number)
        for name, data in zip(names, (*contents, receipt.dump(self.description.digest)), strict=True):
            self.place.write(name, data)
        return receipt

    def complete_if_whole(self, parts: int, *, alone: bool = False) -> bool:
        """Mark the store complete if all shards of so many parts are there; return whether it is, by whomever.

        Args:
            alone: whether all of them should be there, since no other process writes any.

        Raises:
            ValueError: all is there, and has no row; or not all is, and this process is alone.
        """
        of_part: dict[int, list[Receipt]] = {part: [] for part in range(parts)}
        for receipt in self.receipts():
            of_part.get(receipt.number[0], []).append(receipt)
        whole = all(found and found[-1].last and _without_gaps(found) for found in of_part.values())
        if self.is_complete_by_now():
            # What was written behind the end of it, which was there already.
            self._remove_receipts()
        elif whole:
            self._complete([receipt for found in of_part.values() for receipt in found])
        elif alone:
            raise ValueError(f"Shards of {self.folder} were removed while it was written. Run again to go on.")
        return self.complete

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

    def read(self, rows: range) -> torch.Tensor:
        """Return some neighbouring rows, (n, dim), in the stored dtype, from those shards alone that they lie in."""
        parts, first = [torch.empty(0, self.dim, dtype=DTYPES[self.dtype])], 0
        for shard in self._shards:
            start, stop = max(rows.start - first, 0), min(rows.stop - first, shard.rows)
            if start < stop:
                self._verify(shard.file, shard.sha256)
                parts.append(self._load_shard(shard)[start:stop])
            first += shard.rows
        return torch.cat(parts)

    def keys(self) -> list[str]:
        """Return the key of every written row."""
        return list(itertools.chain.from_iterable(self.shard_keys()))

    def shard_keys(self) -> Iterator[list[str]]:
        """Yield the keys of the written rows shard by shard."""
        _, pq = _import_parquet()
        for shard in self._shards:
            self._verify(shard.keys_file, shard.keys_sha256)
            path = self.place.path(shard.keys_file, shard.keys_sha256)
            yield pq.ParquetFile(path).read()["key"].to_pylist()

    def verify(self) -> None:
        """Read every file anew and raise ValueError naming the first whose sha256 is wrong."""
        self._verified.clear()
        self._verify_all(self._shards)

    def _verify_all(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            self._verify(shard.file, shard.sha256)
            self._verify(shard.keys_file, shard.keys_sha256)

    def _verify(self, name: str, digest: str) -> None:
        if name in self._verified:
            return
        try:
            found = self.place.sha256(name, digest)
        except OSError as error:
            if isinstance(self.place, RemotePlace) and not isinstance(error, FileNotFoundError):
                raise  # Of the network, which does no damage.
            raise self._damaged(name, f"cannot be read ({error})") from error
        if found != digest:
            raise self._damaged(name, "does not have the sha256 of the manifest")
        self._verified.add(name)

    def _checked(self, embeds: torch.Tensor, keys: Sequence[str]) -> torch.Tensor:
        """Return a copy of rows in the dtype of the store; ValueError where rows or keys are not what they should."""
        if embeds.ndim != 2 or embeds.shape[1] != self.dim:
            raise ValueError(f"embeds have shape {tuple(embeds.shape)}, expected (n, {self.dim}) for {self.folder}.")
        if len(keys) != len(embeds):
            raise ValueError(f"Got {len(keys)} keys for {len(embeds)} embeddings: pass one key a row.")
        check_keys(keys)
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
        return rows

    def _write_full_shards(self) -> None:
        if len(self._pending_keys) < self.shard_rows:
            return
        rows = self._pending_rows()
        while len(self._pending_keys) >= self.shard_rows:
            self._write_next(rows[: self.shard_rows], self._pending_keys[: self.shard_rows])
            rows = rows[self.shard_rows :]
            self._pending = [rows]
            self._pending_keys = self._pending_keys[self.shard_rows :]
        # A view would keep the rows that are written in memory.
        self._pending = [rows.clone()]

    def _pending_rows(self) -> torch.Tensor:
        return torch.cat([torch.empty(0, self.dim, dtype=DTYPES[self.dtype]), *self._pending])

    def _write_next(self, rows: torch.Tensor, keys: list[str]) -> None:
        """Write the next shard in order, and refuse to where another process has, or keeps others out."""
        number = (len(self._shards),)
        with self.place.locked():
            if self.is_complete_by_now() or self.place.has(shard_names(number)[2]):
                raise self._taken()
            self._shards.append(self.write(number, rows, keys).shard)

    def numbers(self) -> list[Number]:
        """Return the numbers of the shards that an incomplete store has, by whomever, in order."""
        return receipt_numbers(self.place.names())

    def receipts(self) -> list[Receipt]:
        """Read the receipts that are there, in order."""
        numbers = self.numbers()
        contents = self.place.read_all([shard_names(number)[2] for number in numbers])
        parsed = (
            Receipt.parse(contents[name], number, self.description.digest)
            for number in numbers
            if (name := shard_names(number)[2]) in contents
        )
        return [receipt for receipt in parsed if receipt is not None]

    def is_complete_by_now(self) -> bool:
        """Look at the manifest again, which another process may have completed.

        Raises ValueError where another run has taken the folder since.
        """
        try:
            found, shards, complete = parse_manifest(self.place.read(MANIFEST), str(self.place))
        except FileNotFoundError as error:
            raise self._taken() from error
        if found != self.description:
            raise self._taken()
        if complete:
            self._shards, self.complete = shards, True
        return self.complete

    def _taken(self) -> ValueError:
        return ValueError(
            f"{self.folder} was changed by another process since this one opened it. Let one run at a time write "
            "there, and run again to go on behind what it has."
        )

    def _complete(self, found: Sequence[Receipt]) -> None:
        """Write the manifest of all shards in place of their receipts."""
        shards = [receipt.shard for receipt in found]
        rejects = [reject for receipt in found for reject in receipt.rejects]
        if not any(shard.rows for shard in shards):
            why = f": {rejects[0]['reason']} (item {rejects[0]['key']!r})" if rejects else ", none was given."
            raise ValueError(f"{self.folder} holds no rows, of {len(rejects)} items{why}")
        if rejects:
            self.place.write(REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
        self.place.write(MANIFEST, dump_manifest(self.description, shards, complete=True))
        self._shards, self.complete, self.completed_here = shards, True, True
        self._remove_receipts()

    def _remove_receipts(self) -> None:
        """Remove what only an incomplete store needs."""
        for number in self.numbers():
            self.place.remove(shard_names(number)[2])
        self.place.remove_leftovers()

    def _check_files(self) -> None:
        if isinstance(self.place, HubPlace):
            return  # A file is asked for when it is read: what was read before needs no network then.
        names = self.place.names()
        for shard in self._shards:
            for name in (shard.file, shard.keys_file):
                if name not in names:
                    raise self._damaged(name, "is missing")
            # One behind an address is fetched when it is read, and checked then.
            if isinstance(self.place, LocalPlace):
                self._load_shard(shard)

    def _load_shard(self, shard: Shard) -> torch.Tensor:
        expected = (SAFETENSORS_NAMES[self.dtype], [shard.rows, self.dim])
        try:
            with safe_open(self.place.path(shard.file, shard.sha256), framework="pt") as file:
                header = file.get_slice("embeds")
                found = (header.get_dtype(), header.get_shape())
                if found != expected:
                    raise self._damaged(shard.file, "holds {} {}, expected {} {}".format(*found, *expected))
                embeds: torch.Tensor = file.get_tensor("embeds")
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard.file, f"cannot be read ({error})") from error
        return embeds

    def _damaged(self, name: str, reason: str) -> ValueError:
        remedy = f"delete {self.folder} and run again what made it"
        if isinstance(self.place, HubPlace):
            remedy = "name another revision of it, or let its owner push it again"
        return ValueError(f"{self.folder}/{name} {reason}: {remedy}.")


def check_same_keys(here: tuple[str, list[str]], there: tuple[str, list[str]]) -> None:
    """Check that two lists of keys, each with the name of what has them, are equal."""
    (name, keys), (other, others) = here, there
    remedy = "Embed the same items in the same order for both."
    for row, (key, found) in enumerate(zip(keys, others, strict=False)):
        if key != found:
            raise ValueError(f"Row {row} of {name} is {key!r}, and of {other} {found!r}. {remedy}")
    if len(keys) != len(others):
        raise ValueError(f"{name} has {len(keys)} rows, and {other} {len(others)}. {remedy}")


def check_made_by(store: EmbeddingStore, name: str, record: dict[str, str], dim: int, remedy: str) -> None:
    """Check that a store was made by a source, as far as their records can be compared.

    Args:
        name: of the source.
        record: of the source, such as [`source_record`] returns.
        dim: of the source.
        remedy: the sentence that ends the ValueError.
    """
    if store.dim != dim:
        differing = f"{store.dim} dimensions, and the source {dim}"
    elif differing_fields := _differing(store.source, record):
        differing = f"the {' and the '.join(differing_fields)}"
    else:
        return
    raise ValueError(
        f"The store {store.folder} was not made by the {store.space} source {name!r}: it has {differing}. {remedy}"
    )


def _differing(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """Return what tells the record of a source in a store from another one, as a sentence has it."""
    found = []
    folders = [bool(SHA256.fullmatch(record["revision"])) for record in (there, here)]
    names = [record["id"] for record in (there, here)]
    if any(folders):
        # A folder is known by what it holds; its name may be that of the model whose copy it is.
        names = [Path(name).name for name in names]
    if names[0] != names[1] and not all(folders):
        found.append(f"id {names[0]!r} and not {names[1]!r}")
    revisions = [record["revision"] for record in (there, here)]
    if folders[0] == folders[1] and "main" not in revisions:
        # It tells the weights. A configuration tells less, and changes with the dtype and the version of its library.
        if revisions[0] != revisions[1]:
            found.append(f"revision {revisions[0][:12]} and not {revisions[1][:12]}")
    elif there["config_hash"] != here["config_hash"]:
        found.append(f"config_hash {there['config_hash'][:12]} and not {here['config_hash'][:12]}")
    return found


def _without_gaps(found: Sequence[Receipt]) -> bool:
    """Return whether the receipts of a part, in order, are those of its only shard, or of all up to the last."""
    return [receipt.number[1:] for receipt in found] in ([()], [(index,) for index in range(len(found))])


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


def check_keys(keys: Iterable[object]) -> None:
    """Check that keys are strings that can be written as UTF-8; ValueError names the first that is none."""
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"Key {key!r} is a {type(key).__name__}, expected a string.")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Key {key!r} is not valid Unicode ({error.reason}): rename the file or the row."
            ) from error


def keys_to_parquet(keys: Sequence[str]) -> bytes:
    """Return the content of a file of keys."""
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
