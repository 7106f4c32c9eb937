"""Embed items with a frozen source model into an `EmbeddingStore`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel

from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import CMCRProcessor
from ..modeling.sources_cmcr import normalize, source_features
from .data import Item, Items
from .store import EmbeddingStore

# What an interruption may lose at most, in rows. The same for every batch size, so that a run may go on with another.
SHARD_ROWS = {"text": 8192, "image": 1024, "audio": 1024, "point_cloud": 128}
# Weights of one file, of shards or of an older format; configurations, tokenizers and their vocabularies.
SOURCE_SUFFIXES = (".safetensors", ".bin", ".json", ".txt")


@torch.inference_mode()
def encode(
    source: PreTrainedModel, processor: CMCRProcessor, space: str, modality: str, values: Sequence[Any]
) -> torch.Tensor:
    """Embed values with a source model: `(len(values), dim)` float32 unit rows of the source's own space.

    Args:
        values: texts, images, audio or point clouds, as [`CMCRProcessor`] takes them.
        space: `clip`, `clap` or `ulip`, the role of the source.
    """
    features = prepare(processor, modality, values, space).to(source.device)
    return normalize(source_features(source, modality, features).pooler_output.float())


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
    progress: bool = True,
) -> EmbeddingStore:
    """Embed items into the store at `folder` and return it complete; one that is complete is returned as it is.

    An interrupted run goes on behind its last shard. Batches are cut by the row index and end with their shard, so a
    resumed run computes what an uninterrupted one does.

    Args:
        record: `id`, `revision` and `config_hash` of the source, from [`source_record`].
        dim: width of the source's embeddings.

    Raises:
        ValueError: the folder holds a store of other items or another source, or an item is unreadable; names it.
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
    was_training = source.training
    source.eval()
    rest = itertools.islice(items, store.rows, None)
    row = store.rows
    name = f"{space} {items.modality}"
    with tqdm(total=len(items) or None, initial=row, desc=name, unit="item", disable=not progress) as bar:
        while batch := list(itertools.islice(rest, min(batch_size, store.shard_rows - row % store.shard_rows))):
            try:
                embeds = encode(source, processor, space, items.modality, [item.value for item in batch])
            except ValueError as error:
                raise _named(error, processor, space, items.modality, batch) from error
            store.append(embeds, [item.key for item in batch])
            row += len(batch)
            bar.update(len(batch))
    store.finish()
    source.train(was_training)
    return store


def _named(
    error: ValueError, processor: CMCRProcessor, space: str, modality: str, batch: Sequence[Item]
) -> ValueError:
    """Return the error of the first item of a batch that the processor refuses, with the item's key."""
    for item in batch:
        try:
            prepare(processor, modality, [item.value], space)
        except ValueError as cause:
            return ValueError(f"{cause} (item {item.key!r})")
    return error


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
            with path.open("rb") as file:
                content.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
        revision = content.hexdigest()
        # A folder is known by what it holds, wherever it lies.
        identity = Path(identity).name
    config = source.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps([config, str(source.dtype)], sort_keys=True, default=str).encode()).hexdigest()
    return {"id": identity, "revision": revision or "main", "config_hash": digest}
