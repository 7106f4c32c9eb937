"""`cmcr embed`: the embeddings of a data set in a source's own space, as a store that connections are trained on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling.configuration_cmcr import source_embedding_dim
from ..modeling.processing_cmcr import CMCRProcessor
from ..modeling.towers_cmcr import load_source
from .data import Items, is_table, load_table
from .embed import embed, encode_features, prepare, source_record
from .places import is_address
from .recipe import DataSpec
from .store import REJECTS, EmbeddingStore

# Items that are embedded a second time, in float32, to tell what another precision costs.
COMPARED = 32


def data_entry(data: str, modality: str, *, column: list[str] | None = None, **options: Any) -> DataSpec:
    """Return the data entry that a path, an address or a data set's id stands for.

    A folder of files, or with a column a local data set; a file is a table, as is an address that ends like one; what
    is neither is another address or an id.

    Args:
        options: further fields of [`DataSpec`].
    """
    columns = column[0] if column and len(column) == 1 else column
    path = Path(data)
    if path.is_file() or (is_address(data) and is_table(data)):
        return DataSpec(table=data, column=columns, **options)
    if is_address(data) or (path.is_dir() and modality != "text" and not columns):
        return DataSpec(folder=data, **options)
    return DataSpec(dataset=data, column=columns, **options)


def embed_data(
    source: str,
    space: str,
    modality: str,
    data: DataSpec,
    folder: str | os.PathLike[str],
    *,
    root: Path = Path(),
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch_size: int = 32,
    workers: int | None = None,
    strict: bool = False,
    share: tuple[int, int] = (0, 1),
    report: Callable[[str], None] = print,
) -> EmbeddingStore:
    """Embed the items of a data entry with a source into a store, and say what came of it (see [`embed`]).

    Args:
        source: folder, Hub id, `open_clip:NAME/TAG` or a LAION-CLAP `FILE.pt`.
        space: `clip`, `clap` or `ulip`, the role of the source.
        root: folder that relative paths of the entry start from.
        dtype: of the model; for another one than float32, the least cosine with float32 is reported.

    Raises:
        ValueError: the source has no tower for the modality, or as for [`embed`] and [`Items`].
    """
    if data.dataset is not None and "/" not in data.dataset and not (root / data.dataset).is_dir():
        raise ValueError(
            f"There is no file or folder {data.dataset!r}, and a Hub data set is named OWNER/NAME. Check --data."
        )
    if data.table is not None and data.column is None:
        columns = load_table(data.table if is_address(data.table) else root / data.table)
        if len(columns) > 1:
            raise ValueError(
                f"{data.table} has several columns, {', '.join(columns)}. Name that of the items with --column."
            )
    if data.dataset is not None and (root / data.dataset).resolve() in Path(folder).absolute().parents:
        # The rows of the store would be taken for some of the data set.
        raise ValueError(f"{folder} lies within the data set {data.dataset}. Name an output folder outside of it.")
    items = Items([data], modality, root, strict=strict)
    model, record = load_source(source, revision, [modality], {"dtype": dtype})
    if not hasattr(model, f"get_{modality}_features"):
        raise ValueError(
            f"{source!r} is a {type(model).__name__}, which embeds no {modality}. Name a source and a space that do."
        )
    processor = CMCRProcessor.from_sources_pretrained(**{space: source}, revisions={space: revision})
    dim = source_embedding_dim(model.config)
    if dim is None:
        raise ValueError(f"Cannot tell the embedding width of a {type(model).__name__}. Use a CLIP, CLAP or ULIP.")
    model.to(device)  # type: ignore[arg-type]
    store = embed(
        model,
        processor,
        items,
        folder,
        space=space,
        record=source_record(str(record["id"]), record["revision"], model),
        dim=dim,
        batch_size=batch_size,
        workers=workers,
        strict=strict,
        # The bar of the first share counts what the others have done too.
        progress=share[0] == 0,
        share=share,
    )
    own = f"share {share[0]} of {share[1]}: " if share[1] > 1 else ""
    if not store.complete:
        report(f"{own}embedded; others are still at theirs")
        return store
    listed = f", {store.skipped} unreadable, listed in {folder}/{REJECTS}" if store.skipped else ""
    report(f"{own}{store.rows} rows of {store.dim} in {folder}{listed}")
    if dtype != torch.float32:
        cosine = _least_cosine(store, source, space, revision, items, processor, device)
        report(f"{own}least cosine with float32, of the first {min(COMPARED, store.rows)} items: {cosine:.6f}")
    return store


@torch.inference_mode()
def _least_cosine(
    store: EmbeddingStore,
    source: str,
    space: str,
    revision: str | None,
    items: Items,
    processor: CMCRProcessor,
    device: str,
) -> float:
    model, _ = load_source(source, revision, [store.modality], {"dtype": torch.float32})
    model.to(device).eval()  # type: ignore[arg-type]
    rows, keys = next(zip(store.shards(), store.shard_keys(), strict=True))
    rows, wanted = rows[:COMPARED], set(keys[:COMPARED])
    kept = list(itertools.islice((item.value for item in items if item.key in wanted), len(rows)))
    exact = encode_features(model, store.modality, prepare(processor, store.modality, kept, space)).cpu()
    return F.cosine_similarity(rows, exact, dim=1).min().item()
