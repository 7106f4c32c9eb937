"""Publish an embedding store as a data set of the Hub, with which others connect its space without the raw data."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo

from ..output import CARD
from ..training.manifest import MANIFEST, dump_manifest
from ..training.places import is_address
from ..training.store import REJECTS, EmbeddingStore, keys_to_parquet
from .hub import check_licence, public_name, store_card
from .push import open_target

ABSOLUTE = re.compile(r"[A-Za-z]:[/\\]|[/\\]")
# In a sentence; as far as the last separator, since a folder may have spaces in its name.
FOLDER_IN_TEXT = re.compile(r"(?<![\w:/.\\])(?:file://|[A-Za-z]:)?[/\\](?:[^/\\\n'\"]*[/\\])+")
OURS = re.compile(rf"shard-[\d-]+\.(safetensors|keys\.parquet)|{re.escape(REJECTS)}")


def is_store(folder: str) -> bool:
    """Return whether a folder or address holds a store of embeddings, and not a model."""
    path = Path(folder)
    return is_address(folder) or ((path / MANIFEST).is_file() and not (path / "config.json").exists())


def push_store(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    licence: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Make a data set of the Hub hold a complete store, with a card, in one commit, and return that.

    Every file is compared with its sha256 first. What absolute paths in keys, reasons of rejects and the name of the
    source tell of this machine is cut; nothing else than the store is pushed. Files of others in a data set that holds
    a store stay, and a data set that holds none is left alone.

    Args:
        folder: path or address of the store.
        private, revision, token, message: as for [`push_folder`].
        licence: of the embeddings, one of the Hub's identifiers such as `cc-by-4.0`.

    Raises:
        ValueError: the store is incomplete or damaged, the licence is no identifier, or the data set is another one.
        OSError: the Hub cannot be reached or refuses; says why and what to do.
    """
    check_licence(licence)
    store = EmbeddingStore.open(folder)
    store.verify()
    options = [
        *(["--private"] if private else []),
        *([] if licence is None else ["--licence", licence]),
        *([] if revision is None else ["--revision", revision]),
    ]
    again = f"`{shlex.join(['cmcr', 'push', str(folder), repo_id, *options])}`"
    target = open_target(repo_id, private=private, revision=revision, token=token, again=again, repo_type="dataset")
    if MANIFEST not in target.files and set(target.files) - {".gitattributes"}:
        raise ValueError(
            f"{target.page} holds other files and no store, so nothing was pushed to it. Push to another name."
        )
    content = _content(store)
    content[CARD] = str(store_card(store, repo_id=target.repo_id, licence=licence)).encode()
    return target.commit(content, message or f"Push {store.rows} embeddings", lambda name: bool(OURS.fullmatch(name)))


def _content(store: EmbeddingStore) -> dict[str, Path | bytes]:
    """Return the files of a store by name, without what they tell of this machine."""
    common = _common_folder(key for keys in store.shard_keys() for key in keys)
    content: dict[str, Path | bytes] = {}
    shards = []
    for shard, keys in zip(store.shard_records, store.shard_keys(), strict=True):
        content[shard.file] = store.place.path(shard.file, shard.sha256)
        content[shard.keys_file] = store.place.path(shard.keys_file, shard.keys_sha256)
        if any(ABSOLUTE.match(key) for key in keys):
            data = keys_to_parquet([_public_key(key, common) for key in keys])
            content[shard.keys_file] = data
            shard = replace(shard, keys_sha256=hashlib.sha256(data).hexdigest())
        shards.append(shard)
    if store.place.has(REJECTS):
        rejects = map(json.loads, store.place.read(REJECTS).decode().splitlines())
        public = [
            {"key": _public_key(reject["key"], common), "reason": FOLDER_IN_TEXT.sub("", reject["reason"])}
            for reject in rejects
        ]
        content[REJECTS] = "".join(json.dumps(reject) + "\n" for reject in public).encode()
    source = {**store.source, "id": public_name(store.source["id"])}
    content[MANIFEST] = dump_manifest(replace(store.description, source=source), shards, complete=True)
    return content


def _common_folder(keys: Iterable[str]) -> list[str]:
    """Return the parts of the folder that the absolute ones among the keys have in common."""
    common: list[str] | None = None
    for key in keys:
        if ABSOLUTE.match(key):
            parts = _parts(key)[:-1]
            same = (index for index, pair in enumerate(zip(common or parts, parts, strict=False)) if len({*pair}) > 1)
            common = parts[: next(same, min(len(common or parts), len(parts)))]
    return common or []


def _public_key(key: str, common: list[str]) -> str:
    if not ABSOLUTE.match(key):
        return key
    parts = _parts(key)
    # Of files all over a machine, the folder that each lies in says enough.
    return "/".join(parts[len(common) :] if len(common) > 1 else parts[-2:]).lstrip("/")


def _parts(path: str) -> list[str]:
    return path.replace("\\", "/").split("/")
