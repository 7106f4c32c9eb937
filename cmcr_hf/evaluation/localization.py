"""Audio-visual source localisation without training: where in a picture a sound comes from, by embeddings alone.

Two methods. `proposals`, that of the C-MCR paper: regions are cut out and embedded as pictures, and the one nearest
to the sound is the answer, a box. `dense`: the embeddings of patches (see [`PatchEncoder`]) give a map of cosines with
the sound, of which the hotter part is the answer. Measured by cIoU with what annotators drew (see [`consensus_iou`]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..modeling.image_loading_cmcr import load_image
from ..training.data import Items
from .bootstrap import Intervals, bootstrap_means
from .boxes import MAP_SIZE, above_middle, box_map, consensus_iou, consensus_map, hot_half, iou_values, region_ious
from .dense_maps import PatchEncoder, patch_embeds
from .embedding import EvaluatedModel
from .localization_data import SoundingPicture, SoundingPictures
from .proposals import Detector, grid_boxes, propose
from .regions import Regions
from .result import CHANCE, MODEL

WHOLE = np.array([[0.0, 0.0, 1.0, 1.0]])
# Of half of the picture's area: with the whole, what is answered without looking or listening.
_MARGIN = (1 - 0.5**0.5) / 2
CENTRE = np.array([[_MARGIN, _MARGIN, 1 - _MARGIN, 1 - _MARGIN]])
LOCALIZATION = "localization"
# Longer side of a drawn picture, in pixels.
DRAWN = 480


@dataclass(frozen=True)
class Located:
    """Where in a picture a sound was located.

    Args:
        pixels: `(224, 224)` bool, the answer.
        heat: `(224, 224)` cosines with the sound: of a pixel's place in the map, or of the nearest region around it.
        score: cosine of the nearest region or patch.
        box: the answer as a box, `(4,)` in parts of the picture, where it is one.
    """

    pixels: np.ndarray
    heat: np.ndarray
    score: float
    box: np.ndarray | None = None


@dataclass
class Measured:
    """What an evaluation of pairs gives.

    Args:
        metrics, intervals: as those of an [`EvaluationResult`].
        values: `(pairs,)`, by which the best and the worst pairs are told, the larger the better.
        remarks: what became of each pair.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, Intervals]]
    values: np.ndarray
    remarks: list[str]


class Localizer:
    """Locate the sounds of a data set in its pictures, both embedded when the object is made.

    `data` are the pairs whose picture and sound can be read, no other can be located; `sounds` are the embeddings of
    the sounds, by their paths; `detector` is the record of the detector, if any.

    Args:
        method: `proposals` or `dense`.
        detector: finds the proposals; a grid of boxes where there is none.
        threshold: of a dense map: `half` ([`hot_half`]) or `middle` ([`above_middle`]).

    Raises:
        ValueError: no pair can be read, or the image source has no patches that can be embedded.

    Example:
        >>> model = EvaluatedModel("my-org/cmcr-clip-clap", Path("runs/mine"), modalities=["image", "audio"])
        >>> data = load_vgg_ss("VGG-SS")
        >>> localizer = Localizer(model, data, "proposals")
        >>> localizer.locate(localizer.data.pairs[0]).box
    """

    def __init__(
        self,
        model: EvaluatedModel,
        data: SoundingPictures,
        method: str,
        detector: Detector | None = None,
        threshold: str = "half",
    ) -> None:
        names = data.images
        self._pictures = {name: place for place, name in enumerate(names)}
        sounds = model.source_store(Items.listed("audio", data.sounds, data.folder), strict=False)
        self.sounds = dict(zip(sounds.keys(), model.project(sounds.tensor().float(), "audio"), strict=True))
        self.detector = None if detector is None else detector.record
        self._model, self._encoder = model, None
        self._answer = {"half": hot_half, "middle": above_middle}[threshold]
        boxes = [WHOLE] * len(names)
        if method == "dense":
            self._encoder = PatchEncoder(model.model.sources[model.model.config.space_of("image", None)])
        elif detector is None:
            boxes = [grid_boxes()] * len(names)
        else:
            kept = model.folder / "proposals.jsonl"
            boxes = propose(detector, names, data.folder, kept, progress=model.progress)
        self._regions = Regions(names, data.folder, boxes)
        self._store = model.source_store(self._regions, encoder=self._encoder, strict=False)
        whole = names
        # Where the regions of each picture are in the store.
        self._starts = self._regions.starts
        if self._store.skipped or not all(map(len, boxes)):
            there = {*self._store.keys()}
            counts = [
                sum(f"{name} {place}" in there for place in range(len(own)))
                for name, own in zip(names, boxes, strict=True)
            ]
            self._starts = np.cumsum([0, *counts]).tolist()
            whole = [name for name, own, count in zip(names, boxes, counts, strict=True) if 0 < count == len(own)]
        self.data = data.readable({*self.sounds, *whole})

    def boxes(self, pair: SoundingPicture) -> np.ndarray | None:
        """Return the proposals in a pair's picture, `(n, 4)` in parts of it, where the method has such."""
        return None if self._encoder is not None else self._regions.boxes[self._pictures[pair.image]]

    def locate(self, pair: SoundingPicture) -> Located:
        """Locate the sound of a pair in its picture."""
        picture, sound = self._pictures[pair.image], self.sounds[pair.audio]
        rows = self._store.read(range(*self._starts[picture : picture + 2]))
        if self._encoder is None:
            return _nearest_region(self._regions.boxes[picture], (self._model.project(rows, "image") @ sound).numpy())
        patches = patch_embeds(rows, self._encoder.side)[0]
        cosines = self._model.project(patches.flatten(0, 1), "image") @ sound
        enlarged = F.interpolate(cosines.reshape(1, 1, *patches.shape[:2]), (MAP_SIZE, MAP_SIZE), mode="bilinear")
        heat = enlarged[0, 0].numpy()
        return Located(self._answer(heat), heat, float(cosines.max()))


