"""Counterfactual audio-image recognition: whether a sound comes from anything in a picture, and whether it was found.

Half of the pairs of the extended data sets have nothing in the picture that sounds. The match of sound and picture is
the confidence that there is, as in "A Closer Look at Weakly-Supervised Audio-Visual Source Localization" (SLAVC, arXiv
2209.09634), whose located form counts a pair only where the source was found too.
"""

from __future__ import annotations

import numpy as np
import torch

from ..training.data import Items
from .bootstrap import bootstrap_statistic
from .boxes import LEVEL, iou_values
from .embedding import EvaluatedModel
from .localization import LOCALIZATION, Localizer, Measured, locate_pairs, mean_metrics
from .localization_data import SILENT, SoundingPictures
from .result import MODEL

RECOGNITION, LOCATED = "recognition", "located recognition"


def measure_recognition(
    localizer: Localizer,
    data: SoundingPictures,
    matches: np.ndarray | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Measured:
    """Measure AP and max-F1, of the confidence alone and located, and the localisation of the pairs that sound.

    Intervals are over videos. Beside the model stands what one confidence for all gives.

    Args:
        matches: `(pairs,)` confidences, such as those of [`picture_matches`]; by default the cosine of the sound with
            the nearest region or patch.
    """
    sounding = np.array([pair.label != SILENT for pair in data.pairs])
    ious, scores = locate_pairs(localizer, data, progress=progress)
    confidence, located = scores if matches is None else matches, ious >= LEVEL

    def both(confidence: np.ndarray, rows: np.ndarray) -> dict[str, dict[str, float]]:
        alone = recognition_metrics(confidence[rows], sounding[rows])
        return {RECOGNITION: alone, LOCATED: recognition_metrics(confidence[rows], sounding[rows], located[rows])}

    def flat(rows: torch.Tensor) -> dict[str, float]:
        metrics = both(confidence, rows.numpy())
        return {f"{group}/{name}": value for group, values in metrics.items() for name, value in values.items()}

    every = np.arange(len(confidence))
    spread = bootstrap_statistic(flat, data.videos(), resamples=resamples, seed=seed, progress=progress)
    _, videos = data.videos()[sounding].unique(return_inverse=True)
    means, mean_spread = mean_metrics(iou_values(ious[sounding]), videos, resamples, seed)
    intervals = {
        group: {name.partition("/")[2]: ends for name, ends in spread.items() if name.startswith(f"{group}/")}
        for group in (RECOGNITION, LOCATED)
    }
    threshold = best_threshold(confidence, sounding)
    remarks = [
        (f"sounds, cIoU {ious[row]:.2f}" if sounding[row] else "nothing sounds")
        + f", match {confidence[row]:.2f}, accepted from {threshold:.2f} on"
        for row in every
    ]
    return Measured(
        metrics={
            "all accepted": both(np.zeros(len(confidence)), every),
            MODEL: {**both(confidence, every), LOCALIZATION: means},
        },
        intervals={MODEL: {**intervals, LOCALIZATION: mean_spread}},
        values=np.where(sounding, 1, -1) * (confidence - threshold),
        remarks=remarks,
    )


def picture_matches(model: EvaluatedModel, localizer: Localizer, data: SoundingPictures) -> np.ndarray:
    """Return the cosine of the whole picture and the sound of each pair, `(pairs,)`."""
    pictures = dict(zip(data.images, model.embeds(Items.listed("image", data.images, data.folder)), strict=True))
    matches = [pictures[pair.image] @ localizer.sounds[pair.audio] for pair in data.pairs]
    return torch.stack(matches).double().numpy()


def recognition_curve(
    confidence: np.ndarray, sounding: np.ndarray, located: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and threshold wherever that makes a difference, from the highest confidence down.

    Pairs of one confidence are accepted together. Of the accepted ones, a sounding one that is located is a true
    positive, any other a false one; a sounding one that is not accepted is a false negative. So, as in SLAVC's
    `calc_precision_recall`, one that is accepted and not located lowers the precision alone; and where nothing was
    located and nothing is left to be, the recall is 1.

    Args:
        confidence: `(pairs,)`, larger is more certain.
        sounding: `(pairs,)` bool, whether something in the picture sounds.
        located: `(pairs,)` bool, whether it was found; by default it need not be.
    """
    order = np.argsort(-confidence, kind="stable")
    last = np.append(np.diff(confidence[order]) != 0, True)
    accepted = np.arange(1, len(order) + 1)[last]
    found = sounding if located is None else sounding & located
    true = np.cumsum(found[order])[last]
    lost = sounding.sum() - np.cumsum(sounding[order])[last]
    known = true + lost
    return true / accepted, np.where(known > 0, true / np.maximum(known, 1), 1.0), confidence[order][last]


def recognition_metrics(
    confidence: np.ndarray, sounding: np.ndarray, located: np.ndarray | None = None
) -> dict[str, float]:
    """Return `{"AP", "max-F1"}` of a [`recognition_curve`], in [0, 1]; NaN where no pair sounds, which none can find.

    AP is the sum over the steps of recall, from 0, each times the largest precision there or behind it. SLAVC's own
    code takes some two hundred of the thresholds for AP and ten for F1, and leaves the first step out.

    Raises:
        ValueError: no pairs, or a confidence that is not finite.
    """
    wrong = int((~np.isfinite(confidence)).sum())
    if not len(confidence) or wrong:
        raise ValueError(f"Got {len(confidence)} confidences, {wrong} of them not finite, expected numbers.")
    if not sounding.any():
        return {"AP": float("nan"), "max-F1": float("nan")}
    precision, recall, _ = recognition_curve(confidence, sounding, located)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return {"AP": float((np.diff(recall, prepend=0) * best).sum()), "max-F1": float(_f1(precision, recall).max())}


def best_threshold(confidence: np.ndarray, sounding: np.ndarray) -> float:
    """Return the confidence from which on pairs are accepted where F1 is largest, the highest such one."""
    precision, recall, thresholds = recognition_curve(confidence, sounding)
    return float(thresholds[_f1(precision, recall).argmax()])


def _f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    total = precision + recall
    f1: np.ndarray = 2 * precision * recall / np.where(total > 0, total, 1)
    return f1
