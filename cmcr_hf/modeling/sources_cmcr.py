# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Source encoders: their features, and their fingerprint: what they give for fixed sentences, a picture, a tone and
a point cloud.

An id and a revision tell a source of another name; the fingerprint tells weights, a tokenizer or a preprocessing that
differ under the right one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature, PreTrainedModel

SENTENCES = (
    "a dog barks in the distance",
    "two people talking over the sound of rain",
    "a red car parked in front of a house",
    "church bells ringing",
    "a bowl of fruit on a wooden table",
    "waves breaking on a rocky shore at 7 in the evening",
    "an electric guitar",
    "this is not a sentence about cats",
)
FINGERPRINT_ROWS = {"text": len(SENTENCES), "image": 1, "audio": 1, "point_cloud": 1}
# Cosines that the same weights keep: on other processors and with other attention kernels in float32, and in half
# precision.
MIN_COSINE = 0.9999
MIN_HALF_COSINE = 0.995


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Scale the rows to unit length, computed in float32 and returned in the dtype of `embeds`."""
    return F.normalize(embeds.float(), dim=-1).to(embeds.dtype)


def source_features(source: PreTrainedModel, modality: str, inputs: Mapping[str, Any]) -> Any:
    """Return the output of a source's `get_{modality}_features`, its inputs cast to the source's dtype."""
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in ("pixel_values", "input_features"):
        if name in given:
            given[name] = given[name].to(source.dtype)
    return getattr(source, f"get_{modality}_features")(**given)


@torch.no_grad()
def fingerprint(source: PreTrainedModel, processor: Any, space: str, modality: str) -> torch.Tensor:
    """Embed the fixed inputs with a source: `(FINGERPRINT_ROWS[modality], dim)` float32 unit rows, on the CPU.

    Args:
        processor: the [`CMCRProcessor`] of the source.
        space: role of the source, whose tokenizer prepares the sentences.
        modality: `text`, `image`, `audio` or `point_cloud`.
    """
    if modality == "text":
        inputs = processor(text=list(SENTENCES), space=space)
    elif modality == "image":
        inputs = processor(images=picture(), space=space)
    elif modality == "point_cloud":
        # Without the processor, whose options need not be those of the connector's.
        channels = source.config.point_config.input_channels
        inputs = BatchFeature({"point_clouds": torch.from_numpy(_cloud(channels))[None]})
    else:
        rate = processor.feature_extractor.sampling_rate
        inputs = processor(audio=[_tone(rate)], sampling_rate=rate)
    training = source.training
    embeds = source_features(source.eval(), modality, inputs.to(source.device)).pooler_output
    source.train(training)
    return normalize(embeds.float()).cpu()


def check_fingerprint(
    found: torch.Tensor, recorded: torch.Tensor, space: str, modality: str, name: str, dtype: torch.dtype
) -> None:
    """Check that a source gives what the connector's own source gave.

    Args:
        dtype: of the source's weights, which bounds how near the two can be.

    Raises:
        ValueError: a row differs; names the space, the modality and the cosine.
    """
    recorded = recorded.detach().float().cpu()
    cosine = F.cosine_similarity(found, recorded, dim=-1).min().item()
    # A comparison with NaN is false.
    least = MIN_COSINE if dtype == torch.float32 else MIN_HALF_COSINE
    if not cosine >= least:
        raise ValueError(
            f"{name} is not the {space} source that the connector was trained on: its {modality} embeddings of fixed "
            f"inputs have a cosine of {cosine:.4f} with the recorded ones, expected at least {least}. Pass the "
            "source, in the revision, that the connector was trained on, or connect this one anew."
        )


def picture() -> np.ndarray:
    """Return colour gradients under a checkerboard and a disc, `(240, 320, 3)` uint8."""
    y, x = np.mgrid[0:240, 0:320]
    picture = np.stack([x * 255 // 319, y * 255 // 239, (x + y) * 255 // 558], axis=-1)
    picture[(x // 40 + y // 40) % 2 == 1] //= 2
    picture[(x - 200) ** 2 + (y - 100) ** 2 < 60**2] = (230, 40, 60)
    return picture.astype(np.uint8)


def _tone(rate: int) -> np.ndarray:
    """Return two seconds of 440 Hz with two overtones, swelling and fading, at `rate` Hz."""
    time = np.arange(2 * rate) / rate
    partials = sum(np.sin(2 * np.pi * 440 * k * time) / k for k in (1, 2, 3))
    return (0.4 * partials * np.sin(np.pi * time / 2) ** 2).astype(np.float32)


def _cloud(channels: int) -> np.ndarray:
    """Return a bumpy shell with a stick, `(2048, channels)`, colours 0.4 where there are any.

    On a grid, where float32 computes distances without error: every machine samples the same centres.
    """
    index = np.arange(1536) + 0.5
    height, angle = 1 - index / 768, index * np.pi * (3 - 5**0.5)
    radius = 0.6 + 0.2 * np.sin(3 * angle) * (1 - height**2)
    shell = radius[:, None] * np.stack([np.cos(angle), np.sin(angle), height], axis=1)
    stick = np.linspace([0.2, 0.1, 0.3], [0.9, 0.5, 1.0], 512)
    cloud = np.full((2048, channels), 0.4, np.float32)
    cloud[:, :3] = np.rint(np.concatenate([shell, stick]) * 512) / 512
    return cloud
