"""What the files of an embedding store say of it: a receipt of each shard, and in the end the manifest of all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SOURCE_FIELDS = ("id", "revision", "config_hash")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHA256 = re.compile(r"[0-9a-f]{64}")
RECEIPT = re.compile(r"shard-\d{5,}(-\d{5,})?\.json")
# A shard's place in its store: its number among all, or that of its file and its own in that file.
Number = tuple[int, ...]


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
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected an integer above 0.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        if (
            not isinstance(self.source, dict)
            or sorted(self.source) != sorted(SOURCE_FIELDS)
            or not all(isinstance(value, str) for value in self.source.values())
        ):
            raise ValueError(f"source is {self.source!r}, expected the strings {', '.join(SOURCE_FIELDS)}.")

    @property
    def digest(self) -> str:
        """Identify the description by its sha256 in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


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


@dataclass(frozen=True)
class Receipt:
    """Vouch for one shard that is durably written, while its store is not complete.

    Args:
        last: whether its file of the data has no items behind it.
        rejects: the items that were passed over, as `key` and `reason`.
    """

    number: Number
    rows: int
    sha256: str
    keys_sha256: str
    last: bool = True
    rejects: Sequence[dict[str, str]] = ()

    @property
    def shard(self) -> Shard:
        """What the manifest says of the shard."""
        file, keys_file, _ = shard_names(self.number)
        return Shard(file, keys_file, self.rows, self.sha256, self.keys_sha256, len(self.rejects))

    def dump(self, store: str) -> bytes:
        """Return the content of its file, for the store whose description has this digest."""
        document = {**asdict(self), "rejects": list(self.rejects), "store": store}
        return (json.dumps(document, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes, number: Number, store: str) -> Receipt | None:
        """Read the content of its file; None where that is damaged, or another store's."""
        try:
            document = json.loads(content)
            if document.pop("store") != store or tuple(document.pop("number")) != number:
                return None
            receipt = cls(number, **document)
            rejects = [{"key": str(reject["key"]), "reason": str(reject["reason"])} for reject in receipt.rejects]
            whole = [receipt.rows, len(rejects)]
            known = all(SHA256.fullmatch(digest) for digest in (receipt.sha256, receipt.keys_sha256))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return receipt if known and all(type(count) is int and count >= 0 for count in whole) else None


def shard_names(number: Number) -> tuple[str, str, str]:
    """Return the names of a shard's embeddings, keys and receipt."""
    stem = "shard-" + "-".join(f"{part:05d}" for part in number)
    return f"{stem}.safetensors", f"{stem}.keys.parquet", f"{stem}.json"


def shard_number(name: str) -> Number:
    """Return the number that is in the name of a shard's file."""
    return tuple(int(part) for part in name.split(".")[0].split("-")[1:])


def receipt_numbers(names: Iterable[str]) -> list[Number]:
    """Return the numbers of the receipts among the names of files, in order."""
    return sorted(shard_number(name) for name in names if RECEIPT.fullmatch(name))


def dump_manifest(description: Description, shards: Sequence[Shard], complete: bool) -> bytes:
    """Return the content of a manifest."""
    manifest = {
        "format_version": FORMAT_VERSION,
        **asdict(description),
        "complete": complete,
        "rows": sum(shard.rows for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def parse_manifest(content: bytes, folder: str) -> tuple[Description, list[Shard], bool]:
    """Read the content of the manifest of a folder; ValueError where it is damaged or of another version."""
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = json.loads(content)
        if manifest["format_version"] == FORMAT_VERSION:
            return _parse(manifest)
    except KeyError as error:
        raise ValueError(f"{path} is damaged (no {error}): delete {folder} and run again what made it.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder} and run again what made it.") from error
    raise ValueError(
        f"{path} has format_version {manifest['format_version']!r}, expected {FORMAT_VERSION}: "
        f"read it with the version of cmcr-hf that wrote it, or delete {folder} and run again what made it."
    )


def _parse(manifest: dict[str, Any]) -> tuple[Description, list[Shard], bool]:
    description = Description(**{field.name: manifest[field.name] for field in fields(Description)})
    shards = [Shard(**{field.name: shard[field.name] for field in fields(Shard)}) for shard in manifest["shards"]]
    complete = manifest["complete"]
    if not isinstance(complete, bool):
        raise ValueError(f"complete is {complete!r}, expected true or false")
    before: Number = ()
    for shard in shards:
        # Names are compared, never trusted: a manifest cannot point outside its folder.
        stem = str(shard.file).removesuffix(".safetensors")
        number = shard_number(stem) if RECEIPT.fullmatch(f"{stem}.json") else ()
        if not number > before or (shard.file, shard.keys_file) != shard_names(number)[:2]:
            raise ValueError(f"a shard names {shard.file!r} and {shard.keys_file!r}")
        before = number
        # They name the copies of what lies elsewhere.
        if not all(
            isinstance(digest, str) and SHA256.fullmatch(digest) for digest in (shard.sha256, shard.keys_sha256)
        ):
            raise ValueError(f"{shard.file} has the sha256 {shard.sha256!r} and {shard.keys_sha256!r}")
        counts = (shard.rows, shard.skipped)
        whole = all(is_count(count) or (type(count) is int and count == 0) for count in counts)
        if not whole or sum(counts) > description.shard_rows:
            raise ValueError(f"{shard.file} has {shard.rows!r} rows and {shard.skipped!r} skipped items")
    if manifest["rows"] != sum(shard.rows for shard in shards) or complete != bool(manifest["rows"]):
        raise ValueError(f"rows is {manifest['rows']!r}, which the shards contradict")
    return description, shards, complete


def is_count(value: object) -> bool:
    """Return whether a value is an integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
