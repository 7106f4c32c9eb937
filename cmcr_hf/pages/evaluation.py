"""The page of an evaluation: every number with its interval, and the best and the worst cases to look at and hear."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.result import CHANCE, MODEL, Case, EvaluationResult, Shown, noun, number, said
from ..modeling.image_loading_cmcr import load_image
from ..training.data import RemoteFile
from .charts import ceiling
from .page import cloud_uri, data_uri, picture_uri, render, sound_uri, write_page

# What a page embeds at most; each thing is of bounded size.
CASES, FOUND, OVERLAY_SIDE = 8, 5, 480
# Rows of a breakdown from either end, and entries of a list among the settings.
ROWS, LISTED = 10, 20
# What a method is, and whether it knows classes or pairs.
EXPLAINED = {
    CHANCE: "A random answer, by its exact expectation. Knows nothing.",
    "unconnected": "The cosine as if both sources had one space. Knows neither classes nor pairs.",
    "ridge": "A linear map between the sources, fitted to the bank by least squares. Knows neither classes nor pairs.",
    "procrustes": "The rotation between the sources that fits the bank best. Knows neither classes nor pairs.",
    "linear map": "One linear layer, trained on the bank by InfoNCE. Knows neither classes nor pairs.",
    "one-way bridge": "The query is carried into the other source as the mean of the items of the bank that are near "
    "it. Trains nothing, needs the bank at every query, and knows neither classes nor pairs.",
    "two-way bridge": "The mean of the one-way bridges from either side. Trains nothing, needs the bank at every "
    "query, and knows neither classes nor pairs.",
    "posterior matching": "The probability that both sides draw the same item of the bank. Trains nothing, needs the "
    "bank at every query, and knows neither classes nor pairs.",
    "closed cascade": "The query is told among the names of the classes, and the name is what is searched for in the "
    "other source. Knows the classes, and that there are no others; no pairs.",
    "whole picture": "The whole picture is the answer. Knows no sound.",
    "centre": "The centre of the picture is the answer. Knows no sound.",
}
ALONE = "That source by itself, without a connection. Its training knew pairs of these modalities, no classes."


def write_evaluation_page(path: Path, result: EvaluationResult) -> None:
    """Write a result as one HTML file of bounded size that needs no network; the same result gives the same bytes."""
    context = {
        "result": result,
        "tables": [_table(result, group, metrics) for group, metrics in result.groups.items()],
        "cases": {
            kind: [_case(case) for case in cases[:CASES]]
            for kind, cases in (("best", result.best), ("worst", result.worst))
            if cases
        },
        "breakdowns": [
            {"title": entry.title, "rows": [*entry.rows[:ROWS], *entry.rows[ROWS:][-ROWS:]], "count": len(entry.rows)}
            for entry in result.breakdowns
            if entry.rows
        ],
        "explained": _explained(result),
        "noun": noun,
        "sources": dict.fromkeys(entry.source for entry in result.published),
        "facts": [*_flat(result.data, "data "), *_flat(result.model, "model "), *_flat(result.settings)],
    }
    write_page(path, render("evaluation.html.jinja", context))


def _explained(result: EvaluationResult) -> dict[str, str]:
    """Return what the methods of a result are, other than the model."""
    texts = {name: ALONE if name.endswith(" alone") else EXPLAINED.get(name) for name in result.metrics}
    return {name: text for name, text in texts.items() if text}


def _table(result: EvaluationResult, group: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Lay out the rows of a group: a dot a value, whiskers an interval, on a scale of each metric's own from 0."""
    rows = [
        (method, "trained" if method == MODEL else "reference" if method == CHANCE else "", values[group])
        for method, values in result.metrics.items()
        if group in values
    ]
    rows += [(entry.model, "published", entry.metrics[group]) for entry in result.published if group in entry.metrics]
    tops = {}
    for name in metrics:
        found = [row[name] for _, _, row in rows if name in row]
        spans = [spread[group][name] for spread in result.intervals.values() if name in spread.get(group, {})]
        tops[name] = ceiling(max([*found, *(high for _, high in spans)]))
    laid = []
    for method, kind, values in rows:
        intervals = {} if kind == "published" else result.intervals.get(method, {}).get(group, {})
        cells = []
        for name in metrics:
            value, interval = values.get(name), intervals.get(name)
            places = [None if value is None else 100 * value / tops[name]]
            places += [100 * end / tops[name] for end in interval or ()]
            ends = [number(end, name) for end in interval or ()]
            cells.append({"value": number(value, name), "interval": ends, "at": places})
        laid.append({"name": method, "kind": kind, "cells": cells})
    return {
        "group": said(group),
        "metrics": list(metrics),
        "tops": [f"{tops[name]:g}" for name in metrics],
        "rows": laid,
    }


def _case(case: Case) -> dict[str, Any]:
    overlay = None
    if case.overlay is not None:
        picture = load_image(case.overlay)
        picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        overlay = data_uri("image/jpeg", file.getvalue())
    return {
        "query": _shown(case.query),
        "found": [_shown(item) for item in case.found[:FOUND]],
        "score": number(case.score),
        "overlay": overlay,
        "note": case.note,
    }


def _shown(item: Shown) -> dict[str, Any]:
    """Return what the template shows of an item: its text, its media as data, or why there is none."""
    shown: dict[str, Any] = {**vars(item), "name": Path(item.name).name, "uri": None, "problem": None}
    if item.modality == "text":
        return shown
    encoders: dict[str, Callable[[Any], str]] = {"audio": sound_uri, "image": picture_uri, "point_cloud": cloud_uri}
    try:
        value = item.value.read() if isinstance(item.value, RemoteFile) else item.value
        shown["uri"] = encoders[item.modality](value)
    except ValueError:
        shown["problem"] = "cannot be read"
    except ImportError as error:
        shown["problem"] = str(error)
    return shown


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as pairs of a name and a text."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name} ")
        elif value is not None and value != []:
            text = str(value)
            if isinstance(value, (list, tuple)):
                more = [f"... ({len(value):,} in result.json)"] if len(value) > LISTED else []
                text = ", ".join([*map(str, value[:LISTED]), *more])
            pairs.append((f"{prefix}{name}".replace("_", " "), text))
    return pairs
