"""Embed items with a frozen source model into an `EmbeddingStore`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel

from ..cpu import pool
from ..durable import sha256
from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import CMCRProcessor
from ..modeling.sources_cmcr import normalize, source_features
from ..modeling.towers_cmcr import split_source
from .data import Item, Items, Part, RemoteFile
from .manifest import Number, Receipt
from .store import EmbeddingStore, check_keys

# What an interruption may lose at most, in rows. The same for every batch size, so that a run may go on with another.
SHARD_ROWS = {"text": 8192, "image": 1024, "audio": 1024, "point_cloud": 128}
MAX_WORKERS = 16
# Weights of one file, of shards or of an older format; configurations, tokenizers and their vocabularies.
SOURCE_SUFFIXES = (".safetensors", ".bin", ".json", ".txt")


@dataclass
class _Group:
    """Items that follow each other in one shard, and whether that and its part of the data end with them."""

    number: Number
    items: list[Item]
    is_end: bool
    is_last: bool = True


@dataclass
class _Batch:
    """What became of a group: its readable items, as the source takes them and then embedded, and the others."""

    group: _Group
    kept: list[Item]
    features: BatchFeature | None  # Row by row those of `kept`, None where that is empty or embedded.
    rejects: list[dict[str, str]]  # Key and reason of each.
    embeds: torch.Tensor | None = None


def embed(
    source: PreTrainedModel,
    processor: CMCRProcessor,
    items: Items,
    folder: str | os.PathLike[str],
    *,
    space: str,
    record: dict[str, str],
    dim: int,
    batch_size: int = 32,
    workers: int | None = None,
    strict: bool = True,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
    shard_rows: int | None = None,
) -> EmbeddingStore:
    """Embed items into the store at `folder` and return it; one that is complete is returned as it is.

    Batches are cut by the position of an item and end with their shard, so a run that was interrupted goes on behind
    the shards that are there, and computes what an uninterrupted one does. Files are read and prepared ahead of the
    model. Of the texts of a shard, those of similar length are embedded together.

    Any number of processes may embed into one folder, on any machines that see it, each with a `share` of its own: it
    embeds the shards of its share, then those that the others have not come to, and the one that finds all shards
    there completes the store. They need not know of each other, and may be stopped and joined by others at any time.
    The bytes are those of a single process.

    Args:
        folder: path, or an address of fsspec such as `s3://BUCKET/FOLDER`.
        record: `id`, `revision` and `config_hash` of the source, from [`source_record`].
        dim: width of the source's embeddings.
        batch_size: items at once; of texts, as many as have no more tokens together than so many of the longest.
        workers: threads that read and prepare; by default one for each processor but one, 16 at most.
        strict: stop at an item that is unreadable. Otherwise it is left out, and listed in the folder's
            `rejects.jsonl` with its key and the reason.
        share: of this process, from 0, and their number.
        shard_rows: of a shard at most, which are held in memory; by default a number that fits usual widths.

    Returns:
        The store, which is complete unless another process has not embedded its share yet.

    Raises:
        ValueError: the folder holds a store of other items or another source, an item is unreadable and `strict`, or
            all items are; names it.
    """
    store = EmbeddingStore.create(
        folder,
        space=space,
        modality=items.modality,
        source=record,
        dim=dim,
        data_fingerprint=items.fingerprint,
        shard_rows=shard_rows or SHARD_ROWS[items.modality],
        share=share,
    )
    if store.complete:
        return store
    parts = items.parts(store.shard_rows)
    groups = _groups(store, parts, store.shard_rows if items.modality == "text" else batch_size, share)
    with tqdm(
        total=len(items) or None,
        initial=store.rows + store.skipped,
        desc=f"{space} {items.modality}",
        unit="item",
        disable=not progress,
    ) as bar:

        def advance(count: int) -> None:
            # What another process was at too is not counted twice.
            bar.update(count if bar.total is None else min(count, bar.total - bar.n))

        prepare_group = partial(_prepare_group, processor, items.modality, space, strict=strict)
        shard: list[_Batch] = []
        with closing(
            _encode_groups(source, items.modality, groups, prepare_group, batch_size, workers, advance)
        ) as batches:
            for batch in batches:
                shard.append(batch)
                if batch.group.is_end:
                    _write_shard(store, shard)
                    shard = []
                    if progress and share[1] > 1:
                        there = sum(parts[number[0]].size or 0 for number in store.numbers())
                        advance(max(there - bar.n, 0))
    store.complete_if_whole(len(parts), alone=share[1] == 1)
    return store


def _write_shard(store: EmbeddingStore, batches: Sequence[_Batch]) -> None:
    rows = [batch.embeds for batch in batches if batch.embeds is not None]
    # Only here does a GPU's work have to be awaited.
    embeds = torch.cat(rows).cpu() if rows else torch.empty(0, store.dim)
    keys = [item.key for batch in batches for item in batch.kept]
    rejects = [reject for batch in batches for reject in batch.rejects]
    store.write(batches[-1].group.number, embeds, keys, rejects=rejects, last=batches[-1].group.is_last)


def _encode_groups(
    source: PreTrainedModel,
    modality: str,
    groups: Iterable[_Group],
    prepare_group: Callable[[_Group], _Batch],
    batch_size: int,
    workers: int | None,
    advance: Callable[[int], None],
) -> Generator[_Batch, None, None]:
    """Yield groups of items embedded, in their order, what comes next being read and prepared meanwhile."""
    is_text, device, cores = modality == "text", source.device.type, torch.get_num_threads()
    # On a CPU, the model runs in the threads that read, each on cores of its own. That is faster than one batch at a
    # time on all of them, which wait for each other at every layer and for the threads that read.
    in_threads = device == "cpu" and not is_text
    # A tokenizer keeps the settings of a call, which calls at the same time would mix up.
    most = 1 if is_text else min(cores if in_threads else max((os.cpu_count() or 1) - 1, 1), MAX_WORKERS)
    threads = most if is_text else workers or most

    def prepared(group: _Group) -> _Batch:
        batch = prepare_group(group)
        if batch.features is not None and in_threads:
            batch.embeds, batch.features = encode_features(source, modality, batch.features), None
        elif batch.features is not None and device == "cuda":
            batch.features = BatchFeature({name: part.pin_memory() for name, part in batch.features.items()})
        return batch

    was_training = source.training
    source.eval()
    try:
        with (
            pool(threads, max(cores // threads, 1)) as executor,
            closing(_ahead(prepared, groups, executor, 2 * threads)) as batches,
        ):
            for batch in batches:
                if batch.features is not None:
                    batch.embeds = _encode_batch(
                        source, modality, batch.features, len(batch.kept), batch_size, advance
                    )
                    batch.features = None
                else:
                    advance(len(batch.kept))
                advance(len(batch.rejects))
                yield batch
    finally:
        source.train(was_training)


def _groups(store: EmbeddingStore, parts: Sequence[Part], size: int, share: tuple[int, int]) -> Iterator[_Group]:
    """Yield what is not embedded yet, in groups of `size`: the parts of a share, then those of the others."""
    rank, ranks = share
    found = {receipt.number: receipt for receipt in store.receipts()}

    def written(number: Number) -> Receipt | None:
        return found.get(number) or (store.written(number) if ranks > 1 else None)

    # From the end, which the others reach last.
    others = [part for part in reversed(parts) if part.number % ranks != rank]
    for part in [*parts[rank::ranks], *others]:
        if ranks > 1 and store.is_complete_by_now():
            return
        if part.size is None:
            yield from _groups_of_file(part, written, size, store.shard_rows)
        elif written((part.number,)) is None:
            rest = part.read(0)
            for start in range(0, part.size, size):
                group = list(itertools.islice(rest, size))
                yield _Group((part.number,), group, start + size >= part.size)


def _groups_of_file(
    part: Part, written: Callable[[Number], Receipt | None], size: int, shard_rows: int
) -> Iterator[_Group]:
    """Yield the groups of a part whose end only its last item tells, behind its shards that are written."""
    start = shard = 0
    while (receipt := written((part.number, shard))) is not None:
        if receipt.last:
            return
        start += receipt.rows + len(receipt.rejects)
        shard += 1
    rest = part.read(start)
    ahead = list(itertools.islice(rest, 1))
    left, is_last = shard_rows, False
    while not is_last:
        group = ahead + list(itertools.islice(rest, min(size, left) - len(ahead)))
        ahead = list(itertools.islice(rest, 1))
        left, is_last = left - len(group), not ahead
        yield _Group((part.number, shard), group, is_last or not left, is_last)
        if not left:
            left, shard = shard_rows, shard + 1


def _ahead(
    call: Callable[[_Group], _Batch], groups: Iterable[_Group], executor: ThreadPoolExecutor, most: int
) -> Generator[_Batch, None, None]:
    """Yield `call` of every group, in their order, computed by threads at most so many groups ahead."""
    waiting: deque[Future[_Batch]] = deque()
    try:
        for group in groups:
            waiting.append(executor.submit(call, group))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _prepare_group(processor: CMCRProcessor, modality: str, space: str, group: _Group, *, strict: bool) -> _Batch:
    """Read and prepare items; where one of them is unreadable, raise its error, or go on without it."""
    items = group.items
    if not items:
        return _Batch(group, [], None, [])
    try:
        check_keys([item.key for item in items])
        return _Batch(group, items, prepare(processor, modality, [item.value for item in items], space), [])
    except ValueError as cause:
        kept: list[Item] = []
        rejects: list[dict[str, str]] = []
        for item in items:
            try:
                check_keys([item.key])
                prepare(processor, modality, [item.value], space)
            except ValueError as error:
                if strict:
                    raise ValueError(f"{error} (item {item.key!r})") from error
                # A file name may be no text.
                key, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (item.key, str(error)))
                rejects.append({"key": key, "reason": reason})
            else:
                kept.append(item)
        if not rejects:
            raise
        if not kept:
            return _Batch(group, [], None, rejects)
        try:
            return _Batch(group, kept, prepare(processor, modality, [item.value for item in kept], space), rejects)
        except ValueError:
            raise cause from None


def _encode_batch(
    source: PreTrainedModel,
    modality: str,
    features: BatchFeature,
    rows: int,
    batch_size: int,
    update: Callable[[int], object],
) -> torch.Tensor:
    """Embed prepared items, texts in parts of similar length: `(rows, dim)` float32 unit rows."""
    mask = features.get("attention_mask") if modality == "text" else None
    # Padded at the end, as far as the longest text needs.
    lengths = mask.sum(dim=1) if mask is not None and bool(mask[:, 0].all()) else None
    if lengths is None:
        parts = torch.arange(rows).split(batch_size)
    else:
        parts = _parts_by_length(lengths, batch_size * int(lengths.max()))
    embeds = []
    for part in parts:
        inputs = {name: value[part] for name, value in features.items()}
        if lengths is not None:
            inputs = {name: value[:, : lengths[part].max()] for name, value in inputs.items()}
        embeds.append(encode_features(source, modality, inputs))
        update(len(part))
    return torch.cat(embeds)[torch.cat(list(parts)).argsort()]


def _parts_by_length(lengths: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Cut texts, shortest first, into parts of at most `budget` tokens with their padding: the rows of each part."""
    order = lengths.argsort(stable=True)
    parts: list[torch.Tensor] = []
    start = 0
    for stop, length in enumerate(lengths[order].tolist()):
        if length * (stop + 1 - start) > budget:
            parts.append(order[start:stop])
            start = stop
    return [*parts, order[start:]]


