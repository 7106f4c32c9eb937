"""Zero-shot classification: the accuracy of scores against classes, and classes as means of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import normalize

from .retrieval import check_cutoffs, check_scores, gold_places


def top_k_hits(
    scores: torch.Tensor, labels: Sequence[int] | torch.Tensor, ks: Sequence[int] = (1, 3, 5)
) -> dict[str, torch.Tensor]:
    """Return of every item the probability that its true class is among the k best ones.

    Classes with equal scores have no order, so each value is the exact expectation over a random one, and constant
    scores over m classes give k / m.

    Args:
        scores: `(items, classes)`, larger is better; infinities are allowed.
        labels: index of the true class of each item.
        ks: cut-offs between 1 and the number of classes.

    Returns:
        "top-k" for every k, `(items,)` float64.

    Raises:
        ValueError: NaN scores, sizes that do not fit, a label or a cut-off outside of the classes.
    """
    better, ties = gold_places(scores, torch.as_tensor(labels))
    check_cutoffs(ks, scores.shape[1])
    return {f"top-{k}": ((k - better) / (ties + 1)).clamp(0, 1) for k in ks}


def top_1_hits(scores: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Return of every item the probability that its best class is one of its own, ties as for [`top_k_hits`].

    Args:
        scores: `(items, classes)`.
        relevant: the same shape, bool: whether the item has the class; an item may have none, and is never hit then.
    """
    best = scores == scores.amax(1, keepdim=True)
    return (best & relevant).sum(1).double() / best.sum(1)


def class_accuracy(hits: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the mean of the hits of every class's items: `(classes,)` float64, NaN for a class of no item.

    Without ties, the mean over the classes is scikit-learn's `balanced_accuracy_score`.
    """
    sums = torch.zeros(classes, dtype=torch.float64, device=hits.device).index_add_(0, labels, hits.double())
    return sums / torch.bincount(labels, minlength=classes)


def average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Return how well every class ranks the items that have it: `(classes,)` float64, NaN for a class of no item.

    The sum over the distinct scores of a class, best first, of the precision so far times the recall that is gained:
    the definition of scikit-learn's `average_precision_score`, whose mean over the classes is the mAP of AudioSet.
    Items with equal scores enter together, so that constant scores give the share of the items that have the class.

    Args:
        scores: `(items, classes)`, larger is better; infinities are allowed.
        relevant: the same shape, bool: whether the item has the class.

    Raises:
        ValueError: NaN scores, or shapes that do not fit.
    """
    return average_precision_of_draws(scores, relevant)(torch.arange(len(scores), device=scores.device))


def average_precision_of_draws(scores: torch.Tensor, relevant: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what gives [`average_precision`] of drawn items, from their indices, with the scores ranked only once."""
    check_scores(scores)
    if relevant.shape != scores.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"Got relevant of shape {tuple(relevant.shape)} and type {relevant.dtype}, expected bool of shape "
            f"{tuple(scores.shape)}; pass whether each item has each class."
        )
    ranked = []
    for column, has in zip(scores.T, relevant.T, strict=True):
        having = has.nonzero()[:, 0]
        having = having[column[having].argsort(descending=True)]
        thresholds = -column[having]
        # Of each item the first of those with the class that is not better, of each of these the last that ties.
        first = torch.searchsorted(thresholds, -column).int()
        ranked.append((first, having, torch.searchsorted(thresholds, thresholds, right=True) - 1))

    def precision(drawn: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(drawn, minlength=len(scores)).double()
        values = []
        for first, having, last in ranked:
            items = torch.bincount(first, counts, minlength=len(having) + 1).cumsum(0)[:-1]
            own = counts[having]
            found = own.cumsum(0)[last]
            # Where nothing was drawn so far, nothing counts.
            values.append((own * found / items.clamp(min=1)).sum() / own.sum())
        return torch.stack(values)

    return precision


def class_embeds(prompt_embeds: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
    """Return `(classes, dim)` unit rows: of each class the direction of the mean of its prompts' unit rows.

    Args:
        prompt_embeds: `(classes, prompts, dim)`, or with labels `(prompts, dim)`, of any norm but 0.
        labels: the class of each prompt, where classes have unequal numbers of them: indices from 0, none left out.

    Raises:
        ValueError: other shapes, a class without a prompt, a row that is zero or not finite, or prompts of a class
            that cancel each other out.
    """
    if prompt_embeds.dim() != (3 if labels is None else 2) or 0 in prompt_embeds.shape:
        raise ValueError(
            f"Got prompt embeddings of shape {tuple(prompt_embeds.shape)}, expected (classes, prompts, dim), or "
            "(prompts, dim) with labels; stack the prompts of each class or pass labels=."
        )
    if labels is None:
        classes, prompts, _ = prompt_embeds.shape
        labels = torch.arange(classes).repeat_interleave(prompts)
    rows = normalize(prompt_embeds.flatten(0, -2).to(torch.promote_types(prompt_embeds.dtype, torch.float32)), dim=-1)
    index = torch.as_tensor(labels, device=rows.device)
    found = index.unique().tolist()
    if index.shape != rows.shape[:1] or index.is_floating_point() or found != list(range(len(found))):
        raise ValueError(
            f"Got labels of shape {tuple(index.shape)} and the classes {found!s:.80}, expected an integer for each of "
            f"{len(rows)} prompts, from 0 without a gap; number the classes that have prompts."
        )
    sums = rows.new_zeros(len(found), rows.shape[1]).index_add_(0, index, rows)
    # A comparison with NaN is false.
    directed = sums.norm(dim=1) / index.bincount() > 1e-6
    if not (directed.all() and (rows.norm(dim=1) > 0.5).all()):
        raise ValueError(
            "Got prompt embeddings without a direction: zero, not finite, or cancelling each other out in a class; "
            "check the encoder."
        )
    return normalize(sums, dim=1)
