"""The report page of a connection: what it found, beside what finds as much without training, and without truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.baselines import TRAINING_FREE
from ..evaluation.connection import CLASSIFICATION, ROWS, Differences, Metrics, RetrievalSet, main_metric
from ..modeling.modeling_cmcr import CMCRConnector
from ..training.data import Item
from ..training.recipe import Recipe
from .charts import NAMED_CLASSES, PIXEL_CLASSES, VALUED_CLASSES, curves, gap, heat_map, maps
from .page import cloud_uri, picture_uri, render, sound_uri, write_page

QUERIES, RESULTS = 12, 5

# One and many, as a reader says.
NOUNS = {
    "audio": ("sound", "sounds"),
    "image": ("picture", "pictures"),
    "text": ("text", "texts"),
    "point_cloud": ("point cloud", "point clouds"),
}

# What stands behind a row's name, up to a comma; {bank} is what connects.
METHODS = {
    "chance": ("reference", "a random ranking, its exact expectation"),
    "unconnected": ("no training", "cosine between the source spaces as if they were one"),
    "ridge": ("fitted on {bank}", "the linear map that carries the {bank} of one space onto those of the other"),
    "procrustes": ("fitted on {bank}", "the rotation that does"),
    "linear map": ("trained on {bank}", "one linear layer, trained by InfoNCE to find one space's in the other's"),
    "one-way bridge": ("no training", "the query becomes a mixture of the {bank} that are nearest to it"),
    "two-way bridge": ("no training", "the mean of that from both sides"),
    "posterior matching": ("no training", "the probability that both sides draw the same of the {bank}"),
    "closed cascade": ("knows the classes", "the query is named first, out of the names of the test classes alone"),
    "C-MCR": ("trained", "this connection: two small projectors, no {bank} at the query"),
    "Ex-MCR": (
        "trained",
        "this connection: CLIP as it is, a small projector a space beside it, no {bank} at the query",
    ),
    "bridge distillation": (
        "trained",
        "this connection: two small projectors that were taught posterior matching, no {bank} at the query",
    ),
    "null": ("reference", "the same training with the {bank} of both spaces paired across concepts"),
}


def write_report(
    path: Path,
    recipe: Recipe,
    connector: CMCRConnector,
    sets: Sequence[RetrievalSet],
    media: Mapping[str, Sequence[Item]],
    table: Mapping[str, Metrics],
    *,
    spread: Mapping[str, Metrics] | None = None,
    differences: Differences | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    histories: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    command: str | None = None,
) -> None:
    """Write what a connection found as one HTML file of bounded size that needs no network.

    The same arguments give the same bytes. What cannot be shown (items that are no files, a missing log) is named.

    Args:
        connector: trained, in eval mode.
        sets: what was measured; the page draws the first, whose two sides are retrieved from each other.
        media: by modality the items behind the rows of the sets; texts and files are shown.
        table: metrics by method, as `baseline_metrics` and `connector_metrics` give them, with a row of the
            connection, by the name that `ROWS` gives its objective.
        spread: standard deviations of the rows that are means of several runs.
        differences: of what needs no training from the connection, whose row may be a mean that it is among. Without
            them, the page does not say which is better.
        data: rows of `name`, `role`, `rows`, `licence`.
        histories: Trainer's logs with the terms of the loss, by the space that is connected with CLIP.
        command: what made the results.
    """
    sides = {"query": sets[0].query, "gallery": sets[0].gallery}
    with torch.no_grad():
        projected = {
            role: connector.project(side.embeds.to(connector.device), side.space, side.modality).float().cpu()
            for role, side in sides.items()
        }
    labels = {role: list(side.labels) for role, side in sides.items()}
    classes = sorted(set(labels["query"]))
    source = {role: side.embeds.float().cpu() for role, side in sides.items()}
    modalities = {role: side.modality for role, side in sides.items()}
    bridges = recipe.bridges
    # Where both sides are leaves of spaces that were connected with CLIP, they are what no training paired.
    leaf = bridges[0].leaves["clip"] if len(bridges) == 1 else modalities["gallery"]
    items = {role: media[side.modality] for role, side in sides.items()}
    one, many = (
        {role: NOUNS[name][number] for role, name in {**modalities, "leaf": leaf}.items()} for number in (0, 1)
    )
    many["bank"] = " and ".join(NOUNS[bridge.overlap][1] for bridge in bridges)
    row = ROWS[recipe.objective]
    logs = [(space, log) for space, log in (histories or {}).items() if log]
    directions = list(next(iter(table.values())))
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
        "counts": {**{role: len(rows) for role, rows in labels.items()}, "class": len(classes)},
        "facts": [(count, NOUNS[modality][count != 1]) for modality, count in _tested(sets).items()],
        "one": one,
        "many": many,
        "space_of": {role: side.space.upper() for role, side in sides.items()},
        "ways": {direction: _way(direction) for direction in directions},
        "classified": CLASSIFICATION in directions,
        "methods": {name: tuple(part.format(bank=many["bank"]) for part in parts) for name, parts in METHODS.items()},
        "row": row,
        "verdict": _verdict(table, spread or {}, differences or {}, row),
        "tables": [_metric_table(table, spread or {}, direction) for direction in directions],
        "heat": heat_map(projected, labels, classes),
        "maps": maps(source, projected, labels, classes),
        "gap": gap(source, projected, labels, classes),
        "trainings": [
            {
                "space": space.upper() if len(bridges) > 1 else None,
                "curves": curves(log),
                "validation": {
                    name.removeprefix("eval_"): value
                    for entry in log
                    for name, value in entry.items()
                    if name == "eval_loss" or (name.startswith("eval_") and "_R@" in name)
                },
            }
            for space, log in logs
        ],
        "queries": _queries(projected, labels, items, modalities),
        "files": {role: any(item.value is not None for item in part) for role, part in items.items()},
        "limits": {
            "named": NAMED_CLASSES,
            "valued": VALUED_CLASSES,
            "results": min(RESULTS, len(labels["gallery"])),
            "pixels": PIXEL_CLASSES,
        },
    }
    write_page(path, render("report.html.jinja", context))


def _tested(sets: Sequence[RetrievalSet]) -> dict[str, int]:
    """Return the numbers of the items that were held back, by modality."""
    sides = [side for part in sets if not part.classify for side in (part.query, part.gallery)]
    return {side.modality: len(side.labels) for side in sides}


def _row(table: Mapping[str, Any], method: str) -> str | None:
    """Return the name of a method's row, behind which the number of its runs may stand."""
    return next((name for name in table if name.split(",")[0] == method), None)


