"""Cross-modal retrieval metrics over a score matrix, with ties counted at their expected value."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Labels = Sequence[str] | torch.Tensor

# Elements of one (queries, gallery) block: about ten float64 or int64 intermediates of it are alive at once.
_BLOCK_ELEMENTS = 2**21


def label_retrieval(
    scores: torch.Tensor, query_labels: Labels, gallery_labels: Labels, ks: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """Measure class-level retrieval: precision among the first k and mean average precision.

    A gallery item is relevant to a query when their labels are equal. Average precision runs over the whole gallery.
    Items with equal scores have no order, so each metric is its exact expectation over a random order of them
    (McSherry and Najork, 2008): constant scores give `chance`, not the luck of the storage order.

    Args:
        scores: (n_queries, n_gallery), larger is better; infinities are allowed.
        query_labels: n_queries strings, or an integer tensor (n_queries,).
        gallery_labels: n_gallery labels of the same kind.
        ks: cut-offs between 1 and n_gallery.

    Returns:
        "P@k" for every k, and "mAP", means over the queries, in [0, 1].

    Raises:
        ValueError: NaN scores, sizes that do not fit, or a query without any relevant gallery item.
    """
    values = label_values(scores, query_labels, gallery_labels, ks)
    return {name: rows.mean().item() for name, rows in values.items()}


def label_values(
    scores: torch.Tensor, query_labels: Labels, gallery_labels: Labels, ks: Sequence[int] = (1, 10)
) -> dict[str, torch.Tensor]:
    """Return what [`label_retrieval`] is the mean of, `(n_queries,)` float64 on the CPU each; errors as there."""
    check_scores(scores)
    queries, gallery = _label_codes(query_labels, gallery_labels)
    if scores.shape != (len(queries), len(gallery)):
        raise ValueError(
            f"Got scores of shape {tuple(scores.shape)}, expected ({len(queries)}, {len(gallery)}) for the query and "
            "gallery labels; pass one label for every row and column."
        )
    check_cutoffs(ks, len(gallery))
    queries, gallery = queries.to(scores.device), gallery.to(scores.device)
    rows = max(1, _BLOCK_ELEMENTS // len(gallery))
    blocks = [slice(begin, begin + rows) for begin in range(0, len(queries), rows)]
    found = [relevance_values(scores[block], queries[block, None] == gallery, ks) for block in blocks]
    return {name: torch.cat([values[name] for values in found]).cpu() for name in found[0]}


def relevance_values(scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return what [`label_retrieval`] is the mean of: "P@k" for every k and "mAP", `(n_queries,)` float64 each.

    Args:
        relevant: (n_queries, n_gallery) bool, at least one in each row.
    """
    probability, precision = _expected_ranking(scores, relevant)
    values = {f"P@{k}": probability[:, :k].sum(1) / k for k in ks}
    return values | {"mAP": (probability * precision).sum(1) / relevant.sum(1)}


