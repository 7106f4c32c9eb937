"""Train the small CLIP and ULIP of the world of all modalities; its CLAP is that of the sounds world.

CLIP and the image tower of ULIP see drawings and pictures of solids, each its own; the point encoder sees clouds.
Synthetic data throughout. The models never see each other's data and start from different seeds, so their spaces are
unconnected, as those of published weights are. No sound and no cloud was ever paired with the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..modeling.modeling_ulip import UlipModel
from .apart import train_apart
from .captions import concept_phrase
from .concepts import CONCEPTS
from .drawing import draw
from .pretraining import (
    CaptionedPictures,
    accuracy,
    class_chance,
    class_retrieval,
    embed_texts,
    folder_bytes,
    picture_features,
    relabelled_map,
    shifted_or_mirrored,
    train_clip,
    unit,
    write_figures,
)
from .pretraining_ulip import BATCH, POINT_BATCH, train_ulip
from .shape_captions import thing_caption
from .sounding_solids import BUILDERS, build, render, sample_cloud
from .world import distinct_texts, stream


def drawn_or_rendered(concept: str, generator: np.random.Generator, colour: str | None = None) -> Image.Image:
    """Return a drawing of a concept or a picture of a solid of it, each half of the time."""
    return (draw if generator.random() < 0.5 else render)(concept, generator, colour=colour)


def caption(concept: str, generator: np.random.Generator, *, colour: str | None = None) -> str:
    """Say what a picture of the concept looks like."""
    return thing_caption(CONCEPTS[concept].nouns, generator, colour=colour)


_PICTURES = CaptionedPictures({name: CONCEPTS[name].colours for name in BUILDERS}, drawn_or_rendered, caption)


def retrain_all(
    output: Path,
    *,
    seed: int = 0,
    pictures: int = 600,
    pairs: int = 400,
    clip_steps: int = 2000,
    image_steps: int = 1600,
    point_steps: int = 600,
    held_out: int = 50,
) -> dict[str, Any]:
    """Train both encoders and write them to `output/clip` and `output/ulip`, with `output/figures.json`.

    Counts, precision, streams, processes and what a stop leaves are those of `retrain_shapes`.

    Returns the content of `figures.json`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    minutes = train_apart(
        clip=(_train_clip, output / "clip", seed, pictures, clip_steps),
        ulip=(_train_ulip, output / "ulip", seed, pictures, pairs, image_steps, point_steps),
    )
    figures = {
        "data": "trained on synthetic data",
        "seed": seed,
        "pictures_per_concept": pictures,
        "pairs_per_concept": pairs,
        "clip_steps": clip_steps,
        "image_steps": image_steps,
        "point_steps": point_steps,
        "batch": BATCH,
        "point_batch": POINT_BATCH,
        "minutes": minutes,
        **measure(output, seed=seed, held_out=held_out),
    }
    write_figures(output, figures)
    return figures


def measure(folder: Path, *, seed: int = 0, held_out: int = 50) -> dict[str, Any]:
    """Measure the encoders in `folder/clip` and `folder/ulip` on things that no training has seen.

    The figures are those of `retrain_shapes.measure`; the texts are those of the sounds world.
    """
    clip = AutoModel.from_pretrained(folder / "clip", dtype=torch.float32)
    ulip = UlipModel.from_pretrained(folder / "ulip", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    labels = torch.arange(len(BUILDERS)).repeat_interleave(held_out)
    pixels = {}
    for name in ("clip", "ulip"):
        processor = AutoImageProcessor.from_pretrained(folder / name, backend="pil")
        pixels[name], _ = picture_features(processor, _PICTURES, seed, "figure_images", held_out)
    clouds = [
        sample_cloud(concept, stream(seed, "figure_clouds", concept, index))
        for concept in BUILDERS
        for index in range(held_out)
    ]
    texts = [
        line for concept in BUILDERS for line in distinct_texts(concept, held_out, seed=seed, split="figure_texts")
    ]
    with torch.inference_mode():
        images = {
            name: unit(
                torch.cat([model.get_image_features(part.float()).pooler_output for part in pixels[name].split(256)])
            )
            for name, model in (("clip", clip), ("ulip", ulip))
        }
        points = torch.from_numpy(np.stack(clouds)).split(256)
        shapes = unit(torch.cat([ulip.get_point_cloud_features(part).pooler_output for part in points]))
        prompts = embed_texts(clip, tokenizer, [concept_phrase(concept) for concept in BUILDERS])
        lines = embed_texts(clip, tokenizer, texts)
    return {
        "concepts": len(BUILDERS),
        "held_out_per_concept": held_out,
        "zero_shot_accuracy": {"clip": accuracy(images["clip"], prompts, labels)},
        "text_accuracy": {"clip": accuracy(lines, prompts, labels)},
        "cloud_to_image": class_retrieval(shapes, images["ulip"], labels),
        "image_to_cloud": class_retrieval(images["ulip"], shapes, labels),
        "unconnected_cloud_to_image": class_retrieval(shapes, images["clip"], labels),
        "relabelled_map": {"cloud_to_image": relabelled_map(shapes, images["clip"], labels, seed)},
        "chance": class_chance(labels),
        "bytes": folder_bytes(folder, "clip", "ulip"),
    }


def _train_clip(folder: Path, seed: int, pictures: int, steps: int) -> None:
    train_clip(
        folder,
        _PICTURES,
        stream(seed, "all_clip_training", "", 0),
        seed=seed,
        split="all_clip_training_images",
        count=pictures,
        steps=steps,
        batch=BATCH,
        text_hidden_size=64,
        vision_hidden_size=96,
        augment=shifted_or_mirrored,
    )


def _train_ulip(folder: Path, seed: int, pictures: int, pairs: int, image_steps: int, point_steps: int) -> None:
    train_ulip(
        folder,
        _PICTURES,
        build,
        seed=seed,
        split="all_ulip_training",
        pictures=pictures,
        pairs=pairs,
        image_steps=image_steps,
        point_steps=point_steps,
    )
