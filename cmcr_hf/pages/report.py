"""The report page of a connection: what it found, beside what finds as much without training, and without truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.connection import DIRECTIONS, Metrics, RetrievalSet
from ..modeling.modeling_cmcr import CMCRConnector
from ..training.data import Item
from ..training.recipe import Recipe
from .charts import NAMED_CLASSES, PIXEL_CLASSES, VALUED_CLASSES, curves, gap, heat_map, maps
from .page import picture_uri, render, sound_uri, write_page

SOUNDS, PICTURES = 12, 5

TRAINING_FREE = ("one-way bridge", "two-way bridge", "posterior matching")
# What stands behind a row's name, up to a comma.
METHODS = {
    "chance": ("reference", "a random ranking, its exact expectation"),
    "unconnected": ("no training", "cosine between the source spaces as if they were one"),
    "ridge": ("fitted on texts", "the linear map that carries the texts of one space onto those of the other"),
    "procrustes": ("fitted on texts", "the rotation that does"),
    "one-way bridge": ("no training", "the query becomes a mixture of the texts that are nearest to it"),
    "two-way bridge": ("no training", "the mean of that from both sides"),
    "posterior matching": ("no training", "the probability that both sides draw the same text"),
    "closed cascade": ("knows the classes", "the query is named first, out of the names of the test classes alone"),
    "C-MCR": ("trained", "this connection: two small projectors, no texts at the query"),
    "null": ("reference", "the same training with every text paired with a text of another concept"),
}


def write_report(
    path: Path,
    recipe: Recipe,
    connector: CMCRConnector,
    items: RetrievalSet,
    media: Mapping[str, Sequence[Item]],
    table: Mapping[str, Metrics],
    *,
    spread: Mapping[str, Metrics] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
) -> None:
    """Write what a connection found as one HTML file of bounded size that needs no network.

    The same arguments give the same bytes. What cannot be shown (items that are no files, a missing log) is named.

    Args:
        connector: trained, in eval mode.
        media: under `audio` and `image` the items behind the rows of `items`; a value that is no path is not shown.
        table: metrics by method, as `baseline_metrics` and `connector_metrics` give them, with a row `C-MCR`.
        spread: standard deviations of the rows that are means of several runs.
        data: rows of `name`, `role`, `rows`, `licence`.
        history: Trainer's log with the terms of the loss.
        command: what made the results.
    """
    with torch.no_grad():
        projected = {
            modality: connector.project(rows.to(connector.device), space).float().cpu()
            for modality, rows, space in (("audio", items.audio, "clap"), ("image", items.image, "clip"))
        }
    labels = {"audio": list(items.audio_labels), "image": list(items.image_labels)}
    classes = sorted(set(labels["audio"]))
    source = {"audio": items.audio.float().cpu(), "image": items.image.float().cpu()}
    context = {
        "recipe": recipe,
        "sources": [
            {
                "space": space,
                "name": Path(spec.id).name if Path(spec.id).is_absolute() else spec.id,
                "licence": spec.licence,
            }
            for space, spec in recipe.sources.items()
        ],
        "data": data,
        "command": command,
        "counts": {**{modality: len(rows) for modality, rows in labels.items()}, "class": len(classes)},
        "methods": METHODS,
        "verdict": _verdict(table, spread or {}),
        "tables": [_metric_table(table, spread or {}, direction) for direction in DIRECTIONS],
        "heat": heat_map(projected, labels, classes),
        "maps": maps(source, projected, labels, classes),
        "gap": gap(source, projected, labels, classes),
        "curves": curves(history),
        "validation": {
            name.removeprefix("eval_"): value
            for entry in history
            for name, value in entry.items()
            if name == "eval_loss" or (name.startswith("eval_") and "_R@" in name)
        },
        "sounds": _sounds(projected, labels, media),
        "files": {modality: any(isinstance(item.value, Path) for item in part) for modality, part in media.items()},
        "limits": {
            "named": NAMED_CLASSES,
            "valued": VALUED_CLASSES,
            "pictures": PICTURES,
            "pixels": PIXEL_CLASSES,
        },
    }
    write_page(path, render("report.html.jinja", context))


def _row(table: Mapping[str, Any], method: str) -> str | None:
    """Return the name of a method's row, behind which the number of its runs may stand."""
    return next((name for name in table if name.split(",")[0] == method), None)


