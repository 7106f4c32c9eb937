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
from transformers.utils import SAFE_WEIGHTS_NAME

from ..modeling.modeling_cmcr import CMCRModel, normalize
from ..modeling.processing_cmcr import CMCRProcessor
from .data import Items
from .store import EmbeddingStore


@torch.inference_mode()
def encode(source: PreTrainedModel, processor: CMCRProcessor, space: str, modality: str, values: Sequence[Any]) -> torch.Tensor:
    """Embed values with a source model: `(len(values), dim)` float32 unit rows of the source's own space.

    Args:
        values: texts, images or audio, as [`CMCRProcessor`] takes them.
        space: `clip` or `clap`, the role of the source.
    """
    features = _features(processor, modality, values, space).to(source.device)
    for name in ("pixel_values", "input_features"):
        if name in features:
            features[name] = features[name].to(source.dtype)
    return normalize(getattr(source, f"get_{modality}_features")(**features).pooler_output.float())


def embed(
    source: PreTrainedModel,
    processor: CMCRProcessor,
    items: Items,
    folder: str | os.PathLike[str],
    *,
    space: str,
    record: dict[str, str],
    batch_size: int = 32,
    progress: bool = True,
) -> EmbeddingStore:
    """Embed items into the store at `folder` and return it complete; one that is complete already is returned as it is.

    A run that was interrupted goes on behind its last shard. Batches are cut by the row index, so that a resumed run computes
    what an uninterrupted one does.

    Args:
        record: `id`, `revision` and `config_hash` of the source, from [`source_record`].

    Raises:
        ValueError: the folder holds a store of other items or another source, or an item is unreadable; names it.
    """
    was_training = source.training
    source.eval()
    width = encode(source, processor, space, items.modality, [next(iter(items)).value]).shape[1]
    shard_rows = max(65536 // batch_size, 1) * batch_size
    store = EmbeddingStore.create(
        folder, space=space, modality=items.modality, source=record, dim=width, data_fingerprint=items.fingerprint, shard_rows=shard_rows
    )
    if not store.complete:
        rest = itertools.islice(items, store.rows, None)
        with tqdm(total=len(items) or None, initial=store.rows, desc=f"{space} {items.modality}", unit="item", disable=not progress) as bar:
            while batch := list(itertools.islice(rest, batch_size)):
                try:
                    embeds = encode(source, processor, space, items.modality, [item.value for item in batch])
                except ValueError as error:
                    raise ValueError(f"{error} (one of {batch[0].key!r} to {batch[-1].key!r})") from error
                store.append(embeds, [item.key for item in batch])
                bar.update(len(batch))
        store.finish()
    source.train(was_training)
    return store


@torch.inference_mode()
def encode_items(
    model: CMCRModel, processor: CMCRProcessor, items: Items, *, batch_size: int = 32, progress: bool = True
) -> torch.Tensor:
    """Embed items with a connected model: `(items, projection_dim)` float32 unit rows of the shared space, on the CPU."""
    rows = iter(items)
    embeds = []
    with tqdm(total=len(items) or None, desc=items.modality, unit="item", disable=not progress) as bar:
        while batch := list(itertools.islice(rows, batch_size)):
            features = _features(processor, items.modality, [item.value for item in batch]).to(model.device)
            outputs = getattr(model, f"get_{items.modality}_features")(**features)
            embeds.append(outputs.pooler_output.float().cpu())
            bar.update(len(batch))
    return torch.cat(embeds)


def _features(processor: CMCRProcessor, modality: str, values: Sequence[Any], space: str | None = None) -> BatchFeature:
    if modality == "text":
        return processor(text=list(values), space=space)
    return processor(images=list(values)) if modality == "image" else processor(audio=list(values))


def source_record(identity: str, revision: str | None, source: PreTrainedModel) -> dict[str, str]:
    """Describe a source so that another one is noticed: its id, its commit or its weights' sha256, its configuration's sha256."""
    weights = Path(identity) / SAFE_WEIGHTS_NAME
    if weights.is_file():
        with weights.open("rb") as file:
            revision = hashlib.file_digest(file, "sha256").hexdigest()
        # A folder is known by what it holds, wherever it lies.
        identity = Path(identity).name
    config = {key: value for key, value in source.config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps([config, str(source.dtype)], sort_keys=True, default=str).encode()).hexdigest()
    return {"id": identity, "revision": revision or "main", "config_hash": digest}
