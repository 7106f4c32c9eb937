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
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel

from ..durable import sha256, write_durably
from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import CMCRProcessor
from ..modeling.sources_cmcr import normalize, source_features
from ..modeling.towers_cmcr import split_source
from .data import Item, Items
from .store import EmbeddingStore

# What an interruption may lose at most, in rows. The same for every batch size, so that a run may go on with another.
SHARD_ROWS = {"text": 8192, "image": 1024, "audio": 1024, "point_cloud": 128}
REJECTS = "rejects.jsonl"
MAX_WORKERS = 16
# Weights of one file, of shards or of an older format; configurations, tokenizers and their vocabularies.
SOURCE_SUFFIXES = (".safetensors", ".bin", ".json", ".txt")


@dataclass
class _Batch:
    """Items that follow each other, as the source takes them, and those of them that are unreadable."""

    kept: list[Item]
    features: BatchFeature | None  # Row by row those of `kept`, None where that is empty.
    refused: list[dict[str, Any]]  # Position among all items, key and reason of each.


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
) -> EmbeddingStore:
    """Embed items into the store at `folder` and return it complete; one that is complete is returned as it is.

    An interrupted run goes on behind its last shard. Batches are cut by the position of an item and end with their
    shard, so a resumed run computes what an uninterrupted one does. Files are read and prepared ahead of the model.
    Of the texts of a shard, those of similar length are embedded together.

    Args:
        record: `id`, `revision` and `config_hash` of the source, from [`source_record`].
        dim: width of the source's embeddings.
        batch_size: items at once; of texts, as many as have no more tokens together than so many of the longest.
        workers: threads that read and prepare; by default one for each processor but one, 16 at most.
        strict: stop at an item that is unreadable. Otherwise it is left out, and listed in the folder's
            `rejects.jsonl` with its position among the items, its key and the reason.

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
        shard_rows=SHARD_ROWS[items.modality],
    )
    if store.complete:
        return store
    rejects = _read_rejects(store)
    text = items.modality == "text"
    groups = _groups(items, store.position, store.shard_rows if text else batch_size, store.shard_rows)
    # A tokenizer keeps the settings of a call, which calls at the same time would mix up.
    threads = 1 if text else workers or min(max((os.cpu_count() or 1) - 1, 1), MAX_WORKERS)

    def prepared(group: tuple[int, list[Item]]) -> _Batch:
        return _prepare_batch(processor, items.modality, space, *group, strict=strict)

    was_training = source.training
    source.eval()
    with (
        tqdm(
            total=len(items) or None,
            initial=store.position,
            desc=f"{space} {items.modality}",
            unit="item",
            disable=not progress,
        ) as bar,
        closing(_ahead(prepared, groups, threads)) as batches,
    ):
        for batch in batches:
            if batch.features is not None:
                rows = _encode_batch(source, items.modality, batch.features, len(batch.kept), batch_size, bar.update)
                store.append(rows, [item.key for item in batch.kept])
            if batch.refused:
                rejects += batch.refused
                # Durable before the shard that lacks them.
                lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
                write_durably(store.folder / REJECTS, lines.encode())
            for _ in batch.refused:
                store.skip()
                bar.update()
    store.finish()
    source.train(was_training)
    return store


def _read_rejects(store: EmbeddingStore) -> list[dict[str, Any]]:
    """Return the rejects of the written shards; later ones will be met again."""
    path = store.folder / REJECTS
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [reject for reject in found if reject["position"] < store.position]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {store.folder} and run embed again.") from error


def _groups(items: Iterable[Item], position: int, size: int, shard_items: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield the items from `position` on with their positions, in groups of `size` that end with their shard."""
    rest = itertools.islice(items, position, None)
    while group := list(itertools.islice(rest, min(size, shard_items - position % shard_items))):
        yield position, group
        position += len(group)


def _ahead(
    call: Callable[[tuple[int, list[Item]]], _Batch], groups: Iterable[tuple[int, list[Item]]], threads: int
) -> Generator[_Batch, None, None]:
    """Yield `call` of every group, in their order, computed by threads a few groups ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Batch]] = deque()
        try:
            for group in groups:
                waiting.append(pool.submit(call, group))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _prepare_batch(
    processor: CMCRProcessor, modality: str, space: str, position: int, items: list[Item], *, strict: bool
) -> _Batch:
    """Read and prepare items; where one of them is unreadable, raise its error, or go on without it."""
    try:
        return _Batch(items, prepare(processor, modality, [item.value for item in items], space), [])
    except ValueError as cause:
        kept: list[Item] = []
        refused: list[dict[str, Any]] = []
        for number, item in enumerate(items, start=position):
            try:
                prepare(processor, modality, [item.value], space)
            except ValueError as error:
                if strict:
                    raise ValueError(f"{error} (item {item.key!r})") from error
                refused.append({"position": number, "key": item.key, "reason": str(error)})
            else:
                kept.append(item)
        if not refused:
            raise
        if not kept:
            return _Batch([], None, refused)
        try:
            return _Batch(kept, prepare(processor, modality, [item.value for item in kept], space), refused)
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
    """Embed prepared items, texts in parts of similar length: `(rows, dim)` float32 unit rows, on the CPU."""
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
        embeds.append(encode_features(source, modality, inputs).cpu())
        update(len(part))
    encoded = torch.empty(rows, embeds[0].shape[1])
    encoded[torch.cat(list(parts))] = torch.cat(embeds)
    return encoded


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
    moved = {name: value.to(source.device) for name, value in inputs.items()}
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
    items = list(values)
    if modality == "text":
        return processor(text=items, space=space)
    if modality == "image":
        return processor(images=items, space=space)
    return processor(audio=items) if modality == "audio" else processor(point_clouds=items)


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
