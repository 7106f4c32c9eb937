from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn import metrics

from cmcr_hf.evaluation.classification import (
    average_precision,
    average_precision_of_draws,
    class_embeds,
    top_k_hits,
)


def top_k_accuracy(
    scores: torch.Tensor, labels: list[int] | torch.Tensor, ks: tuple[int, ...] = (1, 3, 5)
) -> dict[str, float]:
    return {name: hits.mean().item() for name, hits in top_k_hits(scores, labels, ks).items()}


@pytest.mark.parametrize("classes", [5, 40])
def test_accuracies_are_those_of_scikit_learn(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = torch.randn(200, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (200,), generator=generator)
    found = top_k_accuracy(scores, labels, (1, 2, 4))
    for k in (1, 2, 4):
        options = {"k": k, "labels": range(classes)}
        assert found[f"top-{k}"] == pytest.approx(metrics.top_k_accuracy_score(labels, scores, **options), abs=1e-12)


def test_the_cut_offs_are_those_of_the_published_tables() -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    assert top_k_accuracy(scores, [0, 1, 2, 4]) == {"top-1": 0.25, "top-3": 0.75, "top-5": 1.0}


def test_constant_scores_give_chance() -> None:
    metrics = top_k_accuracy(torch.full((6, 40), 0.3), [0, 0, 1, 5, 38, 39])
    assert metrics == pytest.approx({"top-1": 1 / 40, "top-3": 3 / 40, "top-5": 5 / 40}, abs=1e-12)


def test_ties_count_at_their_expectation_wherever_the_true_class_stands() -> None:
    scores = torch.tensor([[9.0, 7, 7, 7, 1]])
    for label in (1, 2, 3):
        metrics = top_k_accuracy(scores, [label], (1, 2, 3, 4))
        assert metrics == pytest.approx({"top-1": 0, "top-2": 1 / 3, "top-3": 2 / 3, "top-4": 1}, abs=1e-12)


def test_labels_may_be_a_list_or_a_tensor() -> None:
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert top_k_accuracy(scores, [0, 5, 2, 1]) == top_k_accuracy(scores, torch.tensor([0, 5, 2, 1]))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(2, 6), [0, 6], "from 0 to 6, expected 0 to 5"),
        (torch.zeros(2, 6), [-1, 0], "from -1 to 0, expected 0 to 5"),
        (torch.zeros(2, 6), [0], r"expected \(2,\) integers"),
        (torch.zeros(2, 6), [0.0, 1.0], "integers"),
        (torch.zeros(2, 4), [0, 1], "cut-off k=5, expected 1 to 4"),
        (torch.full((2, 6), math.nan), [0, 1], "NaN scores in 2 rows"),
        (torch.zeros(0, 6), [], "expected .n_queries, n_gallery"),
    ],
)
def test_what_does_not_fit_is_an_error(scores: torch.Tensor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(scores, labels)


def multi_label(case: str, items: int = 60, classes: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and classes of items: class 0 is that of none, class 1 that of all, and some items have none."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(items, classes, generator=generator, dtype=torch.float64)
    relevant = torch.rand(items, classes, generator=generator) < 0.3
    relevant[:, 0], relevant[:, 1] = False, True
    relevant[::7, 2:] = False
    if case == "ties":
        scores = scores.round()
    elif case == "constant":
        scores = torch.full_like(scores, 0.3)
    elif case == "duplicates":
        scores, relevant = scores.repeat(3, 1), relevant.repeat(3, 1)
    elif case == "half":
        scores = scores.half()
    elif case == "infinities":
        scores[::3], scores[1::3] = math.inf, -math.inf
    elif case == "one item":
        scores, relevant = scores[:1], relevant[:1]
    elif case == "one class":
        scores, relevant = scores[:, 2:3], relevant[:, 2:3]
    elif case == "reversed":
        scores = -relevant.double()
    return scores, relevant


CASES = ("random", "ties", "constant", "duplicates", "half", "infinities", "one item", "one class", "reversed")


@pytest.mark.parametrize("case", CASES)
def test_average_precision_is_that_of_scikit_learn(case: str) -> None:
    scores, relevant = multi_label(case)
    found = average_precision(scores, relevant)
    # scikit-learn refuses infinities; any other numbers in that order are as good.
    finite = scores.double().clamp(-1e9, 1e9)
    for column in range(scores.shape[1]):
        if relevant[:, column].any():
            expected = metrics.average_precision_score(relevant[:, column], finite[:, column])
            assert found[column].item() == pytest.approx(expected, abs=1e-9)
        else:
            assert found[column].isnan()


@pytest.mark.parametrize("case", ["random", "ties", "constant", "one item"])
def test_the_average_precision_of_draws_is_that_of_the_drawn_items(case: str) -> None:
    scores, relevant = multi_label(case)
    precision = average_precision_of_draws(scores, relevant)
    for seed in range(4):
        drawn = torch.randint(len(scores), (len(scores),), generator=torch.Generator().manual_seed(seed))
        expected = average_precision(scores[drawn], relevant[drawn])
        assert torch.allclose(precision(drawn), expected, atol=1e-12, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("scores", "relevant", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.bool), r"shape \(2, 2\).*expected bool of shape \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "type torch.float32, expected bool"),
        (torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool), "NaN scores in 2 rows"),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), "pass a filled matrix"),
    ],
)
def test_relevance_that_does_not_fit_is_an_error(scores: torch.Tensor, relevant: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(scores, relevant)


def test_a_class_is_the_direction_of_the_mean_of_unit_prompts() -> None:
    prompts = torch.tensor([[[3.0, 0, 0], [0, 0.5, 0]], [[0, 0, 2], [0, 0, 7]]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5), 0], [0, 0, 1]])
    assert torch.allclose(class_embeds(prompts), expected, atol=1e-7)