def _nearest_region(boxes: np.ndarray, scores: np.ndarray) -> Located:
    """Return the region of the largest score, the first of those that share it."""
    best = int(scores.argmax())
    heat = np.full((MAP_SIZE, MAP_SIZE), scores.min())
    for row in scores.argsort(kind="stable"):
        heat[box_map(boxes[row])] = scores[row]
    return Located(box_map(boxes[best]), heat, float(scores[best]), boxes[best])


def measure_localization(
    localizer: Localizer, data: SoundingPictures, *, resamples: int = 1000, seed: int = 0, progress: bool = True
) -> Measured:
    """Measure cIoU@0.5 and AUC, with intervals over videos, beside answers that know no sound.

    Those are, of proposals, a random one, by the exact expectation; the whole picture; and the centre.
    """
    ious, scores = locate_pairs(localizer, data, progress=progress)
    methods = {**_blind_values(localizer, data), MODEL: iou_values(ious)}
    measured = Measured({}, {}, ious, [f"cIoU {ious[row]:.2f}, cosine {scores[row]:.2f}" for row in range(len(ious))])
    for method, values in methods.items():
        metrics, intervals = mean_metrics(values, data.videos(), resamples, seed)
        measured.metrics[method], measured.intervals[method] = {LOCALIZATION: metrics}, {LOCALIZATION: intervals}
    return measured


def locate_pairs(
    localizer: Localizer, data: SoundingPictures, *, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Locate all pairs: their cIoUs, 0 where nothing sounds, and the cosines of what is nearest, `(pairs,)` each."""
    ious, scores = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    for row, pair in enumerate(tqdm(data.pairs, desc="located", unit="pair", disable=not progress)):
        located = localizer.locate(pair)
        ious[row] = consensus_iou(located.pixels, consensus_map(pair.boxes, data.consensus))
        scores[row] = located.score
    return ious, scores


def mean_metrics(
    values: dict[str, np.ndarray], videos: torch.Tensor, resamples: int, seed: int
) -> tuple[dict[str, float], Intervals]:
    """Return the means of values `(pairs,)` by metric, and their intervals over videos."""
    rows = {name: torch.from_numpy(value) for name, value in values.items()}
    intervals = bootstrap_means(rows, resamples=resamples, seed=seed, groups=videos)
    return {name: float(value.mean()) for name, value in values.items()}, intervals


def _blind_values(localizer: Localizer, data: SoundingPictures) -> dict[str, dict[str, np.ndarray]]:
    """Return by answer that knows no sound what its metrics are the means of, `(pairs,)` each."""
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for pair in data.pairs:
        answers = {"whole picture": WHOLE, "centre": CENTRE}
        if (proposals := localizer.boxes(pair)) is not None:
            answers = {CHANCE: proposals, **answers}
        truth = consensus_map(pair.boxes, data.consensus)
        for name, boxes in answers.items():
            values = iou_values(region_ious(boxes, truth))
            found.setdefault(name, []).append({metric: value.mean() for metric, value in values.items()})
    return {
        name: {metric: np.array([row[metric] for row in rows]) for metric in rows[0]} for name, rows in found.items()
    }


def draw_located(image: Any, pair: SoundingPicture, located: Located) -> Image.Image:
    """Draw what was located over a picture: the heat map, the answer bright, its box red, those of annotators green.

    Args:
        image: of the pair, as [`load_image`] takes it.
    """
    picture = load_image(image)
    picture.thumbnail((DRAWN, DRAWN), Image.Resampling.LANCZOS)
    heat = (located.heat - located.heat.min()) / max(float(np.ptp(located.heat)), 1e-9)
    heat = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))[
        ..., None
    ]
    answer = np.asarray(Image.fromarray(located.pixels).resize(picture.size, Image.Resampling.NEAREST))[..., None]
    # From transparent over red to yellow; what is not of the answer is darker.
    colours = np.concatenate([np.full_like(heat, 255), 255 * heat, np.zeros_like(heat)], axis=-1)
    mixed = ((1 - heat / 2) * np.asarray(picture) + heat / 2 * colours) * np.where(answer, 1, 0.5)
    drawn = Image.fromarray(mixed.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    outlines: list[tuple[Any, str]] = [(box, "lime") for box in pair.boxes]
    for box, colour in [*outlines, *([] if located.box is None else [(located.box, "red")])]:
        left, top, right, bottom = np.clip(box, 0, 1) * [*drawn.size, *drawn.size]
        if right - left >= 1 and bottom - top >= 1:
            pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=3)
    return drawn
