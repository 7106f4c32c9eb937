"""Train the small CLIP and ULIP of the shapes world, on picture-caption pairs and on pairs of a cloud and a picture.

Synthetic data throughout. The two models never see each other's data and start from different seeds, so their spaces
are unconnected, as those of published CLIP and ULIP weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..modeling.modeling_ulip import UlipModel
from .apart import train_apart
from .concepts import COLOURS
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
from .shape_captions import held_out_text, image_caption, kind_phrase, memory_text
from .solids import KINDS, build, render, sample_cloud
from .world import distinct, stream

_PICTURES = CaptionedPictures({kind: list(COLOURS) for kind in KINDS}, render, image_caption)


def retrain_shapes(
    output: Path,
    *,
    seed: int = 0,
    pictures: int = 400,
    pairs: int = 400,
    clip_steps: int = 2200,
    image_steps: int = 1800,
    point_steps: int = 700,
    held_out: int = 50,
) -> dict[str, Any]:
    """Train both encoders and write them to `output/clip` and `output/ulip`, with `output/figures.json`.

    `pictures` with captions, as many for each model, `pairs` of a cloud and a picture of one thing, and `held_out` are
    counts for each kind, the last one of every sort for the figures. Precision, streams, processes and what a stop
    leaves are those of `retrain`.

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
        "pictures_per_kind": pictures,
        "pairs_per_kind": pairs,
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

    `zero_shot_accuracy` compares CLIP's pictures with the plain phrases of the kinds, `text_accuracy` the two kinds of
    texts of a world. `cloud_to_image` and `image_to_cloud` rank within ULIP, no cloud and picture being of one thing.
    The `unconnected` figures rank across the two spaces without any connection; what they are to be compared with are
    `chance`, a random order, and the mAP of random matchings of the kinds.
    """
    clip = AutoModel.from_pretrained(folder / "clip", dtype=torch.float32)
    ulip = UlipModel.from_pretrained(folder / "ulip", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    labels = torch.arange(len(KINDS)).repeat_interleave(held_out)
    phrases = [kind_phrase(kind) for kind in KINDS]
    pixels = {}
    for name in ("clip", "ulip"):
        processor = AutoImageProcessor.from_pretrained(folder / name, backend="pil")
        pixels[name], _ = picture_features(processor, _PICTURES, seed, "figure_images", held_out)
    clouds = np.stack(
        [sample_cloud(kind, stream(seed, "figure_clouds", kind, index)) for kind in KINDS for index in range(held_out)]
    )
    with torch.inference_mode():
        images = {
            name: unit(torch.cat([model.get_image_features(part.float()).pooler_output for part in own.split(256)]))
            for (name, own), model in zip(pixels.items(), (clip, ulip), strict=True)
        }
        points = torch.from_numpy(clouds).split(256)
        shapes = unit(torch.cat([ulip.get_point_cloud_features(part).pooler_output for part in points]))
        prompts = embed_texts(clip, tokenizer, phrases)
        texts = {}
        for name, say in (("texts", memory_text), ("test_texts", held_out_text)):
            lines = [
                line for kind in KINDS for line in distinct(say, kind, held_out, seed=seed, split=f"figure_{name}")
            ]
            texts[name] = embed_texts(clip, tokenizer, lines)
    return {
        "kinds": len(KINDS),
        "held_out_per_kind": held_out,
        "zero_shot_accuracy": {"clip": accuracy(images["clip"], prompts, labels)},
        "text_accuracy": {name: accuracy(embeds, prompts, labels) for name, embeds in texts.items()},
        "cloud_to_image": class_retrieval(shapes, images["ulip"], labels),
        "image_to_cloud": class_retrieval(images["ulip"], shapes, labels),
        "unconnected_cloud_to_image": class_retrieval(shapes, images["clip"], labels),
        "unconnected_image_to_cloud": class_retrieval(images["clip"], shapes, labels),
        "relabelled_map": {
            "cloud_to_image": relabelled_map(shapes, images["clip"], labels, seed),
            "image_to_cloud": relabelled_map(images["clip"], shapes, labels, seed),
        },
        "chance": class_chance(labels),
        "bytes": folder_bytes(folder, "clip", "ulip"),
    }


def _train_clip(folder: Path, seed: int, pictures: int, steps: int) -> None:
    train_clip(
        folder,
        _PICTURES,
        stream(seed, "shapes_clip_training", "", 0),
        seed=seed,
        split="shapes_clip_training_images",
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
        split="shapes_ulip_training",
        pictures=pictures,
        pairs=pairs,
        image_steps=image_steps,
        point_steps=point_steps,
    )
