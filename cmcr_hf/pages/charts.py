"""What the report page draws, laid out for its template: heat map, maps of the space, curves of the training."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .page import data_uri

# Points a modality in a map, and classes up to which they are named in it.
MAP_POINTS = 400
NAMED_CLASSES = 24
# Classes up to which a cell of the heat map has its name and its value, and is more than one pixel.
VALUED_CLASSES, CELL_CLASSES, PIXEL_CLASSES = 20, 40, 512
CURVE_POINTS = 300

TERMS = {
    "loss": "total",
    "loss_overlap": "native pairs of both spaces (InfoNCE)",
    "loss_leaf": "leaf modalities of both spaces",
    "loss_leaf_overlap": "leaf of the extended space, overlap of the base (InfoNCE)",
    "loss_overlap_leaf": "overlap of the extended space, leaf of the base (InfoNCE)",
    "loss_intra": "modality gap within a space",
}
# Of matplotlib's viridis: even in lightness, and readable without red and green.
SCALE = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")


def _class_sums(
    rows: torch.Tensor, labels: Sequence[str], classes: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the rows of every class `(classes, dim)` and their numbers `(classes, 1)`."""
    code = {name: index for index, name in enumerate(classes)}
    index = torch.tensor([code[label] for label in labels])
    sums = torch.zeros(len(classes), rows.shape[1], dtype=torch.float64).index_add_(0, index, rows.double())
    return sums, torch.bincount(index, minlength=len(classes)).double()[:, None]


