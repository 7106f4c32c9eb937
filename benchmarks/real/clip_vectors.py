"""Real CLIP ViT-B/32 vectors and the small audio-text source: their names connect photographs with sounds.

The image space is the real CLIP's: vectors of 500 photographs of Flickr8k and of "a NAME" for the names of four
detection data sets, in a folder `embeddings` beside the other data. The audio space is the small source that
benchmarks.real_retrieval trains, which embeds the same names. A photograph shows a sound where a word of its caption
says so, which no method sees: the score is the area under the ROC curve of the photographs that do, the mean over the
clips of a sound, and over the sounds. Each half of the photographs, by a hash of their number, is ranked by a
connector that trained on the other half.

    python -m benchmarks.real.clip_vectors --data ../shared/data --output runs/real_retrieval/clip_vectors.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

from benchmarks.real.data import check_data, read_sounds
from benchmarks.real.sources import embed_items, embed_texts, load_source
from benchmarks.real_retrieval import SOURCES, prepare, sources_folder
from benchmarks.timing import machine
from cmcr_hf import CMCRConfig
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.evaluation.baselines import one_way_bridge, posterior_matching, ridge_map
from cmcr_hf.modeling.configuration_cmcr import TEMPERATURES
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector
from cmcr_hf.output import write_json
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.posteriors import choose_temperatures, matches, posteriors
from cmcr_hf.training.train import ConnectorTrainingArguments, run_script, train_connector

# Vectors and names of COCO, Objects365, OpenImages and LVIS.
NAMES = (
    ("detic_coco_clip_a+cname.npy", "coco_names.json"),
    ("detic_o365_clip_a+cnamefix.npy", "o365_names.json"),
    ("detic_oid_clip_a+cname.npy", "oid_names.json"),
    ("detic_lvis_v1_clip_a+cname.npy", "lvis_names_raw.json"),
)
IMAGES, CAPTIONS = "flickr8k_000-499_clip_vitb32_image_f16.npy", "flickr8k_000-499_captions.json"
# Classes of ESC-50, and the words by which a caption mentions what makes the sound.
SOUNDS = {
    "dog": (["dog"], "dog dogs puppy puppies"),
    "sea": (["sea waves"], "sea ocean wave waves surf surfer surfers surfing beach shore"),
    "baby": (["crying baby"], "baby babies infant toddler toddlers"),
    "car": (["car horn", "engine"], "car cars truck trucks jeep van suv automobile vehicle vehicles"),
    "bird": (["chirping birds", "crow"], "bird birds seagull seagulls duck ducks pigeon pigeons"),
    "water": (
        ["pouring water", "water drops"],
        "water pool river lake fountain stream splash splashes splashing",
    ),
}
BATCH_SIZE, STEPS = 200, 400


@dataclass
class Vectors:
    """Names in both spaces, photographs with their captions, the audio memory, and clips with their classes."""

    text_clip: Tensor
    text_clap: Tensor
    images: Tensor
    captions: list[str]
    memory: Tensor
    clips: Tensor
    classes: list[str]


def read_vectors(data: Path, cache: Path) -> Vectors:
    """Read the vectors of CLIP, and embed names and clips with the small source, which is trained if it is missing.

    Raises:
        ValueError: there is no folder of vectors.
    """
    folder = data / "embeddings"
    if not (folder / IMAGES).is_file():
        raise ValueError(f"There is no file {folder / IMAGES}. Give --data the folder that holds embeddings/.")
    memory = prepare(data, cache, SOURCES).audio_memory
    model, tokenizer = load_source(sources_folder(data, cache, SOURCES), "clap")
    lists = [json.loads((folder / names).read_text(encoding="utf-8")) for _, names in NAMES]
    names = [name.replace("_", " ").strip().lower() for part in lists for name in part]
    rows = np.concatenate([np.load(folder / file, allow_pickle=False) for file, _ in NAMES])
    images = torch.from_numpy(np.load(folder / IMAGES, allow_pickle=False).astype(np.float32))
    sounds = read_sounds(data)
    return Vectors(
        normalize(torch.from_numpy(rows).float(), dim=1),
        embed_texts(model, tokenizer, [f"a {name}" for name in names]),
        normalize(images, dim=1),
        json.loads((folder / CAPTIONS).read_text(encoding="utf-8")),
        memory,
        embed_items(model, sounds.held_back.values),
        [sounds.labels[number] for number in sounds.held_back.classes.tolist()],
    )


def shows(captions: Sequence[str], words: str) -> Tensor:
    """Say of every caption whether it has one of the words."""
    pattern = re.compile(rf"\b({words.replace(' ', '|')})\b")
    return torch.tensor([pattern.search(caption.lower()) is not None for caption in captions])


def roc_area(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the area under the ROC curve of every row of scores `(rows, items)`; a tie counts half."""
    above, below = scores[:, positive, None], scores[:, None, ~positive]
    return ((above > below).float() + (above == below).float() / 2).mean(dim=(1, 2))


def half_of(number: int) -> int:
    return int(hashlib.sha256(f"flickr{number}".encode()).hexdigest(), 16) % 2


