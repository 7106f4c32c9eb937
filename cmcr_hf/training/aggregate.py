"""Semantic consistency of C-MCR: a soft retrieval that gives every overlap item a pseudo leaf embedding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..cpu import float32_products, products_in
from .store import EmbeddingStore

# Rows of queries and of memory whose scores are held at once. On a CPU they stay in the cache between the two products
# (4 MB in float32); elsewhere a larger product hides the cost of starting it.
CPU_BLOCKS = (512, 2048)
DEVICE_BLOCKS = (4096, 16384)
# Blocks of the memory that are read at once, so that the sums of a query block stay in the cache for as long.
READ_BLOCKS = 8
# How far, in powers of 2, a score may exceed the reference of its row before the reference follows. Far from overflow,
# and bfloat16 rounds scores as close to the reference by at most 2 ** -6.
RISE = 8.0


@torch.no_grad()
def aggregate(
    queries: Tensor,
    memory: Tensor | EmbeddingStore | Iterable[Tensor],
    values: Tensor | EmbeddingStore | Iterable[Tensor] | None = None,
    *,
    temperature: float = 0.01,
    dtype: torch.dtype | None = None,
    query_block: int | None = None,
    memory_block: int | None = None,
    normalize: bool = False,
    progress: bool = False,
) -> Tensor:
    """Average `values` with the weights softmax(queries memory^T / temperature) over the whole memory.

    C-MCR (arXiv 2305.14381), semantic consistency: `v_i = sum_k softmax_k(<t_i, v_k> / tau1) v_k`. The softmax is over
    all rows, computed block by block as the memory comes, in one pass for all queries: beside the result, three
    stretches of `READ_BLOCKS * memory_block` rows of the memory are held at most (one in use, one read ahead, one
    being copied) and scores of (query_block, memory_block). Computed on the device of the queries, in float32 (float64
    if an input is). A cosine in float32 errs by about 1e-7 and its weight, relatively, by 1e-7 / temperature. While it
    runs, the process multiplies float32 matrices as `float32_products` says, whatever was set before.

    A row of the result has the same bits wherever it stands, if queries are cut at multiples of query_block: see
    `rank_rows`. Several query sets over one memory are one call with `torch.cat(query_sets)`; several values under one
    softmax, one call with values side by side, for Ex-MCR's `t^A` and `t^I` of audio (arXiv 2310.08884):

        pairs = zip(clap_texts.shards(), clip_texts.shards(), strict=True)
        both = aggregate(audio, clap_texts, (torch.cat(pair, dim=1) for pair in pairs))
        clap_pseudo, clip_pseudo = both.split([clap_texts.dim, clip_texts.dim], dim=1)

    Args:
        queries: (n, dim), unit-norm, finite.
        memory: (m, dim), unit-norm, finite, m > 0; or a store or shards of it, read one after the other.
        values: (m, width), finite, row-aligned with the memory and in shards of the same row counts; the memory by
            default. Another matrix gives `softmax(a T_A / tau1) T_I`.
        dtype: `torch.bfloat16` multiplies in bfloat16 and sums in float32. That rounds the inputs, so it costs more
            the lower the temperature: a cosine to the exact result of .999 at 0.01 and 512 dimensions.
        query_block: rows of queries at a time, 512 on a CPU and 4096 elsewhere by default.
        memory_block: rows of the memory at a time, 2048 on a CPU and 16384 elsewhere by default.
        normalize: L2-normalise the result. The paper's equation does not, and the noise of semantic completion is
            followed by a normalisation of its own; yet adding noise to an average of norm below 1 turns it by a larger
            angle than a unit vector.

    Returns:
        (n, width), float32 (float64 if an input is and no dtype is named), on the device of the queries.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0.")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected torch.bfloat16 or None: leave it out for float32.")
    device = queries.device
    defaults = CPU_BLOCKS if device.type == "cpu" else DEVICE_BLOCKS
    query_block = defaults[0] if query_block is None else query_block
    memory_block = defaults[1] if memory_block is None else memory_block
    if query_block < 1 or memory_block < 1:
        raise ValueError(f"query_block is {query_block} and memory_block {memory_block}, expected at least 1.")
    _check_matrix("queries", queries)
    if not all(_is_finite(rows) for rows in queries.split(query_block)):
        raise ValueError("queries hold NaN or infinity, expected finite embeddings: remove those rows.")
    pairs = _pairs(memory, values, queries.shape[1])
    first = next(pairs, None)
    if first is None:
        raise ValueError("The memory is empty, expected at least one row: pass the embeddings of a leaf modality.")
    is_double = dtype is None and any(tensor.dtype == torch.float64 for tensor in (queries, *first))
    sums_dtype = torch.float64 if is_double else torch.float32
    dtype = dtype or sums_dtype

    result = torch.zeros(len(queries), first[1].shape[1], dtype=sums_dtype, device=device)
    total = torch.zeros(len(queries), 1, dtype=sums_dtype, device=device)
    reference = torch.zeros_like(total)
    scores = torch.empty(min(query_block, len(queries)) * memory_block, dtype=dtype, device=device)
    read = _blocks(itertools.chain([first], pairs), READ_BLOCKS * memory_block, dtype)
    bar = tqdm(total=_rows(memory), unit="row", disable=not progress)
    # Under autocast the products would be rounded to bfloat16, an error of up to 0.4 in a score of 100.
    with (
        torch.autocast(device.type, enabled=False),
        products_in(float32_products()),
        closing(_read_ahead(read)) as blocks,
        bar,
    ):
        is_first = True
        for keys, contribution in blocks:
            shared = contribution is keys
            keys = _moved("memory", keys, device, dtype)
            contribution = keys if shared else _moved("values", contribution, device, dtype)
            for start in range(0, len(queries), query_block):
                rows = slice(start, start + query_block)
                # exp2 takes a third of the time of exp.
                block = (queries[rows].to(sums_dtype) * (math.log2(math.e) / temperature)).to(dtype)
                state = (reference[rows], total[rows], result[rows])
                for part in range(0, len(keys), memory_block):
                    columns = slice(part, part + memory_block)
                    _add_block(block, keys[columns], contribution[columns], state, scores, is_first and part == 0)
            is_first = False
            bar.update(len(keys))
    result.div_(total)
    if not all(_is_finite(rows) for rows in result.split(query_block)):
        raise ValueError(
            f"Scores overflow at temperature {temperature}: use unit-norm inputs or a larger temperature."
        )
    return F.normalize(result, dim=1, out=result) if normalize else result


