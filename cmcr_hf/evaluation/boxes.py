"""Boxes and maps of sounding regions, and how far a located region agrees with what annotators drew.

Maps are squares of 224 x 224 pixels over the whole picture, whatever its shape, as in the official code of "Localizing
Visual Sounds the Hard Way" (arXiv 2104.02691; hche11/Localizing-Visual-Sounds-the-Hard-Way, test.py and utils.py) and
of all that compare with it. Boxes are `(x0, y0, x1, y1)` in parts of the picture, from its upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]

# Pixels of the side of a map.
MAP_SIZE = 224
# The level of the headline number, cIoU@0.5.
LEVEL = 0.5


def consensus_map(boxes: Sequence[Box], consensus: int = 1) -> np.ndarray:
    """Return how far annotators agree that a pixel sounds: `min(sum_j m_j / consensus, 1)`, `(224, 224)` in [0, 1].

    m_j is 1 within box j and 0 elsewhere; boxes of one annotator that overlap count as often as they do. Corners are
    clipped to the picture and cut down to whole pixels, the later ones exclusive: a box may have no pixel left.
    Without boxes, nothing sounds.

    Args:
        boxes: of all annotators.
        consensus: how many boxes make a pixel certain: 2 for Flickr-SoundNet with its three annotators, 1 for the
            others, where the map is the union of the boxes.
    """
    total = np.zeros((MAP_SIZE, MAP_SIZE))
    for box in boxes:
        total += box_map(box)
    return np.minimum(total / consensus, 1)


def box_map(box: Box) -> np.ndarray:
    """Return the pixels of a box, `(224, 224)` bool."""
    left, top, right, bottom = (np.clip(box, 0, 1) * MAP_SIZE).astype(int)
    inside = np.zeros((MAP_SIZE, MAP_SIZE), bool)
    inside[top:bottom, left:right] = True
    return inside


def consensus_iou(located: np.ndarray, truth: np.ndarray) -> float:
    """Return the cIoU of located pixels: `sum(located * truth) / (sum(truth) + sum(located where truth is 0))`.

    Where nothing is true, or nothing is located, it is 0: there is nothing that could be found, or nothing is.

    Args:
        located: `(224, 224)` bool.
        truth: a [`consensus_map`].
    """
    hit = truth[located].sum()
    return float(hit / (truth.sum() + (located & (truth == 0)).sum())) if hit else 0.0


def region_ious(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the cIoU of each box as if it was located, `(n,)`, those of [`consensus_iou`] and [`box_map`] at once.

    Args:
        boxes: `(n, 4)` in parts of the picture.
        truth: a [`consensus_map`].
    """
    corners = (boxes.clip(0, 1) * MAP_SIZE).astype(int)
    left, top = corners[:, 0], corners[:, 1]
    # A box whose corners are in the wrong order has no pixel.
    right, bottom = np.maximum(corners[:, 2], left), np.maximum(corners[:, 3], top)
    sums = []
    for part in (truth, truth == 0):
        total = np.zeros((MAP_SIZE + 1, MAP_SIZE + 1))
        total[1:, 1:] = part.cumsum(0).cumsum(1)
        sums.append(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])
    hit, wrong = sums
    # Where nothing is true, nothing is hit.
    return hit / np.maximum(truth.sum() + wrong, 1) if truth.any() else np.zeros(len(boxes))


def iou_values(ious: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each cIoU what of it the metrics are the means of: `{"cIoU@0.5", "AUC"}`, of the shape of `ious`.

    cIoU@0.5 is the share of pictures with a cIoU of at least 0.5. AUC is the area under that share over the levels 0,
    0.05, ..., 1 in place of 0.5, by the trapezoidal rule.
    """
    # Not np.arange or linspace: 0.05 * i rounds as it does in the official code, which decides ties.
    levels = np.array([0.05 * step for step in range(21)])
    reached = (ious[..., None] >= levels).astype(float)
    areas = ((reached[..., 1:] + reached[..., :-1]) / 2 * np.diff(levels)).sum(-1)
    return {"cIoU@0.5": (ious >= LEVEL).astype(float), "AUC": areas}


def hot_half(heat: np.ndarray) -> np.ndarray:
    """Return the hotter half of the pixels of a heat map, and those that tie with the last of them.

    The protocol of Chen et al., EZ-VSL and SLAVC, whose tables are made so: no threshold is chosen on the test data.
    It cannot be right for small objects, of which half of the picture is too much.
    """
    return heat >= np.sort(heat, axis=None)[heat.size // 2]


def above_middle(heat: np.ndarray) -> np.ndarray:
    """Return the pixels nearer to the hottest than to the coldest; all of a map that is constant."""
    return heat >= heat.min() + np.ptp(heat) / 2


def suppress_overlaps(boxes: np.ndarray, most: float = 0.7) -> list[int]:
    """Return which boxes `(n, 4)` stay, of those given best first, when each removes later ones with a higher IoU."""
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept: list[int] = []
    for row, box in enumerate(boxes):
        sides = np.minimum(boxes[kept, 2:], box[2:]) - np.maximum(boxes[kept, :2], box[:2])
        common = np.prod(sides.clip(0), axis=1)
        if (common <= most * (areas[kept] + areas[row] - common)).all():
            kept.append(row)
    return kept
