"""Measure a connection by class-level retrieval, beside every way to connect the spaces without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling.modeling_cmcr import CMCRConnector
from .baselines import baseline_scores
from .retrieval import chance, label_retrieval

# {"audio_to_image": {"P@1": ...}, "image_to_audio": {...}}
Metrics = dict[str, dict[str, float]]
DIRECTIONS = ("audio_to_image", "image_to_audio")


@dataclass
class RetrievalSet:
    """Held-back items with classes, as unit rows of the source spaces, and the text bank that the bridges use.

    Args:
        audio, image: `(items, dim)` of CLAP and CLIP.
        text_clap, text_clip: `(texts, dim)`, the same texts in both spaces.
        names_clap, names_clip: `(classes, dim)`, a phrase a class, for the closed cascade.
    """

    audio: torch.Tensor
    image: torch.Tensor
    audio_labels: Sequence[str]
    image_labels: Sequence[str]
    text_clap: torch.Tensor
    text_clip: torch.Tensor
    names_clap: torch.Tensor | None = None
    names_clip: torch.Tensor | None = None


def check_classes(audio_labels: Sequence[str], image_labels: Sequence[str]) -> None:
    """Check that every class has items on both sides, without which no query of it could be answered.

    Raises:
        ValueError: names a class that has none.
    """
    audio, image = set(audio_labels), set(image_labels)
    for side, other, lone in (("audio", "image", audio - image), ("image", "audio", image - audio)):
        if lone:
            raise ValueError(
                f"The class {min(lone)!r}, one of {len(lone)} such, has {side} items but no {other}. Add items of it "
                "to the other side, or leave it out."
            )


def retrieval_metrics(
    audio_to_image: torch.Tensor,
    image_to_audio: torch.Tensor,
    audio_labels: Sequence[str],
    image_labels: Sequence[str],
) -> Metrics:
    """Return P@1, P@10 and mAP of both directions from `(audio, image)` and `(image, audio)` scores."""
    check_classes(audio_labels, image_labels)
    ks = _cut_offs(audio_labels, image_labels)
    return {
        "audio_to_image": label_retrieval(audio_to_image, audio_labels, image_labels, ks),
        "image_to_audio": label_retrieval(image_to_audio, image_labels, audio_labels, ks),
    }


def chance_metrics(audio_labels: Sequence[str], image_labels: Sequence[str]) -> Metrics:
    """Return what a random ranking gives on average, in both directions."""
    check_classes(audio_labels, image_labels)
    ks = _cut_offs(audio_labels, image_labels)
    return {
        "audio_to_image": chance(audio_labels, image_labels, ks),
        "image_to_audio": chance(image_labels, audio_labels, ks),
    }


def _cut_offs(audio_labels: Sequence[str], image_labels: Sequence[str]) -> tuple[int, ...]:
    return tuple(k for k in (1, 10) if k <= min(len(audio_labels), len(image_labels)))


def baseline_metrics(items: RetrievalSet) -> dict[str, Metrics]:
    """Return the metrics of chance and of every baseline (see `baseline_scores`), by name."""
    table = {"chance": chance_metrics(items.audio_labels, items.image_labels)}
    scores = baseline_scores(
        items.audio, items.image, items.text_clap, items.text_clip, items.names_clap, items.names_clip
    )
    for name, (there, back) in scores.items():
        table[name] = retrieval_metrics(there, back, items.audio_labels, items.image_labels)
    return table


@torch.no_grad()
def connector_metrics(connector: CMCRConnector, items: RetrievalSet) -> Metrics:
    """Return the metrics of a trained connector: both sides projected, compared by cosine."""
    device = connector.device
    audio = connector.project(items.audio.to(device), "clap")
    image = connector.project(items.image.to(device), "clip")
    scores = audio @ image.T
    return retrieval_metrics(scores, scores.T, items.audio_labels, items.image_labels)


def mean_and_spread(runs: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Return the mean and the standard deviation (0 for a single run) of every metric over runs."""
    mean: Metrics = {}
    spread: Metrics = {}
    for direction in DIRECTIONS:
        values = {
            name: torch.tensor([run[direction][name] for run in runs], dtype=torch.float64)
            for name in runs[0][direction]
        }
        mean[direction] = {name: value.mean().item() for name, value in values.items()}
        spread[direction] = {name: value.std().item() if len(runs) > 1 else 0.0 for name, value in values.items()}
    return mean, spread


def format_table(table: dict[str, Metrics], spread: dict[str, Metrics] | None = None) -> str:
    """Lay out metrics by method as text, with the standard deviation behind those that have one."""
    first = next(iter(table.values()))["audio_to_image"]
    cells = {}
    for name, metrics in table.items():
        row = []
        for direction in DIRECTIONS:
            for metric, value in metrics[direction].items():
                deviation = (spread or {}).get(name, {}).get(direction, {}).get(metric)
                row.append(f"{value:.3f}" + (f" ±{deviation:.3f}" if deviation is not None else ""))
        cells[name] = row
    header = [*first, *first]
    widths = [max(len(header[i]), *(len(row[i]) for row in cells.values())) for i in range(len(header))]
    width = max(len(name) for name in cells)
    half = sum(widths[: len(first)]) + 2 * (len(first) - 1)
    # The first half is at least as wide as its title.
    widths[len(first) - 1] += max(len("audio -> image") - half, 0)
    half = max(half, len("audio -> image"))
    lines = [f"{'':{width}}  {'audio -> image':<{half}}  image -> audio"]
    lines += [
        f"{'':{width}}  " + "  ".join(name.ljust(size) for name, size in zip(header, widths, strict=True)).rstrip()
    ]
    for name, row in cells.items():
        lines.append(
            f"{name:{width}}  " + "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        )
    return "\n".join(lines)
