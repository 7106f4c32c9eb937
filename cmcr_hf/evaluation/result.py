"""What an evaluation gives: one form for all tasks, as text, as JSON that says how to run it again, and as a page.

How a task makes a result:

1.  A command `cmcr evaluate TASK` is made by an `add_TASK` function of `commands.py`, whose options come from
    `add_shared_options`. It checks what it can before the model is loaded, then opens `evaluated_model`, which locks
    the output folder and gives an [`EvaluatedModel`], and ends with `finish(arguments, result)`. Settings come from
    `run_settings`.
2.  A loader reads a public layout of a data set into [`Items`] (`Items.listed` takes lists of files or texts) and what
    the task needs beside them. A folder that does not hold the layout is one ValueError, which says where to get the
    data and what the folder must look like. What is left out of the data is named or counted (see [`left_out`]).
3.  Items are embedded by `EvaluatedModel.embeds`, so that a second run reads the stores. Scores go to functions of
    tensors that give one value an item (a query, a clip, a row), and these to `bootstrap_means`; metrics that are no
    means go to `bootstrap_statistic`.
4.  `metrics[method][group][metric]` are numbers, `intervals` of the same form hold (low, high) where there are any.
    The method "model" is the one under evaluation, "chance" the exact expectation of a random answer; others are
    baselines. A group is what is asked, such as `audio_to_image`; a method need not have all groups, nor all metrics
    of one. Metrics in [0, 1] are fractions, not percents.
5.  `best` and `worst` hold a few cases each, picked by `Case.score`, the larger the better. What a case shows are
    `Shown` media, which the page embeds; `overlay` is a picture drawn by the task, such as boxes and a heat map over
    the query's picture. The page reads no file that is not in a case.
6.  `breakdowns` list a metric by class or the like, of which the page draws the first and the last.
7.  `notes` are sentences that a reader must see beside the numbers, such as a protocol that differs from the
    published.

Nothing that is written names a path of the machine: names go through `shown`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..output import write_json

# By group, such as {"audio_to_image": {"R@1": ...}, ...}
Metrics = Mapping[str, Mapping[str, float]]
MODEL, CHANCE = "model", "chance"
RESULT, PAGE = "result.json", "report.html"
PACKAGES = ("cmcr-hf", "torch", "transformers", "numpy")
# What decodes and resamples media, as far as it is installed.
DECODERS = ("pillow", "soundfile", "soxr")
# Cases of one class while there are others.
_OF_A_CLASS = 2
# What data may be without, what it is numbers of, and why.
_LEFT_OUT = (
    ("missing", "items", "no such file"),
    ("unreadable", "items", "cannot be read"),
    ("empty", "rows", "an empty cell"),
)


@dataclass
class Shown:
    """One thing that a page shows.

    Args:
        modality: `image`, `audio`, `point_cloud`, or `text`, whose value is shown as it is.
        value: what the processor takes: path, bytes, array, PIL image or `datasets` dict.
        name: of the item.
        label: its class or another word for it.
        score: of this item for the query.
        right: whether it answers the query; None where that is no question.
    """

    modality: str
    value: Any
    name: str
    label: str | None = None
    score: float | None = None
    right: bool | None = None


@dataclass
class Case:
    """What became of one item of a task.

    Args:
        score: what the best and the worst cases are picked by, the larger the better.
        found: what was retrieved or classified, best first; the truth, where it is not among them, marked by a label.
        overlay: picture that the task drew for it, a PIL image or the bytes of a file.
        note: a sentence, such as the rank of the truth.
    """

    query: Shown
    score: float
    found: Sequence[Shown] = ()
    overlay: Any = None
    note: str | None = None


@dataclass
class Breakdown:
    """A metric of every part of the data, such as the accuracy of every class.

    Args:
        rows: name, value in [0, 1] and a remark, such as how many items it is of; the page shows the first and the
            last.
    """

    title: str
    rows: Sequence[tuple[str, float, str]]


@dataclass
class Published:
    """Numbers that others have published: `metrics` are theirs, never measured here.

    Args:
        of: how many items they are of, by what these are called in the `items` of a result's data; any of several.
    """

    model: str
    metrics: Metrics
    source: str
    of: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def other_size(self, items: Mapping[str, int]) -> str | None:
        """Say how many items data has where the numbers are of another number, such as of a whole benchmark."""
        return next(
            (
                f"{counted(items[name], name)} in place of {' or '.join(f'{size:,}' for size in sizes)}"
                for name, sizes in self.of.items()
                if items[name] not in sizes
            ),
            None,
        )


@dataclass
class EvaluationResult:
    """The result of a task (see the module's text).

    Args:
        task: name of the command, such as `retrieval`.
        title: what was measured, for a reader: "audio-image retrieval on AVE".
        data: `name`, `items` (numbers by what they are), `fingerprint`, `licence`, what is left out (see
            [`left_out`]), `part` where it is another than that which published numbers are of, and what else tells it.
        model: `EvaluatedModel.record()`.
        settings: `command`, `seed`, `bootstrap`, `versions`, and what else is needed to run it again.
        metrics: by method, group and metric.
        intervals: (low, high) by method, group and metric, as far as there are any.
        published: numbers to stand beside these.
        best, worst: cases.
        breakdowns: a metric by parts of the data.
        notes: sentences for the reader.
    """

    task: str
    title: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Metrics]
    intervals: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    best: Sequence[Case] = ()
    worst: Sequence[Case] = ()
    breakdowns: Sequence[Breakdown] = ()
    notes: Sequence[str] = ()

    @property
    def groups(self) -> dict[str, list[str]]:
        """The groups and the metrics of each, in the order in which the methods name them."""
        groups: dict[str, dict[str, None]] = {}
        for metrics in self.metrics.values():
            for group, values in metrics.items():
                groups.setdefault(group, {}).update(dict.fromkeys(values))
        return {group: list(names) for group, names in groups.items()}

    def format(self) -> str:
        """Return the result as text: what was measured, a table a group, published numbers, notes."""
        counts = ", ".join(counted(count, name) for name, count in self.data.get("items", {}).items())
        parts = [f"{self.title}: {counts}" if counts else self.title]
        for group, names in self.groups.items():
            rows = [[said(group), *names]]
            for method, metrics in self.metrics.items():
                if group in metrics:
                    intervals = self.intervals.get(method, {}).get(group, {})
                    rows.append(
                        [method, *(_cell(name, metrics[group].get(name), intervals.get(name)) for name in names)]
                    )
            for entry in self.published:
                if group in entry.metrics:
                    values = [_cell(name, entry.metrics[group].get(name)) for name in names]
                    rows.append([f"{entry.model} (published)", *values])
            parts.append(_aligned(rows))
        if any(self.intervals.values()):
            bootstrap = self.settings.get("bootstrap", {})
            share = f"{100 * bootstrap.get('confidence', 0.95):g} %"
            drawn = bootstrap.get("resampled", "items")
            parts.append(f"In brackets: {share} intervals over {drawn}, by {bootstrap.get('resamples')} resamples.")
        sources = dict.fromkeys(entry.source for entry in self.published)
        parts += [f"Published numbers: {source}" for source in sources]
        return "\n\n".join([*parts, *self.notes])

    def document(self) -> dict[str, Any]:
        """Return what `result.json` holds."""
        return {
            "task": self.task,
            "title": self.title,
            "data": dict(self.data),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "metrics": self.metrics,
            "intervals": self.intervals,
            "published": [vars(entry) for entry in self.published],
            "best": [_case_record(case) for case in self.best],
            "worst": [_case_record(case) for case in self.worst],
            "breakdowns": [vars(entry) for entry in self.breakdowns],
            "notes": list(self.notes),
        }

    def write(self, folder: Path) -> None:
        """Write the page `report.html` and then `result.json` into a folder, each whole or not at all."""
        # Imported here: pages are made of results, and a result that is only printed needs none.
        from ..pages.evaluation import write_evaluation_page

        # The large one first: where the disk is full, no result stands without its page.
        write_evaluation_page(folder / PAGE, self)
        write_json(folder / RESULT, self.document())


def settings(
    words: Sequence[str], *, seed: int, resamples: int, resampled: str, confidence: float = 0.95, **more: Any
) -> dict[str, Any]:
    """Return what is needed to run an evaluation again.

    Args:
        words: of the command behind `cmcr`.
        resampled: what the bootstrap drew, such as "queries, the gallery as it is".
        more: further settings of the task.
    """
    return {
        "command": shlex.join(["cmcr", *(shown(word) for word in words)]),
        "seed": seed,
        "bootstrap": {
            "method": "percentile",
            "resamples": resamples,
            "confidence": confidence,
            "resampled": resampled,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            **{name: version for name in DECODERS if (version := _version(name)) is not None},
        },
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown(name: str | Path) -> str:
    """Return a name or an option as it was given, of an absolute path its last part: no result names a machine."""
    text = str(name)
    if Path(text).is_absolute():
        return Path(text).name
    # Of --data=PATH, and of SPACE=STORE.
    head, equals, tail = text.partition("=")
    return f"{head}={Path(tail).name}" if equals and Path(tail).is_absolute() else text


def said(group: str) -> str:
    """Return a group such as `audio_to_image` as a reader says it."""
    return group.replace("_to_", " → ").replace("_", " ")


def noun(count: int, plural: str) -> str:
    """Return the noun that goes with a number, such as "class" for 1 and "classes"."""
    return re.sub("(?<=ss)es$|s$", "", plural) if count == 1 else plural


def counted(count: int, plural: str) -> str:
    """Return a number with its noun, such as "1 class" or "1,200 clips"."""
    return f"{count:,} {noun(count, plural)}"


def left_out(data: Mapping[str, Any]) -> str:
    """Say what a data set is without and why, nothing of a whole one.

    Args:
        data: names of what is `missing` and `unreadable`, lists, and the number of rows that are `empty`.
    """
    parts = []
    for name, plural, reason in _LEFT_OUT:
        found = data.get(name) or 0
        named = found if isinstance(found, list) else []
        if found:
            example = f", for example {named[0]}" if named else ""
            parts.append(f"{counted(len(named) or found, plural)} ({reason}{example})")
    return ", ".join(parts)


def first_of_classes(rows: Sequence[int], label: Callable[[int], str | None], count: int) -> list[int]:
    """Return so many rows, the first ones, but of a class no more than a few while there are others; in their order.

    Args:
        label: the class of a row, None where it has none.
    """
    times: Counter[str] = Counter()
    places: tuple[list[int], list[int]] = ([], [])
    for place, row in enumerate(rows):
        own = label(row)
        places[own is not None and times[own] >= _OF_A_CLASS].append(place)
        if own is not None:
            times[own] += 1
    return [rows[place] for place in sorted([*places[0], *places[1]][:count])]


def number(value: float | None, metric: str = "") -> str:
    """Return a metric as a reader sees it: fractions with three decimals, ranks and the like with one."""
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) > 1 or metric.endswith("rank") else f"{value:.3f}"


def _cell(metric: str, value: float | None, interval: tuple[float, float] | None = None) -> str:
    ends = [number(end, metric) for end in interval or ()]
    return number(value, metric) + (f" [{', '.join(ends)}]" if ends else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _case_record(case: Case) -> dict[str, Any]:
    record = {"query": _shown_record(case.query), "score": case.score, "note": case.note}
    return record | {"found": [_shown_record(item) for item in case.found]}


def _shown_record(item: Shown) -> dict[str, Any]:
    record = {name: value for name, value in vars(item).items() if name != "value"} | {"name": shown(item.name)}
    return record | ({"text": str(item.value)} if item.modality == "text" else {})
