"""Zero-shot classification: the accuracy of scores against classes, and classes as means of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from .retrieval import pair_retrieval


def top_k_accuracy(
    scores: torch.Tensor, labels: Sequence[int] | torch.Tensor, ks: Sequence[int] = (1, 3, 5)
) -> dict[str, float]:
    """Measure how often the true class is among the k best ones.

    Ties count as in [`pair_retrieval`]: classes with equal scores have no order, so each value is its exact
    expectation over a random one, and constant scores over m classes give k / m.

    Args:
        scores: `(n, classes)`, larger is better; infinities are allowed.
        labels: n indices of true classes.
        ks: cut-offs between 1 and the number of classes.

    Returns:
        "top-k" for every k, in [0, 1].

    Raises:
        ValueError: NaN scores, sizes that do not fit, a label or a cut-off outside of the classes.
    """
    metrics = pair_retrieval(scores, torch.as_tensor(labels), ks)
    return {f"top-{k}": metrics[f"R@{k}"] for k in ks}


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
