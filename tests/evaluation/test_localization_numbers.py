"""Localisation and recognition from files to numbers, compared with the model's own features by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import auc, precision_recall_curve

from cmcr_hf.evaluation.dense_maps import PatchEncoder
from cmcr_hf.evaluation.proposals import grid_boxes
from tests.evaluation.by_hand import embed, evaluate, loaded, resampled
from tests.evaluation.sounding_folders import (
    FLICKR,
    MUSIC,
    VGG_SS,
    write_extended_flickr_soundnet,
    write_extended_vgg_ss,
    write_flickr_soundnet,
    write_music,
    write_vgg_ss,
)
from tests.evaluation.test_boxes import plain_ciou, plain_map
from tests.evaluation.test_recognition import plain_metrics

SIDE = 224
# Rounded as in the official code.
LEVELS = [0.05 * step for step in range(21)]


@dataclass
class Pair:
    """A picture and a sound, the boxes in parts of the picture, and how many of them make a pixel certain."""

    picture: str
    sound: str
    video: str
    boxes: Sequence[tuple[float, ...]] = ()
    certain: int = 1

    @property
    def key(self) -> str:
        return self.picture if self.boxes else f"{self.picture} {self.sound}"

    def ciou(self, pixels: np.ndarray) -> float:
        truth = truth_map(tuple(self.boxes), self.certain)
        return plain_ciou(pixels, truth) if np.any(truth) else 0.0


def vgg_ss(folder: Path) -> list[Pair]:
    write_vgg_ss(folder)
    return [Pair(name, name, name.rpartition("_")[0], [tuple(box) for box in boxes]) for name, boxes in VGG_SS.items()]


def flickr_soundnet(folder: Path) -> list[Pair]:
    write_flickr_soundnet(folder)
    return [
        Pair(name, name, name, [tuple(part / 256 for part in box) for box in boxes], certain=2)
        for name, boxes in FLICKR.items()
    ]


def music(folder: Path) -> list[Pair]:
    write_music(folder)
    return [
        Pair(name, name.rpartition("_")[0], name.rsplit("_", 2)[0], [(x, y, x + width, y + height)])
        for name, (_, (x, y, width, height)) in MUSIC.items()
    ]


def extended_vgg_ss(folder: Path) -> list[Pair]:
    pairs = vgg_ss(folder / "plain")
    write_extended_vgg_ss(folder)
    return pairs + [Pair(picture, sound, picture.rpartition("_")[0]) for picture, sound in silent(folder)]


def extended_flickr_soundnet(folder: Path) -> list[Pair]:
    pairs = flickr_soundnet(folder / "plain")
    write_extended_flickr_soundnet(folder)
    return pairs + [Pair(picture, sound, picture) for picture, sound in silent(folder)]


def silent(folder: Path) -> list[tuple[str, str]]:
    (table,) = folder.glob("*_plus_silent.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    return [(picture, sound) for picture, sound, _ in rows]


Layout = Callable[[Path], list[Pair]]
LAYOUTS = {"vgg-ss": vgg_ss, "flickr-soundnet": flickr_soundnet, "music": music}
EXTENDED = {"extended-vgg-ss": extended_vgg_ss, "extended-flickr-soundnet": extended_flickr_soundnet}


def squared(picture: Image.Image) -> Image.Image:
    """Squeeze a picture into a square of its area, as every region is."""
    side = round((picture.width * picture.height) ** 0.5)
    return picture.resize((side, side), Image.Resampling.BICUBIC)


@torch.inference_mode()
def nearest_patches(folder: Path, picture: Image.Image, sound: np.ndarray, threshold: str) -> tuple[np.ndarray, float]:
    """Return the located pixels of a dense map, and the cosine of the nearest patch."""
    model, processor = loaded(folder)
    pixels = processor(images=squared(picture))["pixel_values"]
    patches = PatchEncoder(model.sources["clip"]).get_image_features(pixels).pooler_output.reshape(4, -1)
    cosines = model.connector.project(patches, "clip", "image").double().numpy() @ sound
    # From left to right, then down. Between the centres of the patches the map is linear, beyond them constant.
    (upper_left, upper_right), (lower_left, lower_right) = cosines.reshape(2, 2)
    centres, places = (SIDE / 4, 3 * SIDE / 4), np.arange(SIDE) + 0.5
    upper, lower = (
        np.interp(places, centres, ends) for ends in ((upper_left, upper_right), (lower_left, lower_right))
    )
    down = np.interp(places, centres, (0, 1))[:, None]
    heat = (1 - down) * upper + down * lower
    bound = np.median(heat) if threshold == "half" else (heat.min() + heat.max()) / 2
    return heat >= bound, float(cosines.max())


def nearest_region(folder: Path, picture: Image.Image, sound: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the pixels of the box of the grid that is nearest to the sound, and its cosine."""
    regions = []
    for left, top, right, bottom in grid_boxes() * [*picture.size, *picture.size]:
        edges = (np.floor(left), np.floor(top), np.ceil(right), np.ceil(bottom))
        regions.append(squared(picture.crop(tuple(map(int, edges)))))
    cosines = embed(folder, "image", regions) @ sound
    return box_pixels(grid_boxes()[cosines.argmax()]), float(cosines.max())


