"""Semantic consistency of C-MCR: a soft retrieval that gives every overlap item a pseudo leaf embedding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm


@torch.no_grad()
def aggregate(
    queries: Tensor,
    memory: Tensor | Iterable[Tensor],
    values: Tensor | Iterable[Tensor] | None = None,
    *,
    temperature: float = 0.01,
    query_block: int = 4096,
    memory_block: int = 16384,
    normalize: bool = False,
    progress: bool = False,
) -> Tensor:
    """Average `values` with the weights softmax(queries memory^T / temperature) over the whole memory.

    C-MCR (arXiv 2305.14381), semantic consistency: `v_i = sum_k softmax_k(<t_i, v_k> / tau1) v_k`. The softmax is over
    all rows, computed block by block with a running maximum and sum: no temporary is larger than (query_block,
    memory_block) or a block of rows. Blocks of the memory are moved to the device of the queries, where everything is
    computed, in float32 (float64 if an input is). A cosine in float32 errs by about 1e-7 and its weight, relatively,
    by 1e-7 / temperature; `torch.set_float32_matmul_precision` below "highest" adds to that.

    Args:
        queries: (n, dim), unit-norm, finite.
        memory: (m, dim), unit-norm, finite, m > 0; or shards of it, one after the other.
        values: (m, width), finite, row-aligned with the memory and in shards of the same row counts; the memory by
            default. Another matrix gives `softmax(a T_A / tau1) T_I`.
        normalize: L2-normalise the result. The paper's equation does not, and the noise of semantic completion is
            followed by a normalisation of its own; yet adding noise to an average of norm below 1 turns it by a larger
            angle than a unit vector.

    Returns:
        (n, width), float32 (float64 if an input is), on the device of the queries.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0.")
    if query_block < 1 or memory_block < 1:
        raise ValueError(f"query_block is {query_block} and memory_block {memory_block}, expected at least 1.")
    memory_shards = [memory] if isinstance(memory, Tensor) else list(memory)
    value_shards = memory_shards
    if values is not None:
        value_shards = [values] if isinstance(values, Tensor) else list(values)
    _check(queries, memory_shards, value_shards, memory_block)

    inputs = [queries, *memory_shards, *value_shards]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in inputs) else torch.float32
    device = queries.device
    result = torch.empty(len(queries), value_shards[0].shape[1], dtype=dtype, device=device)
    # Under autocast the products would be rounded to bfloat16, an error of up to 0.4 in a score of 100.
    with torch.autocast(device.type, enabled=False), tqdm(total=len(queries), disable=not progress) as bar:
        for start in range(0, len(queries), query_block):
            block = queries[start : start + query_block].to(dtype) / temperature
            maximum = torch.full((len(block), 1), -torch.inf, dtype=dtype, device=device)
            total = torch.zeros_like(maximum)
            average = torch.zeros(len(block), result.shape[1], dtype=dtype, device=device)
            for memory_shard, value_shard in zip(memory_shards, value_shards, strict=True):
                for row in range(0, len(memory_shard), memory_block):
                    keys = memory_shard[row : row + memory_block].to(device, dtype)
                    scores = block @ keys.T
                    new_maximum = torch.maximum(maximum, scores.amax(dim=1, keepdim=True))
                    decay = (maximum - new_maximum).exp_()
                    weights = scores.sub_(new_maximum).exp_()
                    total.mul_(decay).add_(weights.sum(dim=1, keepdim=True))
                    contribution = keys
                    if value_shard is not memory_shard:
                        contribution = value_shard[row : row + memory_block].to(device, dtype)
                    average.mul_(decay).addmm_(weights, contribution)
                    maximum = new_maximum
            result[start : start + query_block] = average / total
            bar.update(len(block))
    if not _is_finite(result, query_block):
        raise ValueError(
            f"Scores overflow at temperature {temperature}: use unit-norm inputs or a larger temperature."
        )
    return F.normalize(result, dim=1) if normalize else result


def _check(queries: Tensor, memory_shards: list[Tensor], value_shards: list[Tensor], block: int) -> None:
    for name, tensors in (("queries", [queries]), ("memory", memory_shards), ("values", value_shards)):
        for tensor in tensors:
            if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.shape[1] != tensors[0].shape[1]:
                raise ValueError(
                    f"{name} hold a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, expected floating-point "
                    "matrices of one width."
                )
    if sum(len(shard) for shard in memory_shards) == 0:
        raise ValueError("The memory is empty, expected at least one row: pass the embeddings of a leaf modality.")
    if queries.shape[1] != memory_shards[0].shape[1]:
        raise ValueError(
            f"queries have width {queries.shape[1]} and memory {memory_shards[0].shape[1]}, expected one width: "
            "pass embeddings of one space."
        )
    rows = [len(shard) for shard in memory_shards]
    value_rows = [len(shard) for shard in value_shards]
    if rows != value_rows:
        raise ValueError(
            f"memory has shards of {rows[:5]} rows and values of {value_rows[:5]} (at most five shown), expected the "
            "same: pass row-aligned embeddings, concatenated if they are cut differently."
        )
    for name, tensors in (("queries", [queries]), ("memory", memory_shards), ("values", value_shards)):
        if name == "values" and value_shards is memory_shards:
            continue
        if not all(_is_finite(tensor, block) for tensor in tensors):
            raise ValueError(f"{name} hold NaN or infinity, expected finite embeddings: remove those rows.")


def _is_finite(tensor: Tensor, block: int) -> bool:
    # In blocks: on a memory-mapped matrix the temporary copies of torch.isfinite would be as large as the file.
    return all(bool(rows.isfinite().all()) for rows in torch.split(tensor, block))