def test_the_mean_follows_the_definition() -> None:
    prompts = torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = prompts / prompts.norm(dim=-1, keepdim=True)
    mean = unit.mean(dim=1)
    found = class_embeds(prompts)
    assert found.dtype == torch.float64
    assert torch.allclose(found, mean / mean.norm(dim=-1, keepdim=True), atol=1e-14)


def test_labels_name_the_class_of_each_prompt_in_any_order() -> None:
    prompts = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(3).repeat_interleave(4)[order]
    expected = class_embeds(prompts)
    assert torch.allclose(class_embeds(prompts.flatten(0, 1)[order], labels), expected, atol=1e-6)
    assert torch.allclose(class_embeds(prompts.flatten(0, 1)[order], labels.tolist()), expected, atol=1e-6)


def test_classes_may_have_unequal_numbers_of_prompts() -> None:
    prompts = torch.tensor([[1.0, 0], [0, 1], [0, 5]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0, 1]])
    assert torch.allclose(class_embeds(prompts, [0, 0, 1]), expected, atol=1e-7)


def test_half_precision_is_computed_in_float32() -> None:
    prompts = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = class_embeds(prompts)
    assert found.dtype == torch.float32
    assert torch.equal(found, class_embeds(prompts.float()))


@pytest.mark.parametrize(
    ("prompts", "labels", "message"),
    [
        (torch.ones(4, 8), None, r"shape \(4, 8\), expected \(classes, prompts, dim\)"),
        (torch.ones(2, 4, 8), [0, 1], "stack the prompts"),
        (torch.ones(2, 0, 8), None, "stack the prompts"),
        (torch.ones(3, 8), [0, 1], "an integer for each of 3 prompts"),
        (torch.ones(2, 8), [0.0, 1.0], "an integer for each of 2 prompts"),
        (torch.ones(3, 8), [0, 2, 2], r"the classes \[0, 2\], expected .* without a gap"),
        (torch.ones(2, 8), [1, 2], "from 0 without a gap"),
        (torch.tensor([[[1.0, 0], [0, 0]]]), None, "without a direction"),
        (torch.tensor([[[1.0, 0], [-1, 0]]]), None, "without a direction"),
        (torch.tensor([[[1.0, math.nan]]]), None, "without a direction"),
        (torch.tensor([[[1.0, math.inf]]]), None, "without a direction"),
    ],
)
def test_prompts_without_a_meaning_are_an_error(prompts: torch.Tensor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_embeds(prompts, labels)
