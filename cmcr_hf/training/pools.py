"""Pools of row-aligned embeddings, each centred on the data of one modality (arXiv 2310.08884)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from .recipe import Bridge

# Embeddings in whatever form they are kept: stores, or tensors.
Rows = TypeVar("Rows")


def pool_stores(
    bridge: Bridge,
    pool: str,
    native: Mapping[tuple[str, str], Rows],
    aggregated: Callable[[Rows, Rows, Rows | None], Rows],
) -> list[Rows]:
    """Return four stores, a row an item of the pool's modality: the overlap in both spaces, then both leaves.

    Centred on the overlap, the leaves are pseudo embeddings (equation 1 of C-MCR). Centred on a leaf, a say, the items
    of the overlap in both spaces are averaged under one softmax, since their stores are row-aligned, and what comes of
    it in the far space finds the far leaf:

        t_near = softmax(a T_near / tau) T_near,  t_far = softmax(a T_near / tau) T_far,  v = softmax(t_far V / tau) V

    t_far has unit length before the second softmax, as every query there has: the mean of some unit vectors is
    shorter, so that its softmax would be as if at a higher temperature.

    Args:
        native: the stores of the data, by space and modality.
        aggregated: makes or finds the store of pseudo embeddings of queries over a memory, averaging its values where
            they are not None, of rows of unit length.
    """
    clip, other = bridge.spaces
    overlap, leaves = bridge.overlap, bridge.leaves
    banks = {space: native[space, overlap] for space in bridge.spaces}
    if pool == overlap:
        pseudo = [aggregated(banks[space], native[space, leaves[space]], None) for space in bridge.spaces]
        return [*banks.values(), *pseudo]
    near, far = (clip, other) if pool == leaves[clip] else (other, clip)
    queries = native[near, pool]
    stores = {
        (near, overlap): aggregated(queries, banks[near], None),
        (far, overlap): aggregated(queries, banks[near], banks[far]),
        (near, pool): queries,
    }
    stores[far, leaves[far]] = aggregated(stores[far, overlap], native[far, leaves[far]], None)
    return [*(stores[space, overlap] for space in bridge.spaces), *(stores[leaf] for leaf in leaves.items())]
