"""Real data of the benchmark: images and log-mels with labels, texts without, and what is held back of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

IMAGE_SIZE = 64
# One image in this many is held back.
HELD_BACK_SHARE = 5
TRAINING_FOLDS, HELD_BACK_FOLD = (1, 2, 3), 5
FILES = (
    "concepts.json",
    "images/images_train.csv",
    "images/images_train.zip",
    "audio/esc50_logmel_folds1235.npz",
    "text/audiocaps_train.csv",
    "text/clotho_train.csv",
    "text/flickr8k_4500captions.json",
    "text/audioset_labels.json",
    "text/audioset_ontology.json",
    "text/fsd50k_labels.json",
    "text/imagenet_classes.json",
    "text/lvis_names.json",
    "text/vggsound_labels.json",
)


@dataclass
class Items:
    """Labelled items of one modality.

    Args:
        keys: file names.
        values: uint8, images `(n, 3, 64, 64)` or log-mels `(n, 1, 64, 248)`.
        classes: index of each item's class, int64.
        concepts: concept of each item, empty where it has none.
    """

    keys: list[str]
    values: torch.Tensor
    classes: torch.Tensor
    concepts: list[str]

    def rows(self, chosen: list[int]) -> Items:
        return Items(
            [self.keys[row] for row in chosen],
            self.values[chosen],
            self.classes[chosen],
            [self.concepts[row] for row in chosen],
        )


@dataclass
class Modality:
    """Training items, held-back items, and the label and the concept (or "") of every class."""

    training: Items
    held_back: Items
    labels: list[str]
    class_concepts: list[str]


@dataclass
class Texts:
    """Real texts without any link to an item: captions of sounds and of images, labels, and encyclopedic sentences."""

    sound_captions: list[str]
    image_captions: list[str]
    labels: list[str]
    sentences: list[str]


def check_data(folder: Path) -> None:
    """Raise ValueError naming the first file that is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"There is no file {folder / name}. Give --data the folder that holds {FILES[0]}.")


def is_held_back(name: str) -> bool:
    """Tell whether an image is held back: by the sha256 of its file name alone, whatever else is in the folder."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_BACK_SHARE == 0


def read_concepts(folder: Path) -> dict[str, list[str]]:
    """Return the classes of ESC-50 of every concept."""
    concepts = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    return {name: [label.replace("_", " ") for label in concept["esc50"]] for name, concept in concepts.items()}


def read_images(folder: Path) -> Modality:
    """Read the images; held back is a share of those that have a concept, all others are for training."""
    with (folder / "images/images_train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys((row["label_text"], row["concept"]) for row in rows))
    index = {name: number for number, name in enumerate(names)}
    values = torch.empty(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    with zipfile.ZipFile(folder / "images/images_train.zip") as archive:
        for row, record in enumerate(tqdm(rows, desc="read images", unit="image")):
            with Image.open(io.BytesIO(archive.read(record["file"]))) as image:
                values[row] = _square(image)
    items = Items(
        [row["file"] for row in rows],
        values,
        torch.tensor([index[row["label_text"], row["concept"]] for row in rows]),
        [row["concept"] for row in rows],
    )
    held_back = [row for row, key in enumerate(items.keys) if items.concepts[row] and is_held_back(key)]
    training = sorted(set(range(len(rows))) - set(held_back))
    return Modality(
        items.rows(training), items.rows(held_back), [label for label, _ in names], [name for _, name in names]
    )


def _square(image: Image.Image) -> torch.Tensor:
    """Scale the shorter side to 64 pixels and cut the middle out of the longer one: `(3, 64, 64)` uint8."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_sounds(folder: Path) -> Modality:
    """Read the log-mels of ESC-50: folds 1 to 3 for training, fold 5 held back."""
    with np.load(folder / "audio/esc50_logmel_folds1235.npz", allow_pickle=False) as arrays:
        labels = [str(name).replace("_", " ") for name in arrays["categories"]]
        folds = arrays["fold"].tolist()
        values = torch.from_numpy(arrays["X"])[:, None]
        targets = torch.from_numpy(arrays["target"].astype(np.int64))
        keys = [str(name) for name in arrays["clip"]]
    concept_of = {label: concept for concept, names in read_concepts(folder).items() for label in names}
    class_concepts = [concept_of.get(label, "") for label in labels]
    items = Items(keys, values, targets, [class_concepts[target] for target in targets.tolist()])
    training = [row for row, fold in enumerate(folds) if fold in TRAINING_FOLDS]
    held_back = [row for row, fold in enumerate(folds) if fold == HELD_BACK_FOLD]
    return Modality(items.rows(training), items.rows(held_back), labels, class_concepts)


def read_texts(folder: Path) -> Texts:
    """Read the texts, each once, in the order of the files."""
    text = folder / "text"
    with (text / "audiocaps_train.csv").open(newline="", encoding="utf-8") as file:
        audiocaps = [row["caption"] for row in csv.DictReader(file)]
    with (text / "clotho_train.csv").open(newline="", encoding="utf-8") as file:
        clotho = [row[f"caption_{number}"] for row in csv.DictReader(file) for number in range(1, 6)]
    flickr = json.loads((text / "flickr8k_4500captions.json").read_text(encoding="utf-8"))
    names = ("audioset_labels", "fsd50k_labels", "vggsound_labels", "imagenet_classes", "lvis_names")
    labels = [label for name in names for label in json.loads((text / f"{name}.json").read_text(encoding="utf-8"))]
    ontology = json.loads((text / "audioset_ontology.json").read_text(encoding="utf-8"))
    sentences = [f"{entry['name']}: {entry['description']}" for entry in ontology]
    return Texts(*(list(dict.fromkeys(part)) for part in (audiocaps + clotho, flickr, labels, sentences)))