def rank_rows(rows: int, block: int, *, rank: int | None = None, world_size: int | None = None) -> range:
    """Return the rows that are a rank's when ranks share out whole blocks of rows, in order.

    Where blocks are multiples of `query_block` (shards of a store are), what `aggregate` gives for the queries of all
    ranks, one after the other, has the bits of one call for all of them. Where there are fewer blocks than ranks, some
    ranks have no row.

    Args:
        rank: from 0; by default this process's in `torch.distributed` if that is initialised, else the only one.
        world_size: number of ranks; named with rank or not at all.
    """
    if rows < 0 or block < 1:
        raise ValueError(f"rows is {rows} and block {block}, expected at least 0 and 1.")
    if rank is None and world_size is None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if grouped else (0, 1)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}, expected 0 <= rank < world_size: name both.")
    blocks = -(-rows // block)
    start, stop = (blocks * boundary // world_size * block for boundary in (rank, rank + 1))
    return range(min(start, rows), min(stop, rows))


def _add_block(
    queries: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor, Tensor, Tensor], scores: Tensor, is_first: bool
) -> None:
    """Add a block of the memory to the sums of a block of queries.

    Weights are 2 ** (score - reference), the reference of a row being near its largest score so far. It is subtracted
    within the product, before that is rounded: scores near the largest, which decide, then err least in bfloat16. No
    row's reference depends on the rows beside it.

    Args:
        queries: scaled, so that scores are exponents of 2.
        state: reference and sum of weights, (rows, 1), weighted sum of the values, (rows, width); changed in place.
        scores: memory for the scores.
    """
    reference, total, average = state
    scores = scores[: len(queries) * len(keys)].view(len(queries), len(keys))
    torch.addmm(-reference.to(keys.dtype), queries, keys.T, out=scores)
    rise = scores.amax(dim=1, keepdim=True)
    if is_first or bool((rise > RISE).any()):
        followed = rise if is_first else torch.where(rise > RISE, rise, 0)
        moved = (reference + followed).to(keys.dtype)
        change = moved - reference
        if keys.dtype == torch.bfloat16:
            torch.addmm(-moved, queries, keys.T, out=scores)
        else:
            # Not multiplied anew: at scores above 1e6 the rounding of the product would outweigh the difference.
            scores.sub_(change)
        if not is_first:
            decay = torch.exp2(-change)
            total.mul_(decay)
            average.mul_(decay)
        reference.copy_(moved)
    weights = scores.exp2_()
    total.add_(weights.sum(dim=1, keepdim=True, dtype=total.dtype))
    if weights.dtype == average.dtype:
        average.addmm_(weights, values)
    else:
        average.add_(weights @ values)


def _shards(source: Tensor | EmbeddingStore | Iterable[Tensor]) -> Iterator[Tensor]:
    if isinstance(source, Tensor):
        return iter([source])
    return source.shards() if isinstance(source, EmbeddingStore) else iter(source)


def _rows(source: Tensor | EmbeddingStore | Iterable[Tensor]) -> int | None:
    """Count the rows, None where only reading tells."""
    if isinstance(source, EmbeddingStore):
        return source.rows
    if isinstance(source, Tensor):
        return len(source)
    return sum(len(shard) for shard in source) if isinstance(source, list | tuple) else None


def _pairs(
    memory: Tensor | EmbeddingStore | Iterable[Tensor],
    values: Tensor | EmbeddingStore | Iterable[Tensor] | None,
    width: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each shard of the memory that has rows with that of its values, itself where there are none."""
    first: tuple[Tensor, Tensor] | None = None
    shards: Iterator[tuple[Tensor, Tensor]] = ((shard, shard) for shard in _shards(memory))
    if values is not None:
        shards = itertools.zip_longest(_shards(memory), _shards(values))
    for keys, contribution in shards:
        if keys is None or contribution is None:
            raise ValueError(
                "memory and values have different numbers of shards, expected the same: pass row-aligned embeddings, "
                "concatenated if they are cut differently."
            )
        first = first or (keys, contribution)
        _check_matrix("memory", keys, first[0])
        _check_matrix("values", contribution, first[1])
        if len(keys) != len(contribution):
            raise ValueError(
                f"memory has a shard of {len(keys)} rows and values of {len(contribution)}, expected the same: pass "
                "row-aligned embeddings, concatenated if they are cut differently."
            )
        if keys.shape[1] != width:
            raise ValueError(
                f"queries have width {width} and memory {keys.shape[1]}, expected one width: pass embeddings of one "
                "space."
            )
        if len(keys):
            yield keys, contribution


def _blocks(pairs: Iterable[tuple[Tensor, Tensor]], rows: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut shards into blocks of at most `rows`; on the CPU they are copied, into `dtype`."""

    def copied(block: Tensor) -> Tensor:
        # Memory of our own even where the dtype is right: files are read here and not by a product, which would also
        # round by the address that a file is mapped to.
        return block.to(dtype, copy=True) if block.device.type == "cpu" else block

    for keys, contribution in pairs:
        for start in range(0, len(keys), rows):
            block = copied(keys[start : start + rows].detach())
            same = contribution is keys
            yield block, block if same else copied(contribution[start : start + rows].detach())


def _read_ahead(blocks: Iterator[tuple[Tensor, Tensor]]) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield blocks while a thread reads the one that comes next."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = reader.submit(next, blocks, None)
            yield block


def _moved(name: str, block: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not _is_finite(block):
        raise ValueError(f"{name} hold NaN or infinity, expected finite embeddings: remove those rows.")
    return block.to(device, dtype)


def _check_matrix(name: str, tensor: Tensor, first: Tensor | None = None) -> None:
    first = tensor if first is None else first
    if (
        tensor.ndim != 2
        or not tensor.is_floating_point()
        or tensor.shape[1] != first.shape[1]
        or tensor.dtype != first.dtype
    ):
        raise ValueError(
            f"{name} hold a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, expected floating-point matrices of "
            "one width and dtype."
        )


def _is_finite(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
