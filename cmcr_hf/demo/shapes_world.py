"""Write the shapes world to a folder: pictures, point clouds and texts of each kind, and test sets of their own."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .shape_captions import held_out_text, kind_phrase, memory_text
from .solids import KINDS, render, sample_cloud
from .world import distinct, stream, write_described, write_pictures, write_table

# Raise it with every change of what a seed gives.
GENERATOR_VERSION = 1


def write_shapes_world(
    folder: Path,
    *,
    seed: int = 0,
    images: int = 200,
    clouds: int = 60,
    texts: int = 60,
    test_images: int = 20,
    test_clouds: int = 20,
    test_texts: int = 20,
) -> Path:
    """Write the shapes world, or keep the complete one of the same description; counts are for each kind.

    Layout: `images/<kind>/0000.png` (64 x 64 RGB), `clouds/<kind>/0000.npy` ((512, 3) float32, y up), the same under
    `test_images` and `test_clouds`, `texts.csv`, `test_texts.csv` and `names.csv` (columns text, concept), and
    `world.json`. No picture shows a thing that a cloud scans. Streams, dates, durability and errors are those of
    `write_world`.

    Returns the folder.
    """
    counts = {
        "images": images,
        "clouds": clouds,
        "texts": texts,
        "test_images": test_images,
        "test_clouds": test_clouds,
        "test_texts": test_texts,
    }
    return write_described(
        folder, _write_items, version=GENERATOR_VERSION, seed=seed, concepts=list(KINDS), counts=counts
    )


def _write_items(folder: Path, seed: int, counts: dict[str, int]) -> None:
    for kind in tqdm(KINDS, desc="Writing the synthetic shapes world", unit="kind"):
        for split in ("images", "test_images"):
            write_pictures(render, folder / split / kind, kind, counts[split], seed=seed, split=split)
        for split in ("clouds", "test_clouds"):
            write_clouds(sample_cloud, folder / split / kind, kind, counts[split], seed=seed, split=split)
    for split, say in (("texts", memory_text), ("test_texts", held_out_text)):
        rows = [(line, kind) for kind in KINDS for line in distinct(say, kind, counts[split], seed=seed, split=split)]
        write_table(folder / f"{split}.csv", rows)
    write_table(folder / "names.csv", [(kind_phrase(kind), kind) for kind in KINDS])


def write_clouds(
    sample: Callable[[str, np.random.Generator], np.ndarray],
    folder: Path,
    kind: str,
    count: int,
    *,
    seed: int,
    split: str,
) -> None:
    """Make a folder of the clouds of one kind, each of its own stream: `0000.npy` and on."""
    folder.mkdir(parents=True)
    for index in range(count):
        # By way of memory: on a full disk numpy's own writing to a file does not name the cause.
        array = io.BytesIO()
        np.save(array, sample(kind, stream(seed, split, kind, index)), allow_pickle=False)
        (folder / f"{index:04d}.npy").write_bytes(array.getvalue())