def areas(vectors: Vectors, scores: Tensor, halves: Tensor) -> dict[str, float]:
    """Return the mean area of every sound within the halves, from scores `(clips, photographs)`."""
    found = {}
    for name, (classes, words) in SOUNDS.items():
        clips = torch.tensor([name in classes for name in vectors.classes])
        positive = shows(vectors.captions, words)
        parts = [roc_area(scores[clips][:, halves == half], positive[halves == half]).mean() for half in (0, 1)]
        found[name] = torch.stack(parts).mean().item()
    return found


def distilled(vectors: Vectors, images: Tensor, seed: int, objective: str, order: Tensor) -> CMCRConnector:
    """Train a connector on some photographs and the audio memory, through names that the audio side has in `order`."""
    embeds = {
        "clip_text": vectors.text_clip,
        "clap_text": vectors.text_clap[order],
        "clip_image": images,
        "clap_audio": vectors.memory,
    }
    batch_size = BATCH_SIZE
    if objective != "bridge-distillation":
        embeds["clip_image"] = aggregate(vectors.text_clip, images, temperature=0.01, normalize=True)
        embeds["clap_audio"] = aggregate(vectors.text_clap, vectors.memory, temperature=0.01, normalize=True)[order]
        batch_size = 512
    projectors = {"clip": {"input_dim": images.shape[1]}, "clap": {"input_dim": vectors.memory.shape[1]}}
    config = CMCRConfig(objective=objective, projectors=projectors)
    with tempfile.TemporaryDirectory() as folder, tuned_cpu():
        args = ConnectorTrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=batch_size,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        return train_connector(config, embeds, args, log_lines=False)[0]


@torch.no_grad()
def connected(vectors: Vectors, halves: Tensor, seed: int, objective: str, deranged: bool = False) -> Tensor:
    """Return the scores of every half by a connector that did not train on it."""
    order = torch.arange(len(vectors.text_clap))
    if deranged:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    scores = torch.empty(len(vectors.clips), len(vectors.images))
    for half in (0, 1):
        with torch.enable_grad():
            connector = distilled(vectors, vectors.images[halves != half], seed, objective, order)
        project = connector.project
        test = project(vectors.images[halves == half], "clip")
        scores[:, halves == half] = project(vectors.clips, "clap") @ test.T
    return scores


def training_free(vectors: Vectors, halves: Tensor) -> dict[str, Tensor]:
    """Return the scores of what needs no training; the temperatures of a half are chosen with the other."""
    bank = (vectors.text_clap, vectors.text_clip)
    scores = {
        "ridge": normalize(vectors.clips @ ridge_map(*bank), dim=1) @ vectors.images.T,
        "one-way bridge": one_way_bridge(vectors.clips, *bank, vectors.images),
        "posterior matching": posterior_matching(vectors.clips, *bank, vectors.images),
    }
    chosen = torch.empty_like(scores["ridge"])
    for half in (0, 1):
        images = vectors.images[halves != half]
        clip, clap = choose_temperatures(vectors.text_clip, images, vectors.text_clap, vectors.memory)
        told = posteriors(vectors.clips, vectors.text_clap, temperature=clap)
        seen = posteriors(vectors.images[halves == half], vectors.text_clip, temperature=clip)
        chosen[:, halves == half] = matches(told, seen)
    scores["posterior matching, temperatures chosen"] = chosen
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with embeddings, concepts.json, audio and text"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/real_retrieval"), help="of the small source")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--objectives", nargs="+", choices=TEMPERATURES, default=["bridge-distillation"], help="what to train"
    )
    parser.add_argument("--seeds", type=int, default=5, help="connectors a half (default: %(default)s)")
    parser.add_argument("--derangements", type=int, default=3, help="of the null (default: %(default)s)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    check_data(arguments.data)
    vectors = read_vectors(arguments.data, arguments.cache)
    halves = torch.tensor([half_of(number) for number in range(len(vectors.images))])
    table = {name: [areas(vectors, scores, halves)] for name, scores in training_free(vectors, halves).items()}
    for objective in arguments.objectives:
        table[objective] = [
            areas(vectors, connected(vectors, halves, seed, objective), halves) for seed in range(arguments.seeds)
        ]
        table[f"null of {objective}"] = [
            areas(vectors, connected(vectors, halves, seed, objective, deranged=True), halves)
            for seed in range(arguments.derangements)
        ]
    print(f"{len(vectors.images)} photographs, {len(vectors.text_clip)} names. {machine()}\n")
    print(f"{'mean area under the ROC curve':42} {'mean':12} " + " ".join(f"{name:>5}" for name in SOUNDS))
    for name, runs in table.items():
        if runs:
            rows = torch.tensor([[run[sound] for sound in SOUNDS] for run in runs])
            means = rows.mean(dim=1)
            spread = f"±{means.std().item():.3f}" if len(runs) > 1 else ""
            cells = " ".join(f"{value:5.2f}" for value in rows.mean(dim=0).tolist())
            print(f"{name:42} {means.mean().item():.3f} {spread:6} {cells}")
    if arguments.output is not None:
        write_json(arguments.output, {"areas": table, "batch_size": BATCH_SIZE, "steps": STEPS})


if __name__ == "__main__":
    run_script(main)