@torch.inference_mode()
def encode_features(source: PreTrainedModel, modality: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Embed prepared inputs with a source model: `(rows, dim)` float32 unit rows of the source's own space."""
    moved = {name: value.to(source.device, non_blocking=True) for name, value in inputs.items()}
    return normalize(source_features(source, modality, moved).pooler_output.float())


@torch.inference_mode()
def encode_items(
    model: CMCRModel, processor: CMCRProcessor, items: Items, *, batch_size: int = 32, progress: bool = True
) -> torch.Tensor:
    """Embed items with a connected model: `(items, projection_dim)` float32 unit rows of the shared space, on the CPU.

    Raises:
        ValueError: an item is unreadable.
    """
    rows = iter(items)
    embeds = []
    with tqdm(total=len(items) or None, desc=items.modality, unit="item", disable=not progress) as bar:
        while batch := list(itertools.islice(rows, batch_size)):
            features = prepare(processor, items.modality, [item.value for item in batch]).to(model.device)
            outputs = getattr(model, f"get_{items.modality}_features")(**features)
            embeds.append(outputs.pooler_output.float().cpu())
            bar.update(len(batch))
    return torch.cat(embeds)


def prepare(processor: CMCRProcessor, modality: str, values: Sequence[Any], space: str | None = None) -> BatchFeature:
    """Return the inputs of a model for texts, images, audio or point clouds."""
    items: list[Any] = [value.read() if isinstance(value, RemoteFile) else value for value in values]
    if modality == "text":
        return processor(text=items, space=space)
    if modality == "image":
        return processor(images=items, space=space)
    if modality == "audio":
        return processor(audio=items)
    # What `datasets` gives of a column of numbers, which the processor could take for a batch.
    return processor(point_clouds=[np.asarray(item) if isinstance(item, list) else item for item in items])


def source_record(identity: str, revision: str | None, source: PreTrainedModel) -> dict[str, str]:
    """Describe a source so that another is noticed: id, commit or sha256 of its files, sha256 of its configuration."""
    if Path(identity).is_dir():
        content = hashlib.sha256()
        for path in sorted(path for path in Path(identity).iterdir() if path.suffix in SOURCE_SUFFIXES):
            content.update(f"{path.name} {sha256(path)}".encode())
        revision = content.hexdigest()
        # A folder is known by what it holds, wherever it lies.
        identity = Path(identity).name
    # Weights of another package by their file: FILE.pt, or open_clip:NAME/FILE.
    elif (weights := Path(split_source(identity)[1])).is_file():
        revision = sha256(weights)
    config = source.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps([config, str(source.dtype)], sort_keys=True, default=str).encode()).hexdigest()
    return {"id": identity, "revision": revision or "main", "config_hash": digest}
