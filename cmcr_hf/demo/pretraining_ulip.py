"""Train a small ULIP of an offline world: its image tower on captioned pictures, then its point encoder to meet it.

As published (arXiv 2212.05171), the image tower is first trained with captions of its own and then frozen; the text
tower of that first step is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..modeling.configuration_ulip import UlipConfig
from ..modeling.modeling_ulip import UlipModel
from .drawing import IMAGE_SIZE
from .meshes import Mesh, rotation
from .pretraining import (
    PROJECTION_DIM,
    CaptionedPictures,
    clip_tokenizer,
    corpus,
    image_processor,
    initialised,
    picture_features,
    pixel_values,
    save,
    shifted_or_mirrored,
    text_config,
    tokenise,
    train_contrastively,
    unit,
    vision_config,
)
from .solids import cloud_of, picture_of
from .world import stream

# A step of a small batch costs less, and the towers want steps; the point encoder's batch norm wants rows.
BATCH, POINT_BATCH = 32, 64
_POINTS = 512
Build = Callable[[str, np.random.Generator], Mesh]


def train_ulip(
    folder: Path,
    captioned_pictures: CaptionedPictures,
    build: Build,
    *,
    seed: int,
    split: str,
    pictures: int,
    pairs: int,
    image_steps: int,
    point_steps: int,
) -> None:
    """Train a small ULIP and write it with its image processor.

    Args:
        captioned_pictures: what the image tower is trained on, `pictures` a name of the streams `{split}_images`.
        build: makes a thing of a name, of which the point encoder sees a cloud and the image tower a picture: `pairs`
            a name of the streams `{split}_pairs`.
        split: names the streams.
    """
    random = stream(seed, split, "", 0)
    processor = image_processor()
    tokenizer = clip_tokenizer(corpus(captioned_pictures.names, captioned_pictures.caption, random))
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
    pixels, colours = picture_features(processor, captioned_pictures, seed, f"{split}_images", pictures)
    _train_images(captioned, tokenizer, captioned_pictures, pixels, colours, image_steps, random)
    config = UlipConfig(point_config=point, vision_config=vision, projection_dim=PROJECTION_DIM)
    model = initialised(UlipModel, config, random)
    for part in ("vision_model", "vision_projection"):
        getattr(model, part).load_state_dict(getattr(captioned, part).state_dict())
        getattr(model, part).requires_grad_(False)
    clouds, seen = _pairs(captioned_pictures.names, build, processor, seed, f"{split}_pairs", pairs)
    _train_points(model, clouds, seen, point_steps, random)
    save(folder, model, processor)


def _train_images(
    model: UlipModel,
    tokenizer: Any,
    pictures: CaptionedPictures,
    pixels: torch.Tensor,
    colours: list[str],
    steps: int,
    random: np.random.Generator,
) -> None:
    count = len(pixels) // len(pictures.names)

    def logits(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        captions = [pictures.caption(pictures.names[row // count], random, colour=colours[row]) for row in rows]
        shown = shifted_or_mirrored(pixels[torch.from_numpy(rows)].float(), random)
        images = unit(model.get_image_features(shown).pooler_output.float())
        texts = unit(model.get_text_features(**tokenise(tokenizer, captions)).pooler_output.float())
        per_image = model.logit_scale.exp() * images @ texts.T
        return per_image, per_image.T, captions

    train_contrastively(model, len(pixels), logits, random, steps, "Training ULIP's images", batch=BATCH)


def _train_points(
    model: UlipModel, clouds: torch.Tensor, pixels: torch.Tensor, steps: int, random: np.random.Generator
) -> None:
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

    train_contrastively(model, len(clouds), logits, random, steps, "Training ULIP's points", batch=POINT_BATCH)


def _pairs(
    names: list[str], build: Build, processor: Any, seed: int, split: str, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clouds and half-precision pixel values, row by row of one thing, `count` a name."""
    clouds = torch.empty(len(names) * count, _POINTS, 3)
    pixels = torch.empty(len(names) * count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float16)
    items = [(name, index) for name in names for index in range(count)]
    for row, (name, index) in enumerate(tqdm(items, desc="Scanning and drawing", unit="thing")):
        random = stream(seed, split, name, index)
        mesh = build(name, random)
        clouds[row] = torch.from_numpy(cloud_of(mesh, random, _POINTS))
        pixels[row] = pixel_values(processor, picture_of(mesh, random))
    return clouds, pixels
