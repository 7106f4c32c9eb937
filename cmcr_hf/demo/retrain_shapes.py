"""Train the small CLIP and ULIP of the shapes world, on picture-caption pairs and on pairs of a cloud and a picture.

As published (arXiv 2212.05171), ULIP's image tower is first trained with captions of its own and then frozen, and the
point encoder learns to meet it; the text tower of that first step is not kept. Synthetic data throughout. The two
models never see each other's data and start from different seeds, so their spaces are unconnected, as those of
published CLIP and ULIP weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..modeling.configuration_ulip import UlipConfig
from ..modeling.modeling_ulip import UlipModel
from .concepts import COLOURS
from .drawing import IMAGE_SIZE
from .meshes import rotation
from .pretraining import (
    PROJECTION_DIM,
    CaptionedPictures,
    accuracy,
    class_chance,
    class_retrieval,
    clip_tokenizer,
    corpus,
    embed_texts,
    folder_bytes,
    image_processor,
    initialised,
    picture_features,
    pixel_values,
    relabelled_map,
    save,
    shifted_or_mirrored,
    text_config,
    tokenise,
    train_apart,
    train_clip,
    train_contrastively,
    unit,
    vision_config,
    write_figures,
)
from .shape_captions import held_out_text, image_caption, kind_phrase, memory_text
from .solids import KINDS, build, cloud_of, picture_of, render, sample_cloud
from .world import distinct, stream

_POINTS = 512
# A step of a small batch costs less, and the towers want steps; the point encoder's batch norm wants rows.
_BATCH, _POINT_BATCH = 32, 64
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
        "batch": _BATCH,
        "point_batch": _POINT_BATCH,
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
        [
            sample_cloud(kind, stream(seed, "figure_clouds", kind, index), _POINTS)
            for kind in KINDS
            for index in range(held_out)
        ]
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
        batch=_BATCH,
        text_hidden_size=64,
        vision_hidden_size=96,
        augment=shifted_or_mirrored,
    )


def _train_ulip(folder: Path, seed: int, pictures: int, pairs: int, image_steps: int, point_steps: int) -> None:
    random = stream(seed, "shapes_ulip_training", "", 0)
    processor = image_processor()
    tokenizer = clip_tokenizer(corpus(list(KINDS), image_caption, random))
    # The towers are narrow: with transformers' usual deviation of 0.02 they would hardly tell inputs apart at first.
    vision = {**vision_config(80), "initializer_range": 0.08}
    text = {**text_config(tokenizer, 64), "initializer_range": 0.08}
    point = {
        "num_groups": 24,
        "group_size": 12,
        "group_hidden_size": 64,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.08,
    }
    config = UlipConfig(point_config=point, vision_config=vision, text_config=text, projection_dim=PROJECTION_DIM)
    captioned = initialised(UlipModel, config, random)
    _train_images(captioned, tokenizer, processor, seed, pictures, image_steps, random)
    config = UlipConfig(point_config=point, vision_config=vision, projection_dim=PROJECTION_DIM)
    model = initialised(UlipModel, config, random)
    for part in ("vision_model", "vision_projection"):
        getattr(model, part).load_state_dict(getattr(captioned, part).state_dict())
        getattr(model, part).requires_grad_(False)
    _train_points(model, processor, seed, pairs, point_steps, random)
    save(folder, model, processor)


def _train_images(
    model: UlipModel,
    tokenizer: Any,
    processor: Any,
    seed: int,
    count: int,
    steps: int,
    random: np.random.Generator,
) -> None:
    pixels, colours = picture_features(processor, _PICTURES, seed, "shapes_ulip_training_images", count)

    def logits(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        captions = [image_caption(_PICTURES.names[row // count], random, colour=colours[row]) for row in rows]
        shown = shifted_or_mirrored(pixels[torch.from_numpy(rows)].float(), random)
        images = unit(model.get_image_features(shown).pooler_output.float())
        texts = unit(model.get_text_features(**tokenise(tokenizer, captions)).pooler_output.float())
        per_image = model.logit_scale.exp() * images @ texts.T
        return per_image, per_image.T, captions

    train_contrastively(model, len(pixels), logits, random, steps, "Training ULIP's images", batch=_BATCH)


def _train_points(
    model: UlipModel, processor: Any, seed: int, count: int, steps: int, random: np.random.Generator
) -> None:
    clouds, pixels = _pairs(processor, seed, count)
    with torch.inference_mode():
        parts = pixels.split(256)
        images = unit(torch.cat([model.get_image_features(part.float()).pooler_output for part in parts])).clone()

    def logits(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        numbers = torch.from_numpy(rows)
        turns = np.stack([rotation("y", angle) for angle in random.uniform(0, 2 * np.pi, len(rows))])
        turned = clouds[numbers] @ torch.from_numpy(turns).float().mT
        points = unit(model.get_point_cloud_features(turned).pooler_output.float())
        per_cloud = model.logit_scale.exp() * points @ images[numbers].T
        # No two pairs are of one thing.
        return per_cloud, per_cloud.T, [str(row) for row in rows]

    train_contrastively(model, len(clouds), logits, random, steps, "Training ULIP's points", batch=_POINT_BATCH)


def _pairs(processor: Any, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clouds and half-precision pixel values, row by row of one thing, `count` a kind."""
    clouds = torch.empty(len(KINDS) * count, _POINTS, 3)
    pixels = torch.empty(len(KINDS) * count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float16)
    items = [(kind, index) for kind in KINDS for index in range(count)]
    for row, (kind, index) in enumerate(tqdm(items, desc="Scanning and drawing", unit="thing")):
        random = stream(seed, "shapes_ulip_training_pairs", kind, index)
        mesh = build(kind, random)
        clouds[row] = torch.from_numpy(cloud_of(mesh, random, _POINTS))
        pixels[row] = pixel_values(processor, picture_of(mesh, random))
    return clouds, pixels
