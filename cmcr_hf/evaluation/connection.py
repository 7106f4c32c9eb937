"""Measure a connection by class-level retrieval, beside every way to connect the spaces without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..modeling.modeling_cmcr import CMCRConnector
from .baselines import TRAINING_FREE, baseline_scores, linear_map, two_hop_scores
from .bootstrap import bootstrap_means
from .classification import top_k_hits
from .retrieval import chance, label_values

# By direction, such as {"audio_to_image": {"P@1": ...}, "image_to_audio": {...}}
Metrics = dict[str, dict[str, float]]
# By direction and metric what the metric is the mean of, a number a query.
Values = dict[str, dict[str, torch.Tensor]]
# By direction and method (low, high).
Differences = dict[str, dict[str, tuple[float, float]]]
CLASSIFICATION = "zero-shot classification"
# The name of a connection's row in a table, by its objective.
ROWS = {"c-mcr": "C-MCR", "ex-mcr": "Ex-MCR", "bridge-distillation": "bridge distillation"}


@dataclass
class Side:
    """Held-back items of one modality with their classes, as unit rows `(items, dim)` of a source space."""

    space: str
    modality: str
    embeds: torch.Tensor
    labels: Sequence[str]


@dataclass
class RetrievalSet:
    """Two sides to retrieve from each other, and the bank of overlap items that the bridges use.

    Args:
        query, gallery: sides of different spaces; both directions are measured, this one first.
        query_bank, gallery_bank: `(overlap items, dim)`, the same items row by row in the space of each side.
        query_names, gallery_names: `(classes, dim)`, a phrase a class, for the closed cascade; the latter in the space
            between, where there is one.
        classify: the gallery is one phrase a class: measure whether the right one comes first, instead of retrieval.
        between: where the sides share no modality, but each one with a space between them: the items of `query_bank`
            and those of `gallery_bank`, row by row in that space. The banks are then of different items.
    """

    query: Side
    gallery: Side
    query_bank: torch.Tensor
    gallery_bank: torch.Tensor
    query_names: torch.Tensor | None = None
    gallery_names: torch.Tensor | None = None
    classify: bool = False
    between: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        """The names of what is measured."""
        ways = (self.query.modality, self.gallery.modality)
        return (CLASSIFICATION,) if self.classify else ("_to_".join(ways), "_to_".join(ways[::-1]))

    def metrics(self, there: torch.Tensor, back: torch.Tensor) -> Metrics:
        """Return the metrics of `(query, gallery)` and `(gallery, query)` scores."""
        return means(self.values(there, back))

    def values(self, there: torch.Tensor, back: torch.Tensor) -> Values:
        """Return what the metrics are the means of."""
        labels = (self.query.labels, self.gallery.labels)
        if self.classify:
            hits = top_k_hits(there, [labels[1].index(label) for label in labels[0]], self._ks)
            return {CLASSIFICATION: {name: rows.cpu() for name, rows in hits.items()}}
        return _retrieval_values(there, back, *labels, (self.query.modality, self.gallery.modality))

    def chance(self) -> Metrics:
        """Return what a random ranking gives on average."""
        if self.classify:
            return {CLASSIFICATION: {f"top-{k}": k / len(self.gallery.labels) for k in self._ks}}
        ways = (self.query.modality, self.gallery.modality)
        return chance_metrics(self.query.labels, self.gallery.labels, ways)

    @property
    def _ks(self) -> tuple[int, ...]:
        return tuple(k for k in (1, 3, 5) if k <= len(self.gallery.labels))


def check_classes(
    query_labels: Sequence[str], gallery_labels: Sequence[str], modalities: tuple[str, str] = ("audio", "image")
) -> None:
    """Check that every class has items on both sides, without which no query of it could be answered.

    Raises:
        ValueError: names a class that has none.
    """
    first, second = set(query_labels), set(gallery_labels)
    for (side, other), lone in ((modalities, first - second), (modalities[::-1], second - first)):
        if lone:
            raise ValueError(
                f"The class {min(lone)!r}, one of {len(lone)} such, has {side} items but no {other}. Add items of it "
                "to the other side, or leave it out."
            )


def retrieval_metrics(
    there: torch.Tensor,
    back: torch.Tensor,
    query_labels: Sequence[str],
    gallery_labels: Sequence[str],
    modalities: tuple[str, str] = ("audio", "image"),
) -> Metrics:
    """Return P@1, P@10 and mAP of both directions from `(query, gallery)` and `(gallery, query)` scores."""
    return means(_retrieval_values(there, back, query_labels, gallery_labels, modalities))


def _retrieval_values(
    there: torch.Tensor,
    back: torch.Tensor,
    query_labels: Sequence[str],
    gallery_labels: Sequence[str],
    modalities: tuple[str, str],
) -> Values:
    check_classes(query_labels, gallery_labels, modalities)
    ks = _cut_offs(query_labels, gallery_labels)
    return {
        "_to_".join(modalities): label_values(there, query_labels, gallery_labels, ks),
        "_to_".join(modalities[::-1]): label_values(back, gallery_labels, query_labels, ks),
    }


def means(values: Values) -> Metrics:
    """Return metrics from the values of the queries."""
    return {
        direction: {name: rows.mean().item() for name, rows in metrics.items()}
        for direction, metrics in values.items()
    }


def chance_metrics(
    query_labels: Sequence[str], gallery_labels: Sequence[str], modalities: tuple[str, str] = ("audio", "image")
) -> Metrics:
    """Return what a random ranking gives on average, in both directions."""
    check_classes(query_labels, gallery_labels, modalities)
    ks = _cut_offs(query_labels, gallery_labels)
    return {
        "_to_".join(modalities): chance(query_labels, gallery_labels, ks),
        "_to_".join(modalities[::-1]): chance(gallery_labels, query_labels, ks),
    }


def _cut_offs(query_labels: Sequence[str], gallery_labels: Sequence[str]) -> tuple[int, ...]:
    return tuple(k for k in (1, 10) if k <= min(len(query_labels), len(gallery_labels)))


def metrics_table(sets: Sequence[RetrievalSet], values: Mapping[str, Values]) -> dict[str, Metrics]:
    """Return the metrics of chance on all sets, and of methods from their values, by name."""
    chances = {direction: metrics for part in sets for direction, metrics in part.chance().items()}
    return {"chance": chances, **{name: means(rows) for name, rows in values.items()}}


def baseline_metrics(sets: Sequence[RetrievalSet]) -> dict[str, Metrics]:
    """Return the metrics of chance and of every baseline (see `baseline_scores`) on all sets, by name."""
    return metrics_table(sets, baseline_values(sets))


def baseline_values(sets: Sequence[RetrievalSet]) -> dict[str, Values]:
    """Return what the metrics of every baseline on all sets are the means of, by name."""
    found: dict[str, Values] = {}
    fitted: dict[tuple[int, int], torch.nn.Linear] = {}

    def linear(bank: torch.Tensor, other: torch.Tensor) -> torch.nn.Linear:
        # Sets share their banks, and it takes seconds.
        key = (id(bank), id(other))
        if key not in fitted:
            fitted[key] = linear_map(bank, other)
        return fitted[key]

    for part in sets:
        names = (part.query_names, part.gallery_names)
        if part.between is None:
            banks = (part.query_bank, part.gallery_bank)
            scores = baseline_scores(part.query.embeds, part.gallery.embeds, *banks, *names, linear=linear(*banks))
        else:
            first, second = (part.query_bank, part.between[0]), (part.between[1], part.gallery_bank)
            layers = (linear(*first), linear(*second[::-1]))
            scores = two_hop_scores(part.query.embeds, first, second, part.gallery.embeds, *names, linear=layers)
        for name, (there, back) in scores.items():
            found.setdefault(name, {}).update(part.values(there, back))
    return found


def connector_metrics(connector: CMCRConnector, sets: Sequence[RetrievalSet]) -> Metrics:
    """Return the metrics of a trained connector on all sets: both sides projected, compared by cosine."""
    return means(connector_values(connector, sets))


@torch.no_grad()
def connector_values(connector: CMCRConnector, sets: Sequence[RetrievalSet]) -> Values:
    """Return what the metrics of a trained connector on all sets are the means of."""
    values: Values = {}
    for part in sets:
        query, gallery = (
            connector.project(side.embeds.to(connector.device), side.space, side.modality)
            for side in (part.query, part.gallery)
        )
        scores = query @ gallery.T
        values |= part.values(scores, scores.T)
    return values


def main_metric(direction: str) -> str:
    """Return the metric that methods are compared by."""
    return "top-1" if direction == CLASSIFICATION else "mAP"


def differences(baselines: Mapping[str, Values], own: Values, *, resamples: int = 1000, seed: int = 0) -> Differences:
    """Return the 95 % intervals of how far the mAP of what needs no training, or its top-1, is above a connection's.

    They are over draws of the same queries, with the gallery as it is, as those of `cmcr evaluate retrieval`.
    """
    found: Differences = {}
    for method in TRAINING_FREE:
        for direction, metrics in baselines.get(method, {}).items():
            metric = main_metric(direction)
            ahead = {metric: metrics[metric] - own[direction][metric]}
            interval = bootstrap_means(ahead, resamples=resamples, seed=seed)[metric]
            found.setdefault(direction, {})[method] = interval
    return found


def mean_and_spread(runs: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Return the mean and the standard deviation (0 for a single run) of every metric over runs."""
    mean: Metrics = {}
    spread: Metrics = {}
    for direction in runs[0]:
        values = {
            name: torch.tensor([run[direction][name] for run in runs], dtype=torch.float64)
            for name in runs[0][direction]
        }
        mean[direction] = {name: value.mean().item() for name, value in values.items()}
        spread[direction] = {name: value.std().item() if len(runs) > 1 else 0.0 for name, value in values.items()}
    return mean, spread


