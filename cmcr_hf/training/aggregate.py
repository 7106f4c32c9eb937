"""Semantic consistency of C-MCR: a soft retrieval that gives every overlap item a pseudo leaf embedding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..cpu import float32_products, pool, products_in
from .store import EmbeddingStore

# Rows of queries and of memory whose scores are held at once. On a CPU they stay in the cache between the two products
# (4 MB in float32 for each core); elsewhere a larger product hides the cost of starting it.
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
    being copied) and, for every core that torch may use, scores of (query_block, memory_block). Computed on the device
    of the queries, in float32 (float64 if an input is). A cosine in float32 errs by about 1e-7 and its weight,
    relatively, by 1e-7 / temperature. While it runs, the process multiplies float32 matrices as `float32_products`
    says, whatever was set before.

    A row of the result has the same bits wherever it stands and however many cores there are, if queries are cut at
    multiples of query_block: see `rank_rows`. Several query sets over one memory are one call with
    `torch.cat(query_sets)`; several memories are as many calls, since no reading is saved by walking them together, as
    C-MCR's two (clip texts over images, clap texts over audio) are. Several values under one softmax are one call with
    values side by side, for Ex-MCR's `t^A` and `t^I` of audio (arXiv 2310.08884):

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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0.")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected torch.bfloat16 or None: leave it out for float32.")
    device = queries.device
    defaults = CPU_BLOCKS if device.type == "cpu" else DEVICE_BLOCKS
    query_block = defaults[0] if query_block is None else query_block
    memory_block = defaults[1] if memory_block is None else memory_block
    if query_block < 1 or memory_block < 1:
        raise ValueError(f"query_block is {query_block} and memory_block {memory_block}, expected at least 1.")
    _check_matrix("queries", queries)
    for rows in queries.split(query_block):
        _check_finite("queries", rows)
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
    # On a CPU every core takes query blocks of its own: no core waits for another within a product, and what is not a
    # product runs on all of them.
    cores = min(torch.get_num_threads(), -(-len(queries) // query_block)) if device.type == "cpu" else 1
    spare = [
        torch.empty(min(query_block, len(queries)) * memory_block, dtype=dtype, device=device) for _ in range(cores)
    ]
    add_block = _add_block if device.type == "cpu" else _add_block_unread

    def add(keys: Tensor, contribution: Tensor, is_first: bool, start: int) -> None:
        rows = slice(start, start + query_block)
        scores = spare.pop()
        # exp2 takes a third of the time of exp.
        block = (queries[rows].to(sums_dtype) * (math.log2(math.e) / temperature)).to(dtype)
        state = (reference[rows], total[rows], result[rows])
        for part in range(0, len(keys), memory_block):
            columns = slice(part, part + memory_block)
            add_block(block, keys[columns], contribution[columns], state, scores, is_first and part == 0)
        spare.append(scores)

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    read = _blocks(itertools.chain([first], pairs), READ_BLOCKS * memory_block, dtype, device, stream)
    # What is not on the CPU is asked at the end: an answer now would have the device wait for the host.
    finite = None if device.type == "cpu" else torch.ones((), dtype=torch.bool, device=device)
    starts = range(0, len(queries), query_block)
    # Under autocast the products would be rounded to bfloat16, an error of up to 0.4 in a score of 100.
    with (
        torch.autocast(device.type, enabled=False),
        products_in(float32_products()),
        _on_cores(cores) as each,
        closing(_read_ahead(read)) as blocks,
        tqdm(total=_rows(memory), unit="row", disable=not progress) as bar,
    ):
        is_first = True
        for keys, contribution in blocks if stream is None else _arrived(blocks, stream):
            shared = contribution is keys
            keys = keys.to(device, dtype)
            contribution = keys if shared else contribution.to(device, dtype)
            if finite is not None:
                finite &= keys.sum().isfinite() & contribution.sum().isfinite()
            each(partial(add, keys, contribution, is_first), starts)
            is_first = False
            bar.update(len(keys))
    if finite is not None and not finite:
        raise ValueError("memory or values hold NaN or infinity, expected finite embeddings: remove those rows.")
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
    within the product, before that is rounded: scores near the largest, which decide, then err least in bfloat16.

    Args:
        queries: scaled, so that scores are exponents of 2.
        state: reference and sum of weights, (rows, 1), weighted sum of the values, (rows, width); changed in place.
        scores: memory for the scores.
    """
    reference, total, average = state
    scores = scores[: len(queries) * len(keys)].view(len(queries), len(keys))
    torch.addmm(-reference.to(keys.dtype), queries, keys.T, out=scores)
    rise = scores.amax(dim=1, keepdim=True)
    # The rows whose reference is to follow: few, behind the first block.
    risen = (rise > (-math.inf if is_first else RISE)).flatten().nonzero().flatten()
    if len(risen):
        moved = (reference[risen] + rise[risen]).to(keys.dtype)
        change = moved - reference[risen]
        if keys.dtype == torch.bfloat16:
            scores[risen] = torch.addmm(-moved, queries[risen], keys.T)
        else:
            # Not multiplied anew: at scores above 1e6 the rounding of the product would outweigh the difference.
            scores[risen] -= change
        if not is_first:
            decay = torch.exp2(-change)
            total[risen] *= decay
            average[risen] *= decay
        reference[risen] = moved.to(reference.dtype)
    _add_weights(scores.exp2_(), values, total, average)