@functools.cache
def truth_map(boxes: tuple[tuple[float, ...], ...], certain: int) -> list[list[float]]:
    return plain_map(list(boxes), certain)


def box_pixels(box: Sequence[float]) -> np.ndarray:
    return np.array(truth_map((tuple(box),), 1)) > 0


def located(folder: Path, data: Path, pairs: Sequence[Pair], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the cIoU of every pair, and the cosine of what is nearest to its sound."""
    ious, scores = [], []
    for pair in pairs:
        picture = Image.open(data / "frames" / f"{pair.picture}.jpg").convert("RGB")
        (sound,) = embed(folder, "audio", [data / "audio" / f"{pair.sound}.wav"])
        if method == "proposals":
            pixels, score = nearest_region(folder, picture, sound)
        else:
            pixels, score = nearest_patches(folder, picture, sound, method)
        ious.append(pair.ciou(pixels))
        scores.append(score)
        # A pixel of a map that is rounded to the other side must not decide.
        assert method == "proposals" or not any(0 < abs(ious[-1] - level) < 1e-3 for level in LEVELS)
    return np.array(ious), np.array(scores)


def of_ious(ious: np.ndarray) -> dict[str, float]:
    shares = [float(np.mean(ious >= level)) for level in LEVELS]
    return {"cIoU@0.5": shares[10], "AUC": float(auc(LEVELS, shares))}


def videos(pairs: Sequence[Pair]) -> np.ndarray:
    names = list(dict.fromkeys(pair.video for pair in pairs))
    return np.array([names.index(pair.video) for pair in pairs])


def options(method: str) -> tuple[str, ...]:
    return () if method == "proposals" else ("--method", "dense", "--threshold", method)


def check_ious(found: dict[str, Any], ious: np.ndarray, pairs: Sequence[Pair]) -> None:
    metrics, intervals = (found[name]["model"]["localization"] for name in ("metrics", "intervals"))
    assert metrics == pytest.approx(of_ious(ious), abs=1e-9)
    for name in metrics:
        ends = resampled(ious, lambda drawn, name=name: of_ious(drawn)[name], videos(pairs))
        assert intervals[name] == pytest.approx(ends, abs=1e-9)


@pytest.mark.parametrize("method", ["proposals", "half", "middle"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_located_is_what_is_nearest_to_the_sound(
    tmp_path: Path, tiny_model: Path, few_boxes: None, layout: str, method: str
) -> None:
    data = tmp_path / "data"
    pairs = LAYOUTS[layout](data)
    found = evaluate("localization", tiny_model, data, layout, tmp_path / "out", *options(method))
    ious, _ = located(tiny_model, data, pairs, method)
    of_key = {pair.key: iou for pair, iou in zip(pairs, ious, strict=True)}
    cases = found["best"] + found["worst"]
    assert [case["score"] for case in cases] == pytest.approx(
        [of_key[case["query"]["name"]] for case in cases], abs=1e-3
    )
    check_ious(found, ious, pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_answered_without_a_look_is_measured_alike(
    tmp_path: Path, tiny_model: Path, few_boxes: None, layout: str
) -> None:
    data = tmp_path / "data"
    pairs = LAYOUTS[layout](data)
    found = evaluate("localization", tiny_model, data, layout, tmp_path / "out")["metrics"]
    centre = (0.5 - 0.125**0.5, 0.5 - 0.125**0.5, 0.5 + 0.125**0.5, 0.5 + 0.125**0.5)
    for name, box in (("whole picture", (0, 0, 1, 1)), ("centre", centre)):
        ious = np.array([pair.ciou(box_pixels(box)) for pair in pairs])
        assert found[name]["localization"] == pytest.approx(of_ious(ious), abs=1e-9)
    ious = np.array([pair.ciou(box_pixels(box)) for pair in pairs for box in grid_boxes()])
    assert found["chance"]["localization"]["cIoU@0.5"] == pytest.approx(np.mean(ious >= 0.5), abs=1e-9)


def of_confidence(confidence: np.ndarray, sounds: np.ndarray, found: np.ndarray | None = None) -> dict[str, float]:
    """Return AP, with the largest precision at a recall or behind it, and max-F1; NaN where nothing sounds."""
    if not sounds.any():
        return {"AP": np.nan, "max-F1": np.nan}
    if found is not None:
        return plain_metrics(confidence, sounds, found)
    precision, recall, _ = precision_recall_curve(sounds, confidence)
    area = -(np.diff(recall) * np.maximum.accumulate(precision)[:-1]).sum()
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return {"AP": area, "max-F1": f1.max()}


@pytest.mark.parametrize("confidence", ["region", "picture"])
@pytest.mark.parametrize("method", ["proposals", "half"])
@pytest.mark.parametrize("layout", EXTENDED)
def test_both_forms_of_recognition_are_those_of_the_confidences(
    tmp_path: Path, tiny_model: Path, few_boxes: None, layout: str, method: str, confidence: str
) -> None:
    data = tmp_path / "data"
    pairs = EXTENDED[layout](data)
    more = (*options(method), "--confidence", confidence)
    found = evaluate("recognition", tiny_model, data, layout, tmp_path / "out", *more)
    ious, scores = located(tiny_model, data, pairs, method)
    if confidence == "picture":
        pictures = embed(tiny_model, "image", [data / "frames" / f"{pair.picture}.jpg" for pair in pairs])
        sounds = embed(tiny_model, "audio", [data / "audio" / f"{pair.sound}.wav" for pair in pairs])
        scores = (pictures * sounds).sum(axis=1)
    sounding, right = np.array([bool(pair.boxes) for pair in pairs]), ious >= 0.5
    # Or it would not show which scores belong to which pairs, and what was found.
    assert of_confidence(scores, sounding) != of_confidence(scores[::-1], sounding)
    assert of_confidence(scores, sounding) != of_confidence(scores, sounding, right)
    forms = {"recognition": None, "located recognition": right}
    for form, own in forms.items():
        numbers = of_confidence(scores, sounding, own)
        assert found["metrics"]["model"][form] == pytest.approx(numbers, abs=1e-9)
        for name in numbers:

            def drawn(rows: np.ndarray, own: np.ndarray | None = own, name: str = name) -> float:
                return of_confidence(scores[rows], sounding[rows], None if own is None else own[rows])[name]

            ends = resampled(np.arange(len(pairs)), drawn, videos(pairs))
            assert found["intervals"]["model"][form][name] == pytest.approx(ends, abs=1e-9)
    heard = [pair for pair in pairs if pair.boxes]
    check_ious(found, ious[sounding], heard)