def _verdict(
    table: Mapping[str, Metrics], spread: Mapping[str, Metrics], differences: Differences, row: str
) -> list[dict[str, Any]]:
    """Compare the connection's mAP, or its top-1, with the best training-free row and the null, by direction."""
    connection, null = _row(table, row), _row(table, "null")
    if connection is None:
        raise ValueError(f"Got the methods {', '.join(table)}, expected {row} among them. Pass its metrics in table=.")
    verdict = []
    for direction in table[connection]:
        metric = main_metric(direction)
        rows = {name: row[direction][metric] for name, row in table.items() if direction in row}
        best = max((name for name in TRAINING_FREE if name in table), key=lambda name: rows[name])
        value, rival = rows[connection], rows[best]
        deviation = spread[connection][direction][metric] if connection in spread else None
        interval = differences.get(direction, {}).get(best)
        order = None
        if interval is not None:
            (low, high), lead, margin = interval, rival - value, deviation or 0
            order = "below" if low > 0 and lead > margin else "above" if high < 0 and -lead > margin else "level with"
        verdict.append(
            {
                "direction": direction,
                "metric": metric,
                "value": value,
                "deviation": deviation,
                "best": best,
                "rival": rival,
                "order": order,
                "interval": interval,
                "null": rows[null] if null else None,
                "null_deviation": spread[null][direction][metric] if null is not None and null in spread else None,
                "chance": rows["chance"],
            }
        )
    return verdict


def _metric_table(table: Mapping[str, Metrics], spread: Mapping[str, Metrics], direction: str) -> dict[str, Any]:
    metrics = list(table["chance"][direction])
    measured = {name: row for name, row in table.items() if direction in row}
    best = {metric: max(row[direction][metric] for row in measured.values()) for metric in metrics}
    rows = []
    for name, row in measured.items():
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


def _queries(
    projected: Mapping[str, torch.Tensor],
    labels: Mapping[str, Sequence[str]],
    items: Mapping[str, Sequence[Item]],
    modalities: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return some queries, spread evenly over the classes, each with what the connection puts first."""
    rows_by_class = defaultdict(list)
    for row, label in enumerate(labels["query"]):
        rows_by_class[label].append(row)
    classes = sorted(rows_by_class)
    if len(classes) > QUERIES:
        classes = [classes[index * len(classes) // QUERIES] for index in range(QUERIES)]
    rounds = range(max(len(rows_by_class[name]) for name in classes))
    rows = [rows_by_class[name][turn] for turn in rounds for name in classes if turn < len(rows_by_class[name])]
    queries = []
    for row in rows[:QUERIES]:
        cosine = projected["gallery"] @ projected["query"][row]
        found = cosine.sort(descending=True, stable=True).indices[:RESULTS].tolist()
        own = labels["query"][row]
        results = [
            {
                **_shown(items["gallery"][place], modalities["gallery"]),
                "label": labels["gallery"][place],
                "cosine": cosine[place].item(),
                "right": labels["gallery"][place] == own,
            }
            for place in found
        ]
        queries.append({**_shown(items["query"][row], modalities["query"]), "label": own, "results": results})
    return queries


def _way(direction: str) -> str:
    """Return a direction such as `audio_to_image` as a reader says it."""
    return direction.replace("_to_", " → ").replace("_", " ")


def _shown(item: Item, modality: str) -> dict[str, Any]:
    """Return an item's name and kind with its data URI (a text itself), or with the reason why there is none."""
    shown: dict[str, Any] = {"name": item.key, "kind": "text", "uri": item.value, "problem": None}
    if modality == "text":
        return shown
    shown |= {"kind": "sound" if modality == "audio" else "picture", "uri": None}
    if not isinstance(item.value, Path):
        return shown | {"kind": None, "problem": "not a file"}
    try:
        encode = {"audio": sound_uri, "image": picture_uri, "point_cloud": cloud_uri}[modality]
        return shown | {"uri": encode(item.value)}
    except ValueError:
        return shown | {"kind": None, "problem": "cannot be read"}
    except ImportError as error:
        lacking = "the libsndfile that is installed cannot write MP3" if modality == "audio" else str(error)
        return shown | {"kind": None, "problem": lacking}