def pair_retrieval(
    scores: torch.Tensor, gold: torch.Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Measure instance-level retrieval: recall at k and median rank of the first true column of every row.

    The rank of a true column is 1 + the number of strictly better columns + half of the other columns tied with it:
    its mean over a random order of the ties. "R@k" is the probability under the same random order that a true column
    is among the first k, so that constant scores over m columns of which one is true give k / m.

    Args:
        scores: (n, m), larger is better; infinities are allowed.
        gold: (n,) integer tensor with the true column of every row, or (n, p) where rows have up to p of them, filled
            up with -1. `None` means the diagonal of a square matrix.
        ks: cut-offs between 1 and m.

    Returns:
        "R@k" for every k, in [0, 1], and "median_rank", from 1 to m.

    Raises:
        ValueError: NaN scores, a matrix that is not square without `gold`, or a true column outside the matrix, none
            or twice in a row.
    """
    check_scores(scores)
    check_cutoffs(ks, scores.shape[1])
    if gold is not None and gold.dim() == 2:
        ordered = gold.sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
        if len(gold) != len(scores) or gold.is_floating_point() or twice or not _within(gold, scores.shape[1]):
            raise ValueError(
                f"Got gold of shape {tuple(gold.shape)} for scores of shape {tuple(scores.shape)}, expected of every "
                "row at least one column and none twice, filled up with -1; check the pairing."
            )
        values = pair_values(scores, gold, ks)
        metrics = {f"R@{k}": values[f"R@{k}"].mean().item() for k in ks}
        return metrics | {"median_rank": values["rank"].quantile(0.5).item()}
    better, ties = gold_places(scores, gold)
    metrics = {f"R@{k}": _recall(k, better, ties + 1, torch.ones_like(ties)).mean().item() for k in ks}
    return metrics | {"median_rank": (1 + better + ties / 2).quantile(0.5).item()}


def pair_values(scores: torch.Tensor, gold: torch.Tensor, ks: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return of every row what instance-level metrics are made of, `(n,)` float64 each.

    "R@k" for every k and "rank", of the first true column as in [`pair_retrieval`], and "mAP", the average precision
    over all true columns; each the exact expectation over a random order of the ties.

    Args:
        gold: (n, p) true columns of every row, at least one and none twice, filled up with -1.
    """
    gold = gold.to(scores.device)
    true = scores.gather(1, gold.clamp(min=0)).masked_fill(gold < 0, -torch.inf)
    valid = gold >= 0
    better, size = torch.empty_like(true, dtype=torch.float64), torch.empty_like(true, dtype=torch.float64)
    # One true column at a time: no copy of the scores for each.
    for place in range(gold.shape[1]):
        better[:, place] = (scores > true[:, place, None]).sum(1)
        size[:, place] = (scores == true[:, place, None]).sum(1)
    above = ((true[:, None] > true[:, :, None]) & valid[:, None]).sum(2).double()
    found = ((true[:, None] == true[:, :, None]) & valid[:, None]).sum(2).double()
    # A true column in a tie group of n items, r of them true, behind s items with R true ones, is at rank s + j with
    # probability 1 / n, and R + (j - 1)(r - 1) / (n - 1) true ones precede it there on average.
    harmonic = torch.nn.functional.pad((1 / torch.arange(1, scores.shape[1] + 1).double()).cumsum(0), (1, 0))
    harmonic = harmonic.to(scores.device)
    inverse = harmonic[(better + size).long()] - harmonic[better.long()]
    later = (found - 1) / (size - 1).clamp(min=1) * (size - (better + 1) * inverse)
    precision = (((above + 1) * inverse + later) / size).masked_fill(~valid, 0).sum(1) / valid.sum(1)
    first = better.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
    better, size, found = (part.gather(1, first)[:, 0] for part in (better, size, found))
    values = {f"R@{k}": _recall(k, better, size, found) for k in ks}
    return values | {"mAP": precision, "rank": first_rank(better, size, found)}


def first_rank(better: torch.Tensor, size: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the mean rank of the first of `found` true items in a tie group of `size` behind `better` items."""
    return better + (size + 1) / (found + 1)


def pair_chance(found: torch.Tensor, gallery: int, ks: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return what [`pair_values`] gives on average for a random ranking, of rows with so many true columns."""
    found, zero = found.double(), torch.zeros(len(found), dtype=torch.float64)
    values = {f"R@{k}": _recall(k, zero, zero + gallery, found) for k in ks}
    return values | {
        "mAP": expected_average_precision(found, gallery),
        "rank": first_rank(zero, zero + gallery, found),
    }


def _recall(k: int, better: torch.Tensor, size: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the probability that one of `found` true items in a tie group of `size` items is among the first k."""
    places = (k - better).clamp(min=0).minimum(size)
    # Missed with the product of 1 - found / (size - i) over the places i, which is that of 1 - places / (size - i)
    # over the found ones. A difference of lgamma would lose as many digits as the number of items has.
    fewer, others = (places, found) if k <= found.max() else (found, places)
    missed = torch.zeros_like(size)
    for i in range(int(fewer.max())):
        share = others / (size - i).clamp(min=1)
        missed += torch.where(i < fewer, (-share.clamp(max=1)).log1p(), 0)
    return torch.where(found == 1, places / size, -missed.expm1())


def _within(gold: torch.Tensor, columns: int) -> bool:
    return bool((gold >= -1).all() and (gold < columns).all() and (gold >= 0).any(1).all())


def gold_places(scores: torch.Tensor, gold: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many columns of every row are better than its true one, and how many others tie with it, float64."""
    check_scores(scores)
    n, m = scores.shape
    if gold is None:
        if n != m:
            raise ValueError(f"Got scores of shape ({n}, {m}) without gold, expected a square matrix; pass gold=.")
        gold = torch.arange(n)
    if gold.shape != (n,) or gold.is_floating_point() or gold.dtype == torch.bool:
        raise ValueError(
            f"Got gold of shape {tuple(gold.shape)} and type {gold.dtype}, expected ({n},) integers; pass one true "
            "column for every row."
        )
    if gold.min() < 0 or gold.max() >= m:
        raise ValueError(
            f"Got gold columns from {gold.min()} to {gold.max()}, expected 0 to {m - 1}; check the pairing."
        )
    true_scores = scores.gather(1, gold.to(scores.device, torch.long)[:, None])
    better = (scores > true_scores).sum(1).double()
    return better, (scores == true_scores).sum(1).double() - 1


def chance(query_labels: Labels, gallery_labels: Labels, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Return the exact expectation of `label_retrieval` for a uniformly random ranking.

    For R relevant of N gallery items, E[P@k] = R / N and
    E[AP] = 1/N * sum_{k=1..N} ((R - 1)(k - 1) / (N - 1) + 1) / k.
    """
    queries, gallery = _label_codes(query_labels, gallery_labels)
    check_cutoffs(ks, len(gallery))
    relevant = torch.bincount(gallery)[queries].double()
    precision = expected_average_precision(relevant, len(gallery)).mean().item()
    return {f"P@{k}": (relevant / len(gallery)).mean().item() for k in ks} | {"mAP": precision}


def expected_average_precision(relevant: torch.Tensor, n: int) -> torch.Tensor:
    """Return the mean average precision of a random ranking of n items, so many of which are relevant, at least 1."""
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum()
    # sum_k (k - 1) / k = N - H_N
    return ((relevant - 1) * (n - harmonic) / max(n - 1, 1) + harmonic) / n


def _expected_ranking(scores: torch.Tensor, relevant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for every rank, the probability of a relevant item and the expected precision there if it is relevant.

    In a tie group of n items, r of them relevant, that follows s items with R relevant ones, rank s + j holds a
    relevant item with probability r / n; if it does, R + (j - 1)(r - 1) / (n - 1) relevant items precede it on
    average.
    """
    ordered, order = scores.sort(dim=1, descending=True)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    border = torch.ones_like(relevant[:, :1])
    change = ordered[:, 1:] != ordered[:, :-1]
    start = position.where(torch.cat([border, change], 1), 0).cummax(1).values
    stop = (position + 1).where(torch.cat([change, border], 1), scores.shape[1]).flip(1).cummin(1).values.flip(1)
    found = torch.nn.functional.pad(relevant.gather(1, order).double().cumsum(1), (1, 0))
    before = found.gather(1, start)
    inside = found.gather(1, stop) - before
    size = stop - start
    earlier = (position - start) * (inside - 1) / (size - 1).clamp(min=1)
    return inside / size, (before + earlier + 1) / (position + 1)


def _label_codes(query_labels: Labels, gallery_labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the labels of both sides alike, and check that every query label occurs in the gallery."""
    queries, gallery = _label_list("query", query_labels), _label_list("gallery", gallery_labels)
    code = {label: index for index, label in enumerate(dict.fromkeys(gallery))}
    for label in queries:
        if label not in code:
            raise ValueError(
                f"Got query label {label!r}, which no gallery item has, expected a relevant item for every query; "
                "drop its queries, or pass labels of the same kind on both sides."
            )
    return torch.tensor([code[label] for label in queries]), torch.tensor([code[label] for label in gallery])


def _label_list(side: str, labels: Labels) -> list[str | int]:
    if isinstance(labels, torch.Tensor):
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"Got {side} labels of shape {tuple(labels.shape)} and type {labels.dtype}, expected a flat integer "
                "tensor; pass class indices."
            )
        labels = labels.tolist()
    elif isinstance(labels, str):
        raise ValueError(f"Got {side} labels as one string {labels!r}, expected a list of strings; wrap it in a list.")
    if not labels:
        raise ValueError(f"Got no {side} labels, expected at least one; pass a label for every {side} item.")
    return list(labels)


def check_scores(scores: torch.Tensor) -> None:
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(
            f"Got scores of shape {tuple(scores.shape)}, expected (n_queries, n_gallery); pass a filled matrix."
        )
    rows = scores.isnan().any(1).nonzero()
    if len(rows):
        raise ValueError(
            f"Got NaN scores in {len(rows)} rows, first row {rows[0].item()}, expected numbers; check the embeddings."
        )


def check_cutoffs(ks: Sequence[int], gallery_size: int) -> None:
    for k in ks:
        if not 1 <= k <= gallery_size:
            raise ValueError(f"Got cut-off k={k}, expected 1 to {gallery_size}, the gallery's size; pass other ks=.")
