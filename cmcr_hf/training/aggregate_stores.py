"""Semantic consistency from stores to a store, on one or several ranks: pseudo leaf embeddings of a whole data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .aggregate import CPU_BLOCKS, DEVICE_BLOCKS, aggregate, rank_rows
from .store import EmbeddingStore

# A multiple of all query blocks, so that what is held at once, and by whom, changes no bit.
PSEUDO_SHARD_ROWS = 65536
# For 2.3 M texts of 512 over a memory: nine walks of it on a CPU, where a walk takes minutes to hours and an
# interruption loses one.
CPU_BUDGET = 2**30


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
) -> None:
    """Give every query a pseudo embedding of unit length (see [`aggregate`]), in a store with the keys of the queries.

    The memory is walked once for as many queries as fit the budget, shared out among the ranks of
    `torch.distributed` where that is initialised. The first rank writes, behind each walk, so that a run that was
    stopped goes on there. On devices of one kind the bytes depend neither on the budget nor on the ranks; rows have
    unit length so that the noise turns pseudo and native embeddings by the same angle.

    Args:
        values: another store of the items of the memory, whose average is taken under the weights of the memory.
        dtype: as for [`aggregate`].
        budget: bytes of queries and results that a rank holds at once, 1 GiB on a CPU and a quarter of what is free on
            a GPU by default; a shard of `PSEUDO_SHARD_ROWS` at least.
        progress: by default, where the work is worth a bar.

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
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    store: EmbeddingStore | None = None
    start = 0
    if rank == 0:
        store = EmbeddingStore.create(
            folder,
            space=leaf.space,
            modality=leaf.modality,
            source=leaf.source,
            dim=leaf.dim,
            data_fingerprint=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
            shard_rows=PSEUDO_SHARD_ROWS,
        )
        start = queries.rows if store.complete else store.rows
    device = torch.device(device)
    if budget is None:
        budget = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CPU_BUDGET
    # Ranks may have unequal devices, and parts of a walk are cut alike everywhere.
    start, shards = _agreed([start, budget // (4 * (queries.dim + leaf.dim)) // PSEUDO_SHARD_ROWS])
    walk = max(shards, 1) * ranks * PSEUDO_SHARD_ROWS
    block = CPU_BLOCKS[0] if device.type == "cpu" else DEVICE_BLOCKS[0]
    keys = queries.keys()[start:] if store is not None and start < queries.rows else []
    progress = queries.rows * memory.rows > 10**9 if progress is None else progress
    for first in range(start, queries.rows, walk):
        rows = min(walk, queries.rows - first)
        parts = [rank_rows(rows, block, rank=number, world_size=ranks) for number in range(ranks)]
        pseudo = torch.empty(0, leaf.dim)
        if parts[rank]:
            pseudo = aggregate(
                _rows(queries, first + parts[rank].start, first + parts[rank].stop).to(device),
                memory,
                values,
                temperature=temperature,
                dtype=dtype,
                normalize=True,
                progress=progress and rank == 0,
            ).to("cpu", torch.float32)
        if store is None:
            if parts[rank]:
                dist.send(pseudo, 0)
            continue
        for number, part in enumerate(parts):
            if number and part:
                pseudo = torch.empty(len(part), leaf.dim)
                dist.recv(pseudo, number)
            if part:
                store.append(pseudo, keys[first - start + part.start : first - start + part.stop])
    if store is not None:
        store.finish()


@contextmanager
def ranks_of_torchrun() -> Iterator[int]:
    """Join the ranks that torchrun started, if it did, for the time of the context; give the number of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0
        return
    # For tensors on the CPU whatever computes: results go to the disk of the first rank.
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _agreed(numbers: list[int]) -> list[int]:
    """Return the numbers of the first rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(numbers, 0)
    return numbers


def _rows(store: EmbeddingStore, start: int, stop: int) -> Tensor:
    """Return the rows from `start` to `stop`, at most those shards in memory that they lie in."""
    parts, first = [], 0
    for shard in store.shards():
        parts.append(shard[max(start - first, 0) : max(stop - first, 0)])
        first += len(shard)
        if first >= stop:
            break
    return torch.cat(parts)