def heat_map(
    projected: Mapping[str, torch.Tensor], labels: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> dict[str, Any]:
    """Lay out the mean cosine of every class of queries (row) with every class of the gallery (column)."""
    means = {}
    for modality, rows in projected.items():
        sums, counts = _class_sums(rows, labels[modality], classes)
        means[modality] = sums / counts
    # The mean of cosines is the product of the means.
    cosine = means["query"] @ means["gallery"].T
    low, high = cosine.min().item(), cosine.max().item()
    nearest = cosine.argmax(1).tolist()
    lost = [
        {"query": classes[row], "gallery": classes[column], "found": cosine[row, column], "own": cosine[row, row]}
        for row, column in enumerate(nearest)
        if row != column
    ]
    heat: dict[str, Any] = {
        "low": low,
        "high": high,
        "scale": SCALE,
        "own": len(classes) - len(lost),
        "lost": sorted(lost, key=lambda entry: float(entry["own"] - entry["found"]))[:8],
        "names": [],
        "cells": [],
        "pixels": None,
    }
    levels = ((cosine - low) / (high - low or 1)).tolist()
    if len(classes) > CELL_CLASSES:
        shown = [row[:PIXEL_CLASSES] for row in levels[:PIXEL_CLASSES]]
        picture = Image.new("RGB", (len(shown), len(shown)))
        picture.putdata([_colour(level) for row in shown for level in row])
        file = io.BytesIO()
        picture.save(file, "PNG")
        return {**heat, "pixels": data_uri("image/png", file.getvalue())}
    cell, longest = (38 if len(classes) <= VALUED_CLASSES else 24), max(len(_short(name)) for name in classes)
    left, top = max(8 * longest + 20, 136), 6 * longest + 26
    values = cosine.tolist()
    heat["size"] = {"cell": cell, "left": left, "top": top, "side": cell * len(classes)}
    heat["names"] = [{"text": _short(name), "full": name, "at": (i + 0.5) * cell} for i, name in enumerate(classes)]
    heat["cells"] = [
        {
            "x": left + column * cell,
            "y": top + row * cell,
            "fill": "#{:02x}{:02x}{:02x}".format(*_colour(levels[row][column])),
            "ink": "#ffffff" if levels[row][column] < 0.62 else "#000000",
            "query": classes[row],
            "gallery": classes[column],
            "value": values[row][column],
            "own": row == column,
            "nearest": nearest[row] == column,
        }
        for row in range(len(classes))
        for column in range(len(classes))
    ]
    return heat


def _colour(level: float) -> tuple[int, int, int]:
    """Return the colour of a level from 0 to 1 on the scale."""
    place = min(max(level, 0.0), 1.0) * (len(SCALE) - 1)
    lower = min(int(place), len(SCALE) - 2)
    ends = [[int(SCALE[index][at : at + 2], 16) for at in (1, 3, 5)] for index in (lower, lower + 1)]
    red, green, blue = (round(a + (b - a) * (place - lower)) for a, b in zip(*ends, strict=True))
    return red, green, blue


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _axes(rows: torch.Tensor) -> torch.Tensor:
    """Return the two first principal axes of centred rows, `(dim, 2)`; of a single row, zeros."""
    _, singular, axes = torch.linalg.svd(rows, full_matrices=False)
    axes = axes[:2] * (singular[:2, None] > 1e-9)
    # The decomposition leaves the sign open: the largest component of an axis is positive.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return torch.nn.functional.pad(axes, (0, 0, 0, 2 - len(axes))).T


def maps(
    source: Mapping[str, torch.Tensor],
    projected: Mapping[str, torch.Tensor],
    labels: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> list[list[dict[str, Any]]]:
    """Lay out the items in a plane, before and after: first all on one scale, then each modality on its own.

    On one scale, the plane is that of the principal axes of all that is shown. Spaces of different widths have no
    plane in common; each is drawn by itself. On scales of their own, both modalities are centred, put into the plane
    of the gallery's principal axes and stretched to one spread. No class and no pair decides where a point lies.
    """
    rows = {
        modality: torch.linspace(0, len(part) - 1, min(len(part), MAP_POINTS)).round().long()
        for modality, part in source.items()
    }
    shown = {modality: [labels[modality][row] for row in part.tolist()] for modality, part in rows.items()}
    both = ("query", "gallery")
    comparable = source["query"].shape[1] == source["gallery"].shape[1]
    panels: list[list[tuple[str, tuple[str, ...]]]] = [[("before", both), ("after", both)]] * 2
    if not comparable:
        panels = [[("before", ("query",)), ("before", ("gallery",)), ("after", both)], [("after", both)]]
    groups = []
    for rescaled, group in enumerate(panels):
        drawn = []
        for when, modalities in group:
            spaces = source if when == "before" else projected
            parts = {modality: spaces[modality][rows[modality]].double() for modality in modalities}
            whole = torch.cat(list(parts.values()))
            middle = whole.mean(0)
            parts = {name: part - (part.mean(0) if rescaled else middle) for name, part in parts.items()}
            fitted = parts["gallery"] if rescaled else whole - middle
            axes = _axes(fitted)
            share = (fitted @ axes).square().sum() / fitted.square().sum().clamp(min=1e-12)
            points = {name: part @ axes for name, part in parts.items()}
            if rescaled:
                spreads = {name: part.square().mean().sqrt().clamp(min=1e-12) for name, part in points.items()}
                points = {name: part / spreads[name] for name, part in points.items()}
            reach = max(part.abs().max().item() for part in points.values()) or 1.0
            drawn.append(
                {
                    "when": when,
                    "modalities": modalities,
                    "share": share.item(),
                    "width": whole.shape[1],
                    "points": {name: len(part) for name, part in points.items()},
                    "classes": _map_classes({name: part / reach for name, part in points.items()}, shown, classes),
                }
            )
        groups.append(drawn)
    return groups


def _map_classes(
    parts: Mapping[str, torch.Tensor], labels: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return for every class its hue, its points and their middle by modality, and where its name is put, if it is."""
    code = {name: index for index, name in enumerate(classes)}
    # The y axis of a picture points down.
    spots = {
        modality: [(round(260 + 236 * x, 1), round(250 - 226 * y, 1)) for x, y in points.tolist()]
        for modality, points in parts.items()
    }
    entries: list[dict[str, Any]] = [
        # Steps of the golden angle keep the hues of neighbours apart, however many there are.
        {"name": name, "hue": round(index * 137.508 % 360), "spots": {}, "middles": {}, "label": None}
        for index, name in enumerate(classes)
    ]
    for modality, placed in spots.items():
        groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for label, spot in zip(labels[modality], placed, strict=True):
            groups[label].append(spot)
        for label, group in groups.items():
            entry = entries[code[label]]
            entry["spots"][modality] = group
            entry["middles"][modality] = tuple(round(sum(axis) / len(group), 1) for axis in zip(*group, strict=True))
    if len(classes) <= NAMED_CLASSES:
        _place_names(entries)
    return entries


def _place_names(entries: list[dict[str, Any]]) -> None:
    """Put every class's name beside one of its middles, where it covers no other name or middle; else leave it out."""
    middles = [middle for entry in entries for middle in entry["middles"].values()]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in middles]
    for entry in entries:
        text = _short(entry["name"])
        width = 8.2 * len(text) + 4
        for x, y in reversed(list(entry["middles"].values())):
            for left, baseline in (
                (x + 8, y + 4.5),
                (x - 8 - width, y + 4.5),
                (x - width / 2, y - 10),
                (x - width / 2, y + 20),
            ):
                box = (left, baseline - 12, left + width, baseline + 4)
                inside = box[0] >= 0 and box[2] <= 520 and box[1] >= 0 and box[3] <= 500
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    entry["label"] = {"x": round(left + 2, 1), "y": round(baseline, 1), "text": text}
                    break
            if entry["label"]:
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def gap(
    source: Mapping[str, torch.Tensor],
    projected: Mapping[str, torch.Tensor],
    labels: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> list[dict[str, Any]]:
    """Measure over all items, before (where the widths allow it) and after, how far queries and gallery are apart."""
    columns = []
    for when, spaces in (("before", source), ("after", projected)):
        if spaces["query"].shape[1] != spaces["gallery"].shape[1]:
            continue
        (query, query_counts), (gallery, gallery_counts) = (
            _class_sums(spaces[modality], labels[modality], classes) for modality in ("query", "gallery")
        )
        same = (query * gallery).sum().item()
        whole = (query.sum(0) @ gallery.sum(0)).item()
        pairs = (query_counts * gallery_counts).sum().item()
        others = query_counts.sum().item() * gallery_counts.sum().item() - pairs
        distance = spaces["query"].double().mean(0) - spaces["gallery"].double().mean(0)
        columns.append(
            {
                "when": when,
                "distance": distance.norm().item(),
                "same": same / pairs,
                "other": (whole - same) / others if others else None,
            }
        )
    return columns


def curves(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay out the loss and its terms over the steps; nothing where there is no log."""
    drawn = []
    for name, title in TERMS.items():
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if not points:
            continue
        every = math.ceil(len(points) / CURVE_POINTS)
        first, last = points[0], points[-1]
        points = sorted({*points[::every], last})
        top = ceiling(max(value for _, value in points))
        right = max(last[0], 1)
        spots = [(round(46 + 290 * step / right, 1), round(150 - 130 * value / top, 1)) for step, value in points]
        drawn.append(
            {"title": title, "name": name, "spots": spots, "first": first, "last": last, "top": top, "right": right}
        )
    return drawn


def ceiling(value: float) -> float:
    """Return the next round number: 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
