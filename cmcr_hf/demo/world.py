"""Write the synthetic world to a folder: pictures, sounds and texts of each concept, and test sets of their own."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from .captions import concept_phrase, text
from .concepts import CONCEPTS
from .drawing import draw
from .synthesis import SAMPLING_RATE, synthesise

# Raise it with every change of what a seed gives.
GENERATOR_VERSION = 1
_MARKER = "world.json"


def stream(seed: int, split: str, concept: str, index: int) -> np.random.Generator:
    """Return the random stream of one item; streams of other seeds, splits, concepts or indices are independent."""
    key = (zlib.crc32(split.encode()), zlib.crc32(concept.encode()), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def distinct_texts(concept: str, count: int, *, seed: int, split: str = "texts") -> list[str]:
    """Return `count` different texts of a concept: the first occurrences in the order of the index."""
    texts: dict[str, None] = {}
    # A concept has some thousands of texts, so a short run of indices is enough unless `count` is near that.
    for index in range(50 * count + 1000):
        if len(texts) == count:
            return list(texts)
        texts.setdefault(text(concept, stream(seed, split, concept, index)))
    raise ValueError(f"Expected a count of texts that {concept!r} has, got {count}. Ask for fewer texts a concept.")


def write_world(
    folder: Path,
    *,
    seed: int = 0,
    images: int = 60,
    sounds: int = 60,
    texts: int = 250,
    test_images: int = 20,
    test_sounds: int = 20,
) -> Path:
    """Write the world, or keep the complete one of the same description that is there; counts are for each concept.

    Layout: `images/<concept>/0000.png`, `sounds/<concept>/0000.wav` (16 kHz, PCM16), the same under `test_images` and
    `test_sounds`, `texts.csv` and `names.csv` (columns text, concept), and `world.json`. Every picture and sound is a
    function of seed, split, concept and index alone. The folder appears complete or not at all. ValueError,
    and nothing is touched, if the folder holds a world of another description or anything else.

    Returns the folder.
    """
    counts = {
        "images": images,
        "sounds": sounds,
        "texts": texts,
        "test_images": test_images,
        "test_sounds": test_sounds,
    }
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected at least one item of {split} a concept, got {count}. Pass {split}=1 or more.")
    description = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "concepts": list(CONCEPTS),
        "counts": counts,
        "synthetic": True,
    }
    folder = Path(folder)
    marker = folder / _MARKER
    if marker.is_file():
        if marker.read_text(encoding="utf-8") == _described(description):
            return folder
        raise ValueError(f"{folder} holds a world of another description. Pass another folder, or delete this one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected {folder} to be absent, empty or a world, got other files. Pass another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        temporary.chmod(0o755)
        new = temporary / "new"
        _write_items(new, seed, counts)
        for path in new.rglob("*.*"):
            # Pillow and soundfile close what they write without fsync; the marker is to vouch for files on the disk.
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _write_text(new / _MARKER, _described(description))
        # Onto an empty folder or none.
        new.rename(folder)
    finally:
        shutil.rmtree(temporary)
    return folder


def _described(description: dict[str, object]) -> str:
    return json.dumps(description, indent=2) + "\n"


def _write_items(folder: Path, seed: int, counts: dict[str, int]) -> None:
    for concept in tqdm(CONCEPTS, desc="Writing the synthetic world", unit="concept"):
        for split in ("images", "test_images"):
            (folder / split / concept).mkdir(parents=True)
            for index in range(counts[split]):
                picture = draw(concept, stream(seed, split, concept, index))
                picture.save(folder / split / concept / f"{index:04d}.png", compress_level=1)
        for split in ("sounds", "test_sounds"):
            (folder / split / concept).mkdir(parents=True)
            for index in range(counts[split]):
                samples = synthesise(concept, stream(seed, split, concept, index))
                path = folder / split / concept / f"{index:04d}.wav"
                soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")
    texts = [(line, concept) for concept in CONCEPTS for line in distinct_texts(concept, counts["texts"], seed=seed)]
    _write_csv(folder / "texts.csv", texts)
    _write_csv(folder / "names.csv", [(concept_phrase(concept), concept) for concept in CONCEPTS])


def _write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("text", "concept"))
    writer.writerows(rows)
    _write_text(path, table.getvalue())


def _write_text(path: Path, content: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
