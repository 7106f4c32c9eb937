"""However rows are cut into appends, and wherever a run is killed, a store ends with the same bytes and reads back."""

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmcr_hf.training.store import DTYPES, EmbeddingStore

DIM = 3


class Killed(BaseException):
    """Stand for the end of a process: nothing in the library catches it."""


def write(folder, rows, keys, cuts, dtype, shard_rows):
    """Append the rows that are missing, cut as told; runs may be cut differently."""
    description = {"space": "clip", "modality": "text", "source": {"id": "a", "revision": "b", "config_hash": "c"}}
    store = EmbeddingStore.create(
        folder, **description, dim=DIM, data_fingerprint="d", dtype=dtype, shard_rows=shard_rows
    )
    if store.complete:
        return
    # Between runs at most the rows of a shard may be lost.
    edges = sorted({store.rows, *(cut for cut in cuts if store.rows < cut < len(rows)), len(rows)})
    for start, end in pairwise(edges):
        store.append(rows[start:end], keys[start:end])
    store.finish()


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    shard_rows=st.integers(1, 13),
    dtype=st.sampled_from(sorted(DTYPES)),
    keys=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=12, max_size=12),
    runs=st.lists(st.tuples(st.lists(st.integers(0, 12), max_size=5), st.integers(0, 60)), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_cuts_kills_and_dtypes_do_not_change_the_bytes(rows, shard_rows, dtype, keys, runs, seed):
    embeds = F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)
    keys = keys[:rows]
    sync, syncs = os.fsync, [0]

    def killing(descriptor):
        sync(descriptor)
        syncs[0] -= 1
        if syncs[0] == 0:
            raise Killed

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        write(whole, embeds, keys, [], dtype, shard_rows)
        try:
            os.fsync = killing
            for cuts, syncs[0] in runs:
                try:
                    write(killed, embeds, keys, cuts, dtype, shard_rows)
                except Killed:
                    continue
        finally:
            os.fsync = sync
        write(killed, embeds, keys, [], dtype, shard_rows)
        assert content(killed) == content(whole)
        store = EmbeddingStore.open(killed)
        assert torch.equal(store.tensor(), embeds.to(DTYPES[dtype]))
        assert store.keys() == keys
        assert [len(shard) for shard in store.shards()][:-1] == [shard_rows] * (-(-rows // shard_rows) - 1)
