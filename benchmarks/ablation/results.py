"""What the runs of a study say: means, spreads, and the effect of every variant against the full method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmcr_hf.evaluation.connection import Metrics, mean_and_spread

from .variants import FULL, NULL, Variant

# Of Student's t at 97.5 %, by degrees of freedom from 1 on; beyond, the last is a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Below it an effect is said to be small, however steady it is over the seeds: the test items alone spread mAP by 0.02.
SMALL = 0.01
# Below it, it is said to be none: a tenth of what the test items spread.
NEGLIGIBLE = 0.002


@dataclass(frozen=True)
class Effect:
    """Difference of mean mAP (of both directions) to another variant of the same seed, with its 95 % interval."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """Say what it is: "none" where the interval holds zero or the mean is next to it, else "loses" or "gains"."""
        if self.low <= 0 <= self.high or abs(self.mean) < NEGLIGIBLE:
            return "none"
        return ("gains" if self.mean > 0 else "loses") + (" a little" if abs(self.mean) < SMALL else "")


@dataclass
class Table:
    """The measurements of one set of texts: ways without a connector, and the runs of every variant by seed."""

    title: str
    free: dict[str, Metrics]
    runs: dict[Variant, list[Metrics]]
    schedule: dict[str, int]
    distillation: dict[str, int]
    texts: int

    @property
    def trained(self) -> str:
        """How long the connectors trained, as a sentence has it."""
        return (
            f"{self.schedule['steps']} steps of {self.schedule['batch_size']} rows; bridge distillation "
            f"{self.distillation['steps']} steps of {self.distillation['batch_size']} items of either memory"
        )

    @property
    def full(self) -> list[Metrics]:
        return next(runs for variant, runs in self.runs.items() if variant.name == FULL)

    @property
    def groups(self) -> dict[str, list[Variant]]:
        """The variants by group, in their order; the full method and the null are in a group without a name."""
        found: dict[str, list[Variant]] = {}
        for variant in self.runs:
            found.setdefault(variant.group, []).append(variant)
        return found

    def effect(self, variant: Variant) -> Effect:
        """Return what a variant changes, from the seeds that it and what it is compared with have in common."""
        base = next(runs for other, runs in self.runs.items() if other.name == variant.against)
        return effect_between(self.runs[variant], base)

    def document(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        rows = []
        for variant, runs in self.runs.items():
            mean, spread = mean_and_spread(runs)
            row = {"method": variant.name, "group": variant.group, "runs": len(runs), "mean": mean, "spread": spread}
            if variant.name not in (FULL, NULL):
                effect = self.effect(variant)
                row["effect_on_mean_mAP"] = {"mean": effect.mean, "interval_95": [effect.low, effect.high]}
            rows.append(row)
        return {
            "texts": self.title,
            "rows_of_text": self.texts,
            "schedule": self.schedule,
            "distillation": self.distillation,
            "without_a_connector": self.free,
            "connectors": rows,
        }


def effect_between(runs: Sequence[Metrics], base: Sequence[Metrics]) -> Effect:
    """Return the effect of runs against others, seed by seed as far as both go."""
    differences = [mean_map(one) - mean_map(other) for one, other in zip(runs, base, strict=False)]
    if len(differences) < 2:
        return Effect(differences[0], float("inf"))
    quantile = T_975[min(len(differences) - 1, len(T_975)) - 1]
    return Effect(statistics.fmean(differences), quantile * statistics.stdev(differences) / len(differences) ** 0.5)


def mean_map(metrics: Metrics) -> float:
    """Return the mean of both directions' mAP."""
    return statistics.fmean(part["mAP"] for part in metrics.values())


def format_results(table: Table) -> str:
    """Lay a table out as text: P@10 and mAP of both directions, and the effect on mean mAP."""
    ways = list(next(iter(table.free.values())))
    heads = [f"{way.replace('_to_', '->')} {metric}" for way in ways for metric in _shown(table.free)]
    lines = [["", *heads, "effect on mean mAP"]]
    for name, metrics in table.free.items():
        lines.append([name, *(f"{metrics[way][metric]:.3f}" for way in ways for metric in _shown(table.free)), ""])
    for variant, runs in table.runs.items():
        mean, spread = mean_and_spread(runs)
        cells = [f"{mean[way][m]:.3f} ±{spread[way][m]:.3f}" for way in ways for m in _shown(table.free)]
        effect = ""
        if variant.name not in (FULL, NULL):
            found = table.effect(variant)
            effect = f"{found.mean:+.3f} ±{found.half_width:.3f}  {found.verdict}"
        lines.append([variant.name, *cells, effect])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"Connected by {table.title}, {table.texts} items, {table.trained}:", *rows])


def _shown(table: dict[str, Metrics]) -> Sequence[str]:
    return [name for name in ("P@10", "mAP") if name in next(iter(next(iter(table.values())).values()))]
