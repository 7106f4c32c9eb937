# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of images and audio clips of any size, each a function of its item alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import ClapFeatureExtractor
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import normalize, rescale

from .audio_loading_cmcr import AudioClip, open_audio
from .image_loading_cmcr import load_image
from .log_mel_cmcr import log_mel

MAX_ASPECT = 32


# What makes a processor of the PIL backend more than the steps of its switches, where it has its own.
_PIL_STEPS = "__call__ preprocess _preprocess_image_like_inputs _prepare_image_like_inputs process_image _preprocess"
_PIL_STEPS += " resize center_crop rescale normalize"


def extract_images(images: Sequence[Any], processor: Any) -> dict[str, Any]:
    """Return the features of images (see [`load_image`]), one below the other.

    A processor of the PIL backend gives for an image the same pixels in any batch. One of the torchvision backend is
    given all images at once, and its tensors stay on its device.
    """
    if getattr(processor, "backend", None) == "torchvision":
        pictures = [_shortened(load_image(image), processor) for image in images]
        return dict(processor(pictures, return_tensors="pt"))
    rows = [extract_image(image, processor) for image in images]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def extract_image(image: Any, processor: Any) -> dict[str, np.ndarray]:
    """Return the features of one image (see [`load_image`]), without its batch axis."""
    picture = _shortened(load_image(image), processor)
    pixels = _pil_pixels(picture, processor)
    if pixels is not None:
        return {"pixel_values": pixels}
    return {name: value[0] for name, value in processor(picture, return_tensors="np").items()}


def _shortened(picture: Any, processor: Any) -> Any:
    """Return the middle of a picture more than 32 times as long as wide, in that shape, where the centre is cropped.

    A processor that resizes the short side first blows up a strip of 1 x 10000 pixels a thousandfold.
    """
    if getattr(processor, "do_center_crop", False) and processor.do_resize and processor.size.get("shortest_edge"):
        longest = MAX_ASPECT * min(picture.size)
        width, height = (min(side, longest) for side in picture.size)
        if (width, height) != picture.size:
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            return picture.crop((left, top, left + width, top + height))
    return picture


def _pil_pixels(picture: Any, processor: Any) -> np.ndarray | None:
    """Return what a plain processor of the PIL backend makes of an RGB picture, `(3, height, width)`.

    It computes in floats, copy after copy, what depends on a byte and its channel alone; here, that is looked up. A
    processor with steps of its own, or with others than resize, crop, rescale and normalise, gives `None`.
    """
    plain = all(getattr(type(processor), name, None) is getattr(PilBackend, name) for name in _PIL_STEPS.split())
    if not plain or processor.do_pad or not (processor.do_rescale or processor.do_normalize):
        return None
    if processor.do_resize:
        size = dict(processor.size)
        if set(size) == {"shortest_edge"}:
            short, long = sorted(picture.size)
            edge = size["shortest_edge"]
            width, height = (edge if side == short else int(edge * long / short) for side in picture.size)
        elif set(size) == {"height", "width"}:
            width, height = size["width"], size["height"]
        else:
            return None
        if not isinstance(processor.resample, int):
            return None
        picture = picture.resize((width, height), processor.resample)
    levels = np.asarray(picture)
    if processor.do_center_crop:
        crop = dict(processor.crop_size)
        top, left = (levels.shape[0] - crop["height"]) // 2, (levels.shape[1] - crop["width"]) // 2
        if top < 0 or left < 0:
            return None
        levels = levels[top : top + crop["height"], left : left + crop["width"]]
    mean, std = processor.image_mean, processor.image_std
    table = _float_levels(
        processor.rescale_factor if processor.do_rescale else None,
        (_channels(mean), _channels(std)) if processor.do_normalize else None,
    )
    pixels = np.empty((3, *levels.shape[:2]), np.float32)
    for channel in range(3):
        # Bytes are within the table; "clip" spares a copy of the result.
        np.take(table[channel], levels[:, :, channel], out=pixels[channel], mode="clip")
    return pixels


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,) * 3


