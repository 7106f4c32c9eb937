import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.training.aggregate_stores import aggregate_stores
from cmcr_hf.training.pools import pool_stores
from cmcr_hf.training.recipe import Bridge
from cmcr_hf.training.store import EmbeddingStore

# Of each space, the width.
WIDTHS = {"clip": 6, "clap": 4, "ulip": 5}
ROWS = {"text": 20, "image": 12, "audio": 9, "point_cloud": 7}
TAU = 0.2


def store_of(folder, space, modality):
    rows = torch.randn(ROWS[modality], WIDTHS[space], generator=torch.Generator().manual_seed(len(space + modality)))
    store = EmbeddingStore.create(
        folder / f"{space}-{modality}",
        space=space,
        modality=modality,
        source={"id": space, "revision": "abc", "config_hash": "0"},
        dim=WIDTHS[space],
        data_fingerprint=modality,
    )
    store.append(F.normalize(rows, dim=-1), [f"{modality}{row}" for row in range(len(rows))])
    store.finish()
    return store


def soft(queries, memory, values):
    """Return the unit mean of values under softmax(queries memory^T / tau), in float64."""
    return F.normalize(torch.softmax(queries @ memory.T / TAU, dim=1) @ values, dim=-1)


def pool_of(folder, bridge, pool):
    native = {
        (space, modality): store_of(folder, space, modality)
        for space, leaf in bridge.leaves.items()
        for modality in (bridge.overlap, leaf)
    }
    count = iter(range(9))

    def aggregated(queries, memory, values):
        return aggregate_stores(queries, memory, folder / f"pseudo{next(count)}", values=values, temperature=TAU)

    stores = pool_stores(bridge, pool, native, aggregated)
    assert {tuple(store.keys()) for store in stores} == {tuple(f"{pool}{row}" for row in range(ROWS[pool]))}
    rows = {name: store.tensor().double() for name, store in native.items()}
    return {(store.space, store.modality): store.tensor().double() for store in stores}, rows


TEXT = Bridge("clap", "text", ("text", "image", "audio"))


def test_a_pool_of_the_overlap_has_native_overlaps_and_pseudo_leaves(tmp_path):
    found, native = pool_of(tmp_path, TEXT, "text")
    assert list(found) == [("clip", "text"), ("clap", "text"), ("clip", "image"), ("clap", "audio")]
    for space, leaf in TEXT.leaves.items():
        texts, memory = native[space, "text"], native[space, leaf]
        torch.testing.assert_close(found[space, "text"], texts)
        torch.testing.assert_close(found[space, leaf], soft(texts, memory, memory), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("bridge", "pool", "near", "far"),
    [
        (TEXT, "audio", "clap", "clip"),
        (TEXT, "image", "clip", "clap"),
        (Bridge("ulip", "image", ()), "point_cloud", "ulip", "clip"),
        (Bridge("ulip", "image", ()), "text", "clip", "ulip"),
    ],
)
def test_a_pool_of_a_leaf_finds_the_overlap_in_both_spaces_and_the_far_leaf_by_it(tmp_path, bridge, pool, near, far):
    found, native = pool_of(tmp_path, bridge, pool)
    overlap, leaf = bridge.overlap, bridge.leaves[far]
    assert [modality for _, modality in found] == [overlap, overlap, *bridge.leaves.values()]
    queries, bank, memory = native[near, pool], native[near, overlap], native[far, leaf]
    torch.testing.assert_close(found[near, pool], queries)
    torch.testing.assert_close(found[near, overlap], soft(queries, bank, bank), atol=1e-5, rtol=0)
    carried = soft(queries, bank, native[far, overlap])
    torch.testing.assert_close(found[far, overlap], carried, atol=1e-5, rtol=0)
    # Of unit length before the second softmax, which a shorter mean would make flatter.
    torch.testing.assert_close(found[far, leaf], soft(carried, memory, memory), atol=1e-5, rtol=0)
