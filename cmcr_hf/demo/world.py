"""Write the synthetic world to a folder: pictures, sounds and texts of each concept, and test sets of their own."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from ..durable import locked, replacement
from .captions import concept_phrase, text
from .concepts import CONCEPTS
from .drawing import draw
from .synthesis import SAMPLING_RATE, synthesise

# Raise it with every change of what a seed gives.
GENERATOR_VERSION = 1
_MARKER = "world.json"
# The start of 2025 in seconds: the files of a world are dated within half a year from it, by its description.
_EPOCH = 1735689600


def stream(seed: int, split: str, concept: str, index: int) -> np.random.Generator:
    """Return the random stream of one item; streams of other seeds, splits, concepts or indices are independent."""
    key = (zlib.crc32(split.encode()), zlib.crc32(concept.encode()), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def distinct_texts(concept: str, count: int, *, seed: int, split: str = "texts") -> list[str]:
    """Return `count` different texts of a concept: the first occurrences in the order of the index."""
    return distinct(text, concept, count, seed=seed, split=split)


def distinct(
    say: Callable[[str, np.random.Generator], str], concept: str, count: int, *, seed: int, split: str
) -> list[str]:
    """Return `count` different sentences that `say` makes: the first occurrences in the order of the index."""
    sentences: dict[str, None] = {}
    # A concept has some thousands of sentences, so a short run of indices is enough unless `count` is near that.
    for index in range(50 * count + 1000):
        if len(sentences) == count:
            return list(sentences)
        sentences.setdefault(say(concept, stream(seed, split, concept, index)))
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
    function of seed, split, concept and index alone, and its change time one of the description, so that a world that
    is written again counts as the same data. The folder appears complete or not at all. ValueError, and nothing is
    touched, if the folder holds a world of another description or anything else, or if another process uses the
    folder above it; OSError if the disk is full or not writable.

    Returns the folder.
    """
    counts = {
        "images": images,
        "sounds": sounds,
        "texts": texts,
        "test_images": test_images,
        "test_sounds": test_sounds,
    }
    return write_described(
        folder, _write_items, version=GENERATOR_VERSION, seed=seed, concepts=list(CONCEPTS), counts=counts
    )


def write_described(
    folder: Path,
    write_items: Callable[[Path, int, dict[str, int]], None],
    *,
    version: int,
    seed: int,
    concepts: list[str],
    counts: dict[str, int],
) -> Path:
    """Write a world and the marker that describes it, or keep the complete one of the same description.

    `write_items(new, seed, counts)` fills the new folder. Errors are those of `write_world`.

    Returns the folder.
    """
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected at least one item of {split} a concept, got {count}. Pass {split}=1 or more.")
    description = {
        "generator_version": version,
        "seed": seed,
        "concepts": concepts,
        "counts": counts,
        "synthetic": True,
    }
    folder = Path(folder)
    if _is_there(folder, description):
        return folder
    with locked(folder.parent):
        # Again: another process may have written it since.
        if not _is_there(folder, description):
            _write(folder, description, lambda new: write_items(new, seed, counts))
    return folder


def _is_there(folder: Path, description: dict[str, object]) -> bool:
    """Tell a complete world from an absent one; ValueError where there is something else."""
    marker = folder / _MARKER
    if marker.is_file():
        if marker.read_text(encoding="utf-8") == _described(description):
            return True
        raise ValueError(f"{folder} holds a world of another description. Pass another folder, or delete this one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected {folder} to be absent, empty or a world, got other files. Pass another folder.")
    return False


def _write(folder: Path, description: dict[str, object], write_items: Callable[[Path], None]) -> None:
    # Behind it the marker vouches for files on the disk.
    with replacement(folder) as new:
        write_items(new)
        (new / _MARKER).write_bytes(_described(description).encode())
        digest = hashlib.sha256(_described(description).encode()).hexdigest()
        time = _EPOCH + int(digest[:6], 16)
        for path in new.rglob("*.*"):
            os.utime(path, (time, time))


def _described(description: dict[str, object]) -> str:
    return json.dumps(description, indent=2) + "\n"


def _write_items(folder: Path, seed: int, counts: dict[str, int]) -> None:
    for concept in tqdm(CONCEPTS, desc="Writing the synthetic world", unit="concept"):
        for split in ("images", "test_images"):
            write_pictures(draw, folder / split / concept, concept, counts[split], seed=seed, split=split)
        for split in ("sounds", "test_sounds"):
            write_sounds(folder / split / concept, concept, counts[split], seed=seed, split=split)
    texts = [(line, concept) for concept in CONCEPTS for line in distinct_texts(concept, counts["texts"], seed=seed)]
    write_table(folder / "texts.csv", texts)
    write_table(folder / "names.csv", [(concept_phrase(concept), concept) for concept in CONCEPTS])


def write_pictures(
    picture: Callable[[str, np.random.Generator], Image.Image],
    folder: Path,
    concept: str,
    count: int,
    *,
    seed: int,
    split: str,
) -> None:
    """Make a folder of the pictures of one concept, each of its own stream: `0000.png` and on."""
    folder.mkdir(parents=True)
    for index in range(count):
        picture(concept, stream(seed, split, concept, index)).save(folder / f"{index:04d}.png", compress_level=1)


def write_sounds(folder: Path, concept: str, count: int, *, seed: int, split: str) -> None:
    """Make a folder of the sounds of one concept, each of its own stream: `0000.wav` and on."""
    folder.mkdir(parents=True)
    for index in range(count):
        samples = synthesise(concept, stream(seed, split, concept, index))
        # By way of memory: on a full disk soundfile fails an assertion of its own.
        wave = io.BytesIO()
        soundfile.write(wave, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
        (folder / f"{index:04d}.wav").write_bytes(wave.getvalue())


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write a table of the columns text and concept."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("text", "concept"))
    writer.writerows(rows)
    path.write_bytes(table.getvalue().encode())