def format_table(table: dict[str, Metrics], spread: dict[str, Metrics] | None = None) -> str:
    """Lay out metrics by method as text, two directions side by side, the standard deviation behind those with one.

    Under the directions stand the methods that they were measured of.
    """
    directions = list(next(iter(table.values())))
    pairs = [directions[start : start + 2] for start in range(0, len(directions), 2)]
    return "\n\n".join(_format_directions(table, spread or {}, pair) for pair in pairs)


def _format_directions(table: dict[str, Metrics], spread: dict[str, Metrics], directions: Sequence[str]) -> str:
    table = {name: metrics for name, metrics in table.items() if set(directions) <= metrics.keys()}
    width = max(len(name) for name in table)
    blocks = []
    for direction in directions:
        names = list(next(iter(table.values()))[direction])
        rows = [names]
        for method, metrics in table.items():
            deviations = spread.get(method, {}).get(direction, {})
            rows.append(
                [f"{metrics[direction][n]:.3f}" + (f" ±{deviations[n]:.3f}" if n in deviations else "") for n in names]
            )
        sizes = [max(len(row[column]) for row in rows) for column in range(len(names))]
        title = direction.replace("_to_", " -> ").replace("_", " ")
        lines = [title, *("  ".join(cell.ljust(n) for cell, n in zip(row, sizes, strict=True)) for row in rows)]
        size = max(len(line) for line in lines)
        blocks.append([line.ljust(size) for line in lines])
    first = [" " * width] * 2 + [name.ljust(width) for name in table]
    return "\n".join("  ".join(parts).rstrip() for parts in zip(first, *blocks, strict=True))