@lru_cache(maxsize=16)
def _float_levels(
    factor: float | None, mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> np.ndarray:
    """Return what the functions of transformers make of each byte in each channel, `(3, 256)` float32."""
    levels = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
    if factor is not None:
        levels = rescale(levels, factor, input_data_format="channels_first")
    if mean_and_std is not None:
        levels = normalize(levels, *mean_and_std, input_data_format="channels_first")
    table: np.ndarray = levels[:, 0]
    return table


def extract_audio(audio: Any, extractor: Any, rate: float | None = None) -> dict[str, np.ndarray]:
    """Return the features of one clip (see [`open_audio`]), without its batch axis.

    [`ClapFeatureExtractor`] draws crops at random, and calls a random clip of the batch longer than it is. Here a
    clip over the window gives, in fused mode, its shrunken whole and the chunk in the middle of each third of the
    possible starts (where the extractor draws one), else the window in its middle; `is_longer` follows from the
    clip alone. What the features do not depend on is read, but not kept.
    """
    with open_audio(audio, extractor.sampling_rate, rate) as clip:
        if not isinstance(extractor, ClapFeatureExtractor):
            (waveform,) = clip.read([(0, clip.samples)])
            features = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="np")
            return {name: value[0] for name, value in features.items()}
        window = extractor.nb_max_samples
        frames = window // extractor.hop_length + 1
        total = (clip.samples - extractor.fft_window_size % 2) // extractor.hop_length + 1
        fused = extractor.truncation == "fusion"
        if fused and total > frames:
            mel, longer = _fuse(clip, extractor, total, frames), True
        else:
            start = 0 if fused else max(0, clip.samples - window) // 2
            stop = clip.samples if fused else min(clip.samples, start + window)
            (waveform,) = clip.read([(start, stop)])
            longer = len(waveform) < clip.samples
            mel = _log_mel(_pad(waveform, window, extractor.padding), extractor)[None].repeat(
                4 if fused else 1, axis=0
            )
    return {"input_features": mel.astype(np.float32, copy=False), "is_longer": np.array([longer])}


def _log_mel(waveform: np.ndarray, extractor: Any) -> np.ndarray:
    mel: np.ndarray = log_mel(torch.from_numpy(np.ascontiguousarray(waveform)), extractor).numpy()
    return mel


def _pad(waveform: np.ndarray, length: int, padding: str) -> np.ndarray:
    """Bring a shorter waveform to `length` samples: `repeat` cuts the last copy off, others end in zeros."""
    if len(waveform) >= length:
        return waveform
    if padding == "repeat":
        return np.resize(waveform, length)
    if padding == "repeatpad":
        waveform = np.tile(waveform, length // len(waveform))
    return np.pad(waveform, (0, length - len(waveform)))


def _fuse(clip: AudioClip, extractor: Any, total: int, frames: int) -> np.ndarray:
    """Return the channels of a fused CLAP, `(4, frames, bins)`, for a clip whose log-mel has `total` frames."""
    # The extractor splits the possible starts like this and draws one of each third.
    size, rest = divmod(total - frames + 1, 3)
    thirds = [size + (third < rest) for third in range(3)]
    starts = [sum(thirds[:third]) + (thirds[third] - 1) // 2 if thirds[third] else 0 for third in range(3)]
    # The whole is shrunken as `torch.nn.functional.interpolate(mode="bilinear")` does it. Without antialiasing, that
    # takes two frames for one, and so a small part of the log-mel of a long clip.
    scale = np.float32(total) / np.float32(frames)
    places = (np.float64(scale) * (np.arange(frames) + 0.5) - 0.5).astype(np.float32).clip(0)
    below = np.minimum(places.astype(np.int64), total - 1)
    above = np.minimum(below + 1, total - 1)
    is_needed = np.zeros(total, bool)
    is_needed[below] = is_needed[above] = True
    for start in starts:
        is_needed[start : start + frames] = True
    needed = np.flatnonzero(is_needed)
    mel = _frames(clip, extractor, needed)
    low, high = (mel[np.searchsorted(needed, wanted)] for wanted in (below, above))
    share = (places - below.astype(np.float32)).clip(0, 1)[:, None]
    channels = np.empty((4, *low.shape), np.float32)
    torch.lerp(*map(torch.from_numpy, (low, high, share)), out=torch.from_numpy(channels[0]))
    for channel, start in zip(channels[1:], np.searchsorted(needed, starts), strict=True):
        channel[:] = mel[start : start + frames]
    return channels


def _frames(clip: AudioClip, extractor: Any, needed: np.ndarray) -> np.ndarray:
    """Return those frames of a clip's log-mel, `(needed, bins)`, from the samples around them."""
    hop, margin = extractor.hop_length, extractor.fft_window_size // 2 // extractor.hop_length + 1
    runs = np.split(needed, np.flatnonzero(np.diff(needed) > 2 * margin) + 1)
    firsts = [max(0, int(run[0]) - margin) for run in runs]
    stops = [min(clip.samples, (int(run[-1]) + margin) * hop) for run in runs]
    waveforms = clip.read([(first * hop, stop) for first, stop in zip(firsts, stops, strict=True)])
    mels = np.empty((len(needed), extractor.feature_size), np.float32)
    row = 0
    for run, first, waveform in zip(runs, firsts, waveforms, strict=True):
        # The frames of the margins lack samples, save at the two ends of the clip, where the extractor reflects it.
        np.take(_log_mel(waveform, extractor), run - first, axis=0, out=mels[row : row + len(run)], mode="clip")
        row += len(run)
    return mels
