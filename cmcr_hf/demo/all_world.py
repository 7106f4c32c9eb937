"""Write the world of all modalities: pictures, sounds, clouds and texts of things that look, sound and stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .captions import concept_phrase, text
from .retrain_all import drawn_or_rendered
from .shapes_world import write_clouds
from .sounding_solids import BUILDERS, sample_cloud
from .world import distinct, distinct_texts, write_described, write_pictures, write_sounds, write_table

# Raise it with every change of what a seed gives.
GENERATOR_VERSION = 1


def write_all_world(
    folder: Path,
    *,
    seed: int = 0,
    images: int = 60,
    sounds: int = 60,
    clouds: int = 60,
    texts: int = 120,
    test_images: int = 20,
    test_sounds: int = 20,
    test_clouds: int = 20,
    test_texts: int = 20,
) -> Path:
    """Write the world of all modalities, or keep the complete one of the same description; counts are for a concept.

    Layout: `images/<concept>/0000.png`, half of them drawn and half rendered, `sounds` (.wav) and `clouds` (.npy)
    alike, the same under `test_images`, `test_sounds` and `test_clouds`, `texts.csv`, `test_texts.csv` and `names.csv`
    (columns text, concept), and `world.json`. No two items of two modalities are of one thing. Streams, dates,
    durability and errors are those of `write_world`.

    Returns the folder.
    """
    counts = {
        "images": images,
        "sounds": sounds,
        "clouds": clouds,
        "texts": texts,
        "test_images": test_images,
        "test_sounds": test_sounds,
        "test_clouds": test_clouds,
        "test_texts": test_texts,
    }
    return write_described(
        folder, _write_items, version=GENERATOR_VERSION, seed=seed, concepts=list(BUILDERS), counts=counts
    )


def _write_items(folder: Path, seed: int, counts: dict[str, int]) -> None:
    writers: dict[str, Callable[..., None]] = {
        "images": partial(write_pictures, drawn_or_rendered),
        "sounds": write_sounds,
        "clouds": partial(write_clouds, sample_cloud),
    }
    memory, tests = [], []
    for concept in tqdm(BUILDERS, desc="Writing the synthetic world", unit="concept"):
        for split in ("", "test_"):
            for kind, write in writers.items():
                name = f"{split}{kind}"
                write(folder / name / concept, concept, counts[name], seed=seed, split=name)
        lines = distinct_texts(concept, counts["texts"], seed=seed)
        memory += [(line, concept) for line in lines]
        # Others than those that connect: the two come from the same templates.
        more = distinct(text, concept, counts["test_texts"] + len(lines), seed=seed, split="test_texts")
        tests += [(line, concept) for line in more if line not in set(lines)][: counts["test_texts"]]
    write_table(folder / "texts.csv", memory)
    write_table(folder / "test_texts.csv", tests)
    write_table(folder / "names.csv", [(concept_phrase(concept), concept) for concept in BUILDERS])