def _verdict(table: Mapping[str, Metrics], spread: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """Compare the connection's mAP with the best training-free row and the null, one entry a direction."""
    connection, null = _row(table, "C-MCR"), _row(table, "null")
    if connection is None:
        raise ValueError(f"Got the methods {', '.join(table)}, expected C-MCR among them. Pass its metrics in table=.")
    verdict = []
    for direction in DIRECTIONS:
        best = max((name for name in TRAINING_FREE if name in table), key=lambda name: table[name][direction]["mAP"])
        value, rival = table[connection][direction]["mAP"], table[best][direction]["mAP"]
        deviation = spread[connection][direction]["mAP"] if connection in spread else None
        # Without a spread, what three decimals cannot tell apart.
        margin = deviation if deviation is not None else 0.0005
        verdict.append(
            {
                "direction": direction,
                "value": value,
                "deviation": deviation,
                "best": best,
                "rival": rival,
                "order": "level with" if abs(value - rival) <= margin else "above" if value > rival else "below",
                "null": table[null][direction]["mAP"] if null else None,
                "null_deviation": spread[null][direction]["mAP"] if null is not None and null in spread else None,
                "chance": table["chance"][direction]["mAP"],
            }
        )
    return verdict


def _metric_table(table: Mapping[str, Metrics], spread: Mapping[str, Metrics], direction: str) -> dict[str, Any]:
    metrics = list(table["chance"][direction])
    best = {metric: max(row[direction][metric] for row in table.values()) for metric in metrics}
    rows = []
    for name, row in table.items():
        cells = [
            {
                "value": row[direction][metric],
                "deviation": spread[name][direction][metric] if name in spread else None,
                "chance": table["chance"][direction][metric],
                "best": row[direction][metric] == best[metric],
            }
            for metric in metrics
        ]
        rows.append({"name": name, "method": name.split(",")[0], "cells": cells})
    return {"direction": direction, "metrics": metrics, "rows": rows}


def _sounds(
    projected: Mapping[str, torch.Tensor], labels: Mapping[str, Sequence[str]], media: Mapping[str, Sequence[Item]]
) -> list[dict[str, Any]]:
    """Return some sounds, spread evenly over the classes, each with the pictures that the connection puts first."""
    rows_by_class = defaultdict(list)
    for row, label in enumerate(labels["audio"]):
        rows_by_class[label].append(row)
    classes = sorted(rows_by_class)
    if len(classes) > SOUNDS:
        classes = [classes[index * len(classes) // SOUNDS] for index in range(SOUNDS)]
    rounds = range(max(len(rows_by_class[name]) for name in classes))
    rows = [rows_by_class[name][turn] for turn in rounds for name in classes if turn < len(rows_by_class[name])]
    sounds = []
    for row in rows[:SOUNDS]:
        cosine = projected["image"] @ projected["audio"][row]
        found = cosine.sort(descending=True, stable=True).indices[:PICTURES].tolist()
        item = media["audio"][row]
        uri, problem = _shown(item, sound_uri)
        results = []
        for picture in found:
            picture_item = media["image"][picture]
            picture_data, picture_problem = _shown(picture_item, picture_uri)
            results.append(
                {
                    "label": labels["image"][picture],
                    "name": picture_item.key,
                    "cosine": cosine[picture].item(),
                    "right": labels["image"][picture] == labels["audio"][row],
                    "uri": picture_data,
                    "problem": picture_problem,
                }
            )
        sounds.append(
            {"label": labels["audio"][row], "name": item.key, "uri": uri, "problem": problem, "results": results}
        )
    return sounds


def _shown(item: Item, encode: Callable[[Any], str]) -> tuple[str | None, str | None]:
    """Return an item's data URI, or None and the reason."""
    if not isinstance(item.value, Path):
        return None, "not a file"
    try:
        return encode(item.value), None
    except ValueError:
        return None, "cannot be read"
    except ImportError:
        return None, "the libsndfile that is installed cannot write MP3"
