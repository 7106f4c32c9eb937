"""Semantic consistency from stores to a store, by one or several processes: pseudo leaf embeddings of a data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .aggregate import aggregate
from .store import EmbeddingStore

# A multiple of all query blocks, so that what is held at once, and by whom, changes no bit.
PSEUDO_SHARD_ROWS = 8192
# 65,536 queries of 512: reading the memory anew for each walk costs a hundredth of it, and an interruption loses one.
CPU_BUDGET = 2**28


def aggregate_stores(
    queries: EmbeddingStore,
    memory: EmbeddingStore,
    folder: str | os.PathLike[str],
    *,
    values: EmbeddingStore | None = None,
    temperature: float = 0.01,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    budget: int | None = None,
    progress: bool | None = None,
    share: tuple[int, int] = (0, 1),
) -> EmbeddingStore:
    """Give every query a pseudo embedding of unit length (see [`aggregate`]), in a store with the keys of the queries.

    The memory is walked once for as many queries as fit the budget; a run that was stopped goes on behind its last
    walk. Any number of processes may do this for one folder, each with a `share` of its own, as for `embed`. On
    devices of one kind the bytes depend neither on the budget nor on the shares. Rows have unit length so that the
    noise turns pseudo and native embeddings by the same angle.

    Args:
        folder: path, or an address of fsspec.
        values: another store of the items of the memory, whose average is taken under the weights of the memory.
        dtype: as for [`aggregate`].
        budget: bytes of queries and results that are held at once, 256 MiB on a CPU and a quarter of what is free on a
            GPU by default; a shard of `PSEUDO_SHARD_ROWS` at least.
        progress: by default, where the work is worth a bar.
        share: of this process, from 0, and their number.

    Returns:
        The store, which is complete unless another process has not done its share yet.

    Raises:
        ValueError: stores that do not fit together, or a folder that holds something else.
    """
    leaf = memory if values is None else values
    if (queries.space, queries.dim) != (memory.space, memory.dim):
        raise ValueError(
            f"{queries.folder} holds embeddings of {queries.space}, {queries.dim} wide, and {memory.folder} of "
            f"{memory.space}, {memory.dim} wide, expected one space: embed both with one source."
        )
    if values is not None and values.keys() != memory.keys():
        raise ValueError(
            f"{values.folder} and {memory.folder} hold other items, or in another order: embed the same data for both."
        )
    inputs = {"queries": queries.digest, "memory": memory.digest, "temperature": temperature}
    if values is not None:
        inputs["values"] = values.digest
    if dtype is not None:
        inputs["dtype"] = str(dtype)
    store = EmbeddingStore.create(
        folder,
        space=leaf.space,
        modality=leaf.modality,
        source=leaf.source,
        dim=leaf.dim,
        data_fingerprint=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        shard_rows=PSEUDO_SHARD_ROWS,
        share=share,
    )
    if store.complete:
        return store
    device = torch.device(device)
    if budget is None:
        budget = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CPU_BUDGET
    shards = -(-queries.rows // PSEUDO_SHARD_ROWS)
    at_once = max(budget // (4 * (queries.dim + leaf.dim)) // PSEUDO_SHARD_ROWS, 1)
    keys = queries.keys()
    for walk in _walks(store, shards, at_once, share):
        rows = [range(number * PSEUDO_SHARD_ROWS, (number + 1) * PSEUDO_SHARD_ROWS) for number in walk]
        pseudo = aggregate(
            torch.cat([queries.read(part) for part in rows]).to(device),
            memory,
            None if values is None else _cut_alike(values, memory),
            temperature=temperature,
            dtype=dtype,
            normalize=True,
            progress=(queries.rows * memory.rows > 10**9 if progress is None else progress) and share[0] == 0,
        ).float()
        for number, part, embeds in zip(walk, rows, pseudo.split(PSEUDO_SHARD_ROWS), strict=True):
            store.write((number,), embeds, keys[part.start : part.stop])
    store.complete_if_whole(shards, alone=share[1] == 1)
    return store


def _walks(store: EmbeddingStore, shards: int, at_once: int, share: tuple[int, int]) -> Iterator[list[int]]:
    """Yield the numbers of shards that are not there yet, so many at once: of a share, then of the others."""
    rank, ranks = share
    own = list(range(rank, shards, ranks))
    # From the end, which the others reach last.
    others = sorted(set(range(shards)) - set(own), reverse=True)
    for numbers in (own, others):
        while not (ranks > 1 and store.is_complete_by_now()):
            there = {receipt.number[0] for receipt in store.receipts()}
            numbers = [number for number in numbers if number not in there]
            walk, numbers = numbers[:at_once], numbers[at_once:]
            if not walk:
                break
            # The last of all is shorter, and what follows it would be cut elsewhere.
            yield sorted(walk)


def _cut_alike(store: EmbeddingStore, other: EmbeddingStore) -> Iterator[Tensor]:
    """Yield the rows of a store in shards of the row counts of another one's."""
    rest, start = store.shards(), 0
    waiting = torch.empty(0, store.dim)
    for shard in other.shard_records:
        while len(waiting) - start < shard.rows:
            waiting, start = torch.cat([waiting[start:], next(rest).float()]), 0
        yield waiting[start : start + shard.rows]
        start += shard.rows