def _add_block_unread(
    queries: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor, Tensor, Tensor], scores: Tensor, is_first: bool
) -> None:
    """Add a block as [`_add_block`] does, where the host would wait for the device to learn which rows have risen.

    All rows are treated alike. In bfloat16, the scores of a row that rises by more than `RISE` behind the first block
    err by 2 ** -9 of the rise, within that block.
    """
    reference, total, average = state
    scores = scores[: len(queries) * len(keys)].view(len(queries), len(keys))
    torch.addmm(-reference.to(keys.dtype), queries, keys.T, out=scores)
    rise = scores.amax(dim=1, keepdim=True)
    moved = (reference + (rise if is_first else torch.where(rise > RISE, rise, 0))).to(keys.dtype)
    change = moved - reference
    if is_first and keys.dtype == torch.bfloat16:
        torch.addmm(-moved, queries, keys.T, out=scores)
    else:
        scores.sub_(change)
    if not is_first:
        decay = torch.exp2(-change)
        total.mul_(decay)
        average.mul_(decay)
    reference.copy_(moved)
    _add_weights(scores.exp2_(), values, total, average)


def _add_weights(weights: Tensor, values: Tensor, total: Tensor, average: Tensor) -> None:
    total.add_(weights.sum(dim=1, keepdim=True, dtype=total.dtype))
    if weights.dtype == average.dtype:
        average.addmm_(weights, values)
    else:
        average.add_(weights @ values)


@contextmanager
def _on_cores(cores: int) -> Iterator[Callable[[Callable[[int], None], Iterable[int]], None]]:
    """Give a function that calls another for each of some numbers: in threads of one core each, if there are several.

    Threads compute without gradients and in the inference mode that this one is in.
    """
    if cores < 2:

        def in_turn(call: Callable[[int], None], numbers: Iterable[int]) -> None:
            for number in numbers:
                call(number)

        yield in_turn
        return
    mode = torch.is_inference_mode_enabled()
    with pool(cores) as threads:

        def at_once(call: Callable[[int], None], numbers: Iterable[int]) -> None:
            def called(number: int) -> None:
                with torch.inference_mode(mode), torch.no_grad():
                    call(number)

            for _ in threads.map(called, numbers):
                pass

        yield at_once


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


def _blocks(
    pairs: Iterable[tuple[Tensor, Tensor]],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    stream: torch.cuda.Stream | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut shards into blocks of at most `rows`, those that are not on the device in `dtype`.

    Args:
        stream: that copies to CUDA go through, which are not waited for.
    """

    def copied(name: str, block: Tensor) -> Tensor:
        if device.type != "cpu" and block.device == device:
            return block
        # Memory of our own even where the dtype is right: files are read here and not by a product, which would also
        # round by the address that a file is mapped to.
        own = torch.empty(block.shape, dtype=dtype, pin_memory=stream is not None).copy_(block)
        if device.type == "cpu":
            _check_finite(name, own)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return own.to(device, non_blocking=stream is not None)

    for keys, contribution in pairs:
        for start in range(0, len(keys), rows):
            block = copied("memory", keys[start : start + rows].detach())
            same = contribution is keys
            yield block, block if same else copied("values", contribution[start : start + rows].detach())


def _read_ahead(blocks: Iterator[Any]) -> Generator[Any, None, None]:
    """Yield blocks while a thread reads the one that comes next."""
    with pool(1) as reader:
        waiting = reader.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = reader.submit(next, blocks, None)
            yield block


def _arrived(blocks: Iterable[tuple[Tensor, Tensor]], stream: torch.cuda.Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks once the work that is queued next will find them on CUDA; queue that of two blocks at most."""
    current = torch.cuda.current_stream(stream.device)
    queued: torch.cuda.Event | None = None
    for pair in blocks:
        current.wait_stream(stream)
        for block in pair:
            # Its memory is given to no later block before this work is done.
            block.record_stream(current)
        yield pair
        before, queued = queued, current.record_event()
        if before is not None:
            before.synchronize()


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


def _check_finite(name: str, rows: Tensor) -> None:
    if not _is_finite(rows):
        raise ValueError(f"{name} hold NaN or infinity, expected finite embeddings: remove those rows.")


def _is_finite(tensor: Tensor) -> bool:
    # The sum takes a fifth of the time, and is finite only where all numbers are.
    return bool(tensor.sum().isfinite()) or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
