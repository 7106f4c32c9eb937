"""Percentile bootstrap: how much a metric would move with another sample of the items it is taken over.

What is drawn, with replacement, are the items a metric is an average or a function of: queries of a retrieval, clips
of a localisation, rows of a recognition. The rest stays as it is: the gallery, the classes and the model. So an
interval says nothing of another gallery and nothing of another training. Rows that belong together (the captions of
one clip) are drawn together, named by `groups`. So are the queries of both directions where their mean is taken.

The draws are a function of the seed and the number of items, so that metrics, methods and runs over the same items see
the same ones, and every interval can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from tqdm.auto import tqdm

Intervals = dict[str, tuple[float, float]]

# Numbers of one block of draws.
_BLOCK = 2**22


def bootstrap_means(
    values: Mapping[str, torch.Tensor],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    groups: torch.Tensor | None = None,
) -> Intervals:
    """Return the interval of the mean of every row of values.

    Args:
        values: by metric, `(rows,)` numbers whose mean it is.
        resamples: draws; 0 gives no intervals.
        confidence: share of the draws within an interval, the rest evenly on both sides.
        groups: `(rows,)` integers from 0 without a gap: rows that are drawn together.

    Raises:
        ValueError: rows of unequal number, none, or numbers that are not finite.
    """
    return bootstrap_means_of_sides([(values, groups)], resamples=resamples, seed=seed, confidence=confidence)


def bootstrap_means_of_sides(
    sides: Sequence[tuple[Mapping[str, torch.Tensor], torch.Tensor | None]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Intervals:
    """Return the interval of the mean over several sides of their [`bootstrap_means`].

    A group is drawn on all sides at once, with the rows that it has on each.

    Args:
        sides: of each the values, of the same metrics, and the groups, as many as of the others.

    Raises:
        ValueError: as for [`bootstrap_means`], or sides of other numbers of groups.
    """
    _check(resamples, confidence)
    names = list(sides[0][0])
    if not names or not resamples:
        return {}
    tables = [_group_sums([values[name] for name in names], groups) for values, groups in sides]
    if len({len(table) for table in tables}) > 1:
        raise ValueError(f"Got {[len(table) for table in tables]} groups, expected as many of every side.")
    items = len(tables[0])
    means = []
    for drawn in _draws(items, resamples, seed):
        sums = [_counts(drawn, items) @ table for table in tables]
        # The last column counts rows: groups may have unequal numbers of them.
        means.append(torch.stack([part[:, :-1] / part[:, -1:] for part in sums]).mean(0))
    found = torch.cat(means)
    return {name: _interval(found[:, column], confidence) for column, name in enumerate(names)}


def _group_sums(values: Sequence[torch.Tensor], groups: torch.Tensor | None) -> torch.Tensor:
    """Return `(groups, metrics + 1)`: the sums of each group, and how many rows it has."""
    lengths = {len(rows) for rows in values}
    table = torch.stack([rows.double() for rows in values], 1) if len(lengths) == 1 else torch.empty(0)
    if not len(table) or not table.isfinite().all():
        raise ValueError(
            f"Got values of {sorted(lengths)} rows, expected as many finite ones, at least 1, of every metric."
        )
    table = torch.cat([table, torch.ones(len(table), 1, dtype=torch.float64)], 1)
    if groups is None:
        return table
    return table.new_zeros(_group_count(groups, len(table)), table.shape[1]).index_add_(0, groups, table)


def bootstrap_statistic(
    statistic: Callable[[torch.Tensor], Mapping[str, float]],
    items: int | torch.Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = False,
) -> Intervals:
    """Return the interval of metrics that are no means, such as a median, an average precision or a largest F1.

    Args:
        statistic: gives the metrics of `(rows,)` indices, in which a row that was drawn twice is there twice. A metric
            that a draw leaves undefined (NaN, such as an average precision without a positive) is passed over there.
        items: number of rows, or the groups of [`bootstrap_means`].

    Raises:
        ValueError: no rows, or a metric that most draws leave undefined.
    """
    _check(resamples, confidence)
    if not resamples:
        return {}
    groups = torch.arange(items) if isinstance(items, int) else items
    if not len(groups):
        raise ValueError("Got no rows to draw from, expected at least 1.")
    order, sizes = groups.argsort(stable=True), torch.bincount(groups, minlength=_group_count(groups, len(groups)))
    starts = sizes.cumsum(0) - sizes
    found: list[Mapping[str, float]] = []
    draws = (drawn for block in _draws(len(sizes), resamples, seed) for drawn in block)
    for drawn in tqdm(draws, total=resamples, desc="resampled", unit="draw", disable=not progress):
        width = sizes[drawn]
        place = torch.arange(int(width.sum())) - (width.cumsum(0) - width).repeat_interleave(width)
        found.append(statistic(order[starts[drawn].repeat_interleave(width) + place]))
    intervals = {}
    for name in found[0]:
        values = torch.tensor([metrics[name] for metrics in found], dtype=torch.float64)
        defined = values[~values.isnan()]
        if 2 * len(defined) < len(values):
            raise ValueError(f"{name} is undefined in {len(values) - len(defined)} of {len(values)} draws.")
        intervals[name] = _interval(defined, confidence)
    return intervals


def _draws(items: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield blocks `(draws, items)` of indices."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _BLOCK // items)
    for start in range(0, resamples, rows):
        yield torch.randint(items, (min(rows, resamples - start), items), generator=generator)


def _counts(drawn: torch.Tensor, items: int) -> torch.Tensor:
    """Return `(draws, items)`: how often every item was drawn."""
    return torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _interval(values: torch.Tensor, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _group_count(groups: torch.Tensor, rows: int) -> int:
    count = int(groups.max()) + 1 if groups.dim() == 1 and len(groups) else 0
    if len(groups) != rows or groups.is_floating_point() or len(groups.unique()) != count or groups.min() < 0:
        raise ValueError(
            f"Got groups of shape {tuple(groups.shape)} for {rows} rows, expected an integer for each, from 0 without "
            "a gap."
        )
    return count


def _check(resamples: int, confidence: float) -> None:
    if resamples < 0 or not 0 < confidence < 1:
        raise ValueError(
            f"Expected resamples of 0 or more and a confidence between 0 and 1, got {resamples} and {confidence}."
        )
